"""The cost of a network as a differentiable function of its group widths.

Every cost here is a sum of terms: a weight of shape (out, in, kernel...) costs coefficient * width(out) * width(in), where
each width is linear in the group widths. All terms are evaluated together as a few batched tensor operations.

    tensor legend: G groups, T terms, K widths of a term
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gator.errors import GateError
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph, Term, full_widths


class CostModel(ABC):
    """A cost of a network as a function of the widths of its channel groups."""

    unit: str
    """What the numbers count, per image."""
    graph: ChannelGraph

    @abstractmethod
    def of(self, widths: Tensor) -> Tensor:
        """Return the cost at (..., G) widths as a (...) tensor: a scalar for one architecture.

        widths: float, channels per group in graph order, not necessarily whole; differentiable. A width of exactly 0 in a
        removable block makes the whole block free.
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
        """Return (G,) float W_g = dC/dn_g / C(full) at these widths, not attached to any graph: the paper's group weights.

        Raises: GateError if the unpruned network costs nothing.
        """
        check_costs_something(self)
        widths = widths.detach().clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.of(widths), widths)
        return gradient / self.full


def check_costs_something(cost: CostModel) -> None:
    """Raise GateError if a cost of the unpruned network is 0, so that no share of it can be taken."""
    if not cost.full:
        raise GateError(
            f"{type(cost).__name__} of {cost.graph.model} is 0 {cost.unit}, expected more; choose another cost"
        )


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


class SumOfProducts(CostModel):
    """A cost that is a sum of terms."""

    def __init__(
        self, graph: ChannelGraph, terms: Sequence[Term], is_inside: Sequence[Sequence[bool]], unit: str
    ) -> None:
        """is_inside: for each of the T terms, for each block of the graph, whether the term is removed with that block."""
        self.graph, self.unit = graph, unit
        one = torch.eye(len(graph.groups) + 1, dtype=torch.float64)[-1]
        most = max((len(term.widths) for term in terms), default=0)
        rows = [torch.stack([*term.widths, *[one] * (most + 1 - len(term.widths))]) for term in terms]
        self._rows_KTG = torch.stack(rows, dim=1) if rows else torch.zeros(1, 0, len(one), dtype=torch.float64)
        self._coefficient_T = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
        self._is_zero_at_one_T = torch.tensor([term.is_zero_at_one for term in terms], dtype=torch.bool)
        self._blocks = BlockMask(graph, is_inside)
        _ = self.full  # computed now: no training step waits for it

    def of(self, widths: Tensor) -> Tensor:
        """Return the cost; see CostModel.of."""
        return self.terms_of(widths).sum(-1)

    def terms_of(self, widths: Tensor) -> Tensor:
        """Return the (..., T) terms at (..., G) widths."""
        factors = self._factors(widths)
        return functools.reduce(torch.mul, factors, self._weights_T(widths, factors[0]))

    def relative_gradient(self, widths: Tensor) -> Tensor:
        """Return W_g; see CostModel.relative_gradient. Written out: half the operations of automatic differentiation."""
        check_costs_something(self)
        with torch.no_grad():
            factors = self._factors(widths)
            weights_T = self._weights_T(widths, factors[0])
            others = [
                functools.reduce(torch.mul, factors[:place] + factors[place + 1 :], weights_T)
                for place in range(len(factors))
            ]
            return torch.cat(others) @ self._rows_KTG[..., :-1].flatten(0, 1) / self.full

    def _factors(self, widths: Tensor) -> list[Tensor]:
        """Return the K widths of each term, (..., T)."""
        move_to(widths, self, "_rows_KTG", "_coefficient_T", "_is_zero_at_one_T")
        extended = torch.cat([widths, widths.new_ones(*widths.shape[:-1], 1)], dim=-1)
        return list((extended @ self._rows_KTG.flatten(0, 1).T).unflatten(-1, self._rows_KTG.shape[:2]).unbind(-2))

    def _weights_T(self, widths: Tensor, first_T: Tensor) -> Tensor:
        """Return the (..., T) coefficients, 0 for terms of removed blocks and for those that are zero at a first width of one."""
        is_zero_T = self._is_zero_at_one_T & (first_T.detach() <= 1)
        return (self._coefficient_T * self._blocks.alive_T(widths)).masked_fill(is_zero_T, 0)
