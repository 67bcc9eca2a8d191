"""Costs that are counted: MACs, parameters, activation memory, attention, and mixtures of costs."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gator.costs.base import BlockMask, CostModel, SumOfProducts, Term
from gator.errors import GateError
from gator.graph.graph import ChannelGraph, Product, full_widths


class MacsCost(SumOfProducts):
    """MACs per image of all convolutions and linear layers: half of what torch.utils.flop_counter counts.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    >>> import gator
    >>> gator.MacsCost(gator.trace(net, torch.zeros(1, 3, 10, 10))).full    # 100 positions * 9 taps * (3*8 + 8*4)
    50400.0
    """

    def __init__(self, graph: ChannelGraph) -> None:
        terms = []
        for layer in graph.layers:
            kernel = torch.Size(graph.parameters[layer.weight][2:]).numel()
            terms.append(Term(layer.positions * kernel, layer.weight, (0, 1)))
        super().__init__(graph, graph.parameters, terms, "multiply-adds")


class ParamsCost(SumOfProducts):
    """Number of parameters, biases and normalisation included."""

    def __init__(self, graph: ChannelGraph) -> None:
        cut_dims: dict[str, set[int]] = {}
        for dim in (dim for group in graph.groups for dim in group.dims):
            cut_dims.setdefault(dim.tensor, set()).add(dim.dim)
        terms = []
        for name, shape in graph.parameters.items():
            dims = sorted(cut_dims.get(name, ()))
            others = (size for dim, size in enumerate(shape) if dim not in dims)
            terms.append(Term(math.prod(others), name, tuple(dims)))
        super().__init__(graph, graph.parameters, terms, "parameters")


class MemoryCost(SumOfProducts):
    """Bytes per image of the outputs of all convolutions and linear layers, at 4 bytes a value."""

    def __init__(self, graph: ChannelGraph) -> None:
        terms = [Term(4 * layer.outputs, layer.weight, (layer.out_dim,)) for layer in graph.layers]
        super().__init__(graph, graph.parameters, terms, "activation bytes")


COUNTED: dict[str, Callable[[ChannelGraph], CostModel]] = {"macs": MacsCost, "params": ParamsCost, "memory": MemoryCost}
"""Short name -> cost: what a configuration may mix by name."""


class AttentionCost(CostModel):
    """MACs per image of products of two computed values, of which attention has two; MacsCost does not count them.

    The products of a layer are linear in the number of its heads.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph, self.unit = graph, "multiply-adds"
        no_rows = torch.zeros(0, len(graph.groups) + 1, dtype=torch.float64)
        self._rows_PG = torch.cat([no_rows, *(_width_row(graph, product)[None] for product in graph.products)])
        self._blocks = BlockMask(graph, [[one.block == block.name for block in graph.blocks] for one in graph.products])

    def of(self, widths: Tensor) -> Tensor:
        """Return the cost as a scalar tensor; see CostModel.of."""
        extended = torch.cat([widths, widths.new_ones(1)])
        return ((self._rows_PG.to(widths) @ extended) * self._blocks.alive_T(widths)).sum()


def _width_row(graph: ChannelGraph, product: Product) -> Tensor:
    """Return (G + 1,) float64: MACs per channel of each group, then those outside all groups."""
    group_of_channel = torch.cat([graph.group_of_channel(), torch.tensor([len(graph.groups)])])  # index -1 stays
    counts = torch.bincount(group_of_channel[product.channels], minlength=len(graph.groups) + 1)
    sizes = torch.cat([full_widths(graph), torch.ones(1, dtype=torch.float64)])
    return product.macs * counts / len(product.channels) / sizes


class MixedCost(CostModel):
    """Weighted mean of several costs of one graph, each divided by its value for the unpruned network; 1 when full.

    Raises: GateError if a weight is negative, all are zero, or the graphs differ.
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
        total = sum(parts.values())
        self.parts = {cost: weight / total for cost, weight in parts.items()}

    @property
    def full(self) -> float:
        """1: each part is divided by its full value, and the weights are normalised."""
        return 1.0

    def of(self, widths: Tensor) -> Tensor:
        """Return the cost as a scalar tensor; see CostModel.of."""
        return torch.stack([weight / cost.full * cost.of(widths) for cost, weight in self.parts.items()]).sum()
