"""The cost of a network as a differentiable function of its group widths.

Every cost here is a sum of products: a weight of shape (out, in, kernel...) costs coefficient * width(out) * width(in), where
each width is linear in the group widths. All terms are evaluated together as a few batched tensor operations.

    tensor legend: G groups, T terms
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph, full_widths


class CostModel(ABC):
    """A cost of a network as a function of the widths of its channel groups."""

    unit: str
    """What the numbers count, per image."""
    graph: ChannelGraph

    @abstractmethod
    def of(self, widths: Tensor) -> Tensor:
        """Return the cost as a scalar tensor.

        widths: (G,) float, channels per group in graph order, not necessarily whole; differentiable. A width of exactly 0
        in a removable block makes the whole block free.
        """

    @cached_property
    def full(self) -> float:
        """Cost of the unpruned network, in `unit`."""
        return float(self.of(full_widths(self.graph)))

    def __call__(self, architecture: Architecture) -> float:
        """Return the cost of a pruned network, in `unit`. Raises: ArchitectureError if it belongs to another graph."""
        architecture.check_fits(self.graph)
        widths = [architecture.widths[group.name] for group in self.graph.groups]
        return float(self.of(torch.tensor(widths, dtype=torch.float64)))

    def relative_gradient(self, widths: Tensor) -> Tensor:
        """Return (G,) float W_g = dC/dn_g / C(full) at these widths, not attached to any graph: the paper's group weights."""
        widths = widths.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.of(widths), widths)
        return gradient / self.full


def move_to(widths: Tensor, owner: object, *names: str) -> None:
    """Move tensors of an object to the device and precision of the widths, once: a step on a GPU never waits for the host."""
    for name in names:
        tensor = getattr(owner, name)
        dtype = widths.dtype if tensor.is_floating_point() else tensor.dtype
        if (tensor.device, tensor.dtype) != (widths.device, dtype):
            setattr(owner, name, tensor.to(widths.device, dtype))


class BlockMask:
    """Finds the parts of a cost (terms, products, calls) that are removed with a block."""

    def __init__(self, graph: ChannelGraph, is_inside: Sequence[Sequence[bool]]) -> None:
        """is_inside: for each of the T parts, for each block of the graph, whether the part belongs to that block alone."""
        inner = [[group.name in block.groups for group in graph.groups] for block in graph.blocks]
        self._inner_BG = torch.tensor(inner, dtype=torch.float64).view(len(graph.blocks), len(graph.groups))
        self._owner_TB = torch.tensor(is_inside, dtype=torch.float64).view(len(is_inside), len(graph.blocks))

    def alive_T(self, widths: Tensor) -> Tensor:
        """Return 0 for parts inside a block one of whose groups is empty, else 1. widths: (..., G); returns (..., T)."""
        move_to(widths, self, "_inner_BG", "_owner_TB")
        empty_G = (widths.detach() <= 0).to(widths.dtype)
        return 1 - (empty_G @ self._inner_BG.T).clamp(max=1) @ self._owner_TB.T


@dataclass(frozen=True)
class Term:
    """coefficient * product of the widths of some dimensions of one tensor."""

    coefficient: float
    tensor: str
    dims: tuple[int, ...]
    """Dimensions whose widths are multiplied; the coefficient includes the sizes of all others."""


class SumOfProducts(CostModel):
    """A cost that is a sum of terms, each a product of at most two widths."""

    def __init__(
        self, graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]], terms: Iterable[Term], unit: str
    ) -> None:
        self.graph, self.unit = graph, unit
        terms = list(terms)
        rows, full_G, zeros_G = (
            _width_rows(graph),
            full_widths(graph),
            torch.zeros(len(graph.groups), dtype=torch.float64),
        )

        def row(tensor: str, dim: int) -> Tensor:
            """Return (G + 1,) entries of a dimension per channel of each group, then the entries outside all groups."""
            row_G = rows.get((tensor, dim), zeros_G)
            return torch.cat([row_G, (shapes[tensor][dim] - row_G @ full_G)[None]])

        factors = [[row(term.tensor, dim) for dim in term.dims] for term in terms]
        one = torch.eye(len(graph.groups) + 1, dtype=torch.float64)[-1]
        self._coefficient_T = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
        pairs = [(*rows, one, one)[:2] for rows in factors] or [(one[:0], one[:0])]
        self._first_TG, self._second_TG = (
            torch.stack(side).view(len(terms), len(one)) for side in zip(*pairs, strict=True)
        )
        self._blocks = BlockMask(graph, [[term.tensor in block.tensors for block in graph.blocks] for term in terms])
        _ = self.full  # computed now: no training step waits for it

    def of(self, widths: Tensor) -> Tensor:
        """Return the cost as a scalar tensor; see CostModel.of."""
        move_to(widths, self, "_coefficient_T", "_first_TG", "_second_TG")
        extended = torch.cat([widths, widths.new_ones(1)])
        products_T = self._coefficient_T * (self._first_TG @ extended) * (self._second_TG @ extended)
        return (products_T * self._blocks.alive_T(widths)).sum()


def _width_rows(graph: ChannelGraph) -> dict[tuple[str, int], Tensor]:
    """Return (G,) float64 for each pruned dimension of a tensor: its entries per channel of each group."""
    rows: dict[tuple[str, int], Tensor] = {}
    for number, group in enumerate(graph.groups):
        for dim in group.dims:
            row_G = rows.setdefault((dim.tensor, dim.dim), torch.zeros(len(graph.groups), dtype=torch.float64))
            row_G[number] = dim.repeat
    return rows
