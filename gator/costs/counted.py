"""Costs that are counted: MACs, parameters, activation memory, attention, and mixtures of costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gator.costs.base import CostModel, SumOfProducts, check_costs_something
from gator.errors import GateError
from gator.graph.graph import ChannelGraph, Product, Term, full_widths


class MacsCost(SumOfProducts):
    """MACs per image of all convolutions, linear and recurrent layers: half of what torch.utils.flop_counter counts.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    >>> import gator
    >>> gator.MacsCost(gator.trace(net, torch.zeros(1, 3, 10, 10))).full    # 100 positions * 9 taps * (3*8 + 8*4)
    50400.0
    """

    def __init__(self, graph: ChannelGraph) -> None:
        macs = [layer.macs for layer in graph.layers]
        super().__init__(graph, macs, _is_inside(graph, graph.layers), "MACs")


class ParamsCost(SumOfProducts):
    """Number of parameters, biases and normalisation included."""

    def __init__(self, graph: ChannelGraph) -> None:
        rows = _width_rows(graph)
        terms = [_size_of(shape, rows.get(name, {}), full_widths(graph)) for name, shape in graph.parameters.items()]
        is_inside = [[name in block.tensors for block in graph.blocks] for name in graph.parameters]
        super().__init__(graph, terms, is_inside, "parameters")


class MemoryCost(SumOfProducts):
    """Bytes per image of the outputs of all convolutions, linear and recurrent layers, at 4 bytes a value."""

    def __init__(self, graph: ChannelGraph) -> None:
        outputs = [replace(layer.outputs, coefficient=4 * layer.outputs.coefficient) for layer in graph.layers]
        super().__init__(graph, outputs, _is_inside(graph, graph.layers), "activation bytes")


class AttentionCost(SumOfProducts):
    """MACs per image of all other products, of which attention has two; MacsCost does not count them.

    Together the two are half of what torch.utils.flop_counter counts, except what print(graph) says is not counted.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        macs = [product.macs for product in graph.products]
        super().__init__(graph, macs, _is_inside(graph, graph.products), "MACs")


COUNTED: dict[str, Callable[[ChannelGraph], CostModel]] = {"macs": MacsCost, "params": ParamsCost, "memory": MemoryCost}
"""Short name -> cost: what a configuration may mix by name."""


def _is_inside(graph: ChannelGraph, products: Sequence[Product]) -> list[list[bool]]:
    return [[product.block == block.name for block in graph.blocks] for product in products]


def _width_rows(graph: ChannelGraph) -> dict[str, dict[int, Tensor]]:
    """Return for each tensor (G,) float64 for each of its pruned dimensions: entries per channel of each group."""
    rows: dict[str, dict[int, Tensor]] = {}
    for number, group in enumerate(graph.groups):
        for dim in group.dims:
            zeros_G = torch.zeros(len(graph.groups), dtype=torch.float64)
            rows.setdefault(dim.tensor, {}).setdefault(dim.dim, zeros_G)[number] = dim.repeat
    return rows


def _size_of(shape: tuple[int, ...], rows: dict[int, Tensor], full_G: Tensor) -> Term:
    """Return the number of entries of a tensor. rows: of its pruned dimensions, (G,) entries per channel."""
    others = math.prod(size for dim, size in enumerate(shape) if dim not in rows)
    return Term(others, tuple(torch.cat([row_G, (shape[dim] - row_G @ full_G)[None]]) for dim, row_G in rows.items()))


class MixedCost(CostModel):
    """Weighted mean of several costs of one graph, each divided by its value for the unpruned network; 1 when full.

    Raises: GateError if a weight is negative, all are zero, the graphs differ, or the unpruned network costs nothing.
    """

    def __init__(self, parts: Mapping[CostModel, float]) -> None:
        parts = {cost: float(weight) for cost, weight in parts.items() if weight != 0}
        if not parts or any(weight < 0 for weight in parts.values()):
            raise GateError(
                f"a mixed cost needs weights >= 0, at least one of them positive; got {list(parts.values())}"
            )
        graphs = {id(cost.graph): cost.graph for cost in parts}
        if len(graphs) > 1:
            raise GateError(
                f"the parts of a mixed cost belong to {len(graphs)} different graphs; trace once and share the graph"
            )
        self.graph, self.unit = next(iter(graphs.values())), "share of the unpruned network"
        for cost in parts:
            check_costs_something(cost)
        total = sum(parts.values())
        self.parts = {cost: weight / total for cost, weight in parts.items()}

    @property
    def full(self) -> float:
        """1: each part is divided by its full value, and the weights are normalised."""
        return 1.0

    def of(self, widths: Tensor) -> Tensor:
        """Return the cost; see CostModel.of."""
        return torch.stack([weight / cost.full * cost.of(widths) for cost, weight in self.parts.items()]).sum(0)
