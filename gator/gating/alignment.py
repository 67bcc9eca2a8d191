"""Widths that suit the hardware: each group rounded to a step, within the cost that was asked for.

Kernels work on channels in blocks; a width of 17 takes about as long as one of 24 or 32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from gator.costs.base import CostModel
from gator.errors import GateError
from gator.gating.gated import GatedModel
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph


def hardware_step(device: torch.device) -> int:
    """Return the number of channels that a device processes at once.

    8 on CUDA, where tensor cores take 16 bytes of half precision, and on CPUs with AVX2 (8 float32 values); 16 with AVX-512.
    """
    if device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability():
        return 16
    return 8


def aligned(
    gated: GatedModel, cost: CostModel, step: int | Mapping[str, int], target_ratio: float | None = None
) -> Architecture:
    """Return an architecture near the open channels, every width of which is a multiple of `step`.

    Each group is first rounded up with its most probable closed channels. Then the groups whose least probable `step` channels are
    worth least, by keep probability per unit of cost, go down until the cost is within target_ratio of the full one; without a target,
    within the present cost of the open channels. A group without a multiple of `step` channels may also keep all of them, an
    empty group stays empty, and no other becomes empty. Load the result into `gated` (load_architecture) before pruning.

    step: channels as the graph counts them, at least 1; for all groups, or for each by its name, as LatencyCost.hardware_steps() has it.
    Raises: GateError if a step is not positive or missing, target_ratio is not in (0, 1], the cost is of another network, or the
    narrowest such architecture costs more than that.
    """
    if target_ratio is not None and not 0 < target_ratio <= 1:
        raise GateError(f"target_ratio is {target_ratio}, expected a share in (0, 1]")
    gated.check_is_cost_of_this(cost)
    gates = gated.gates
    step_G = _step_by_group(gated.graph, step).to(gates.group_C.device)
    open_C = gates.open_C()
    limit = float(cost.of(gates.count(open_C))) if target_ratio is None else target_ratio * cost.full
    available_G = gates.count(torch.ones_like(open_C))
    widths_G = torch.minimum((gates.count(open_C) / step_G).ceil() * step_G, available_G)
    order = _most_probable_first(gates.group_C, open_C, gates.logits_C.detach())
    value_C = torch.sigmoid(gates.logits_C.detach().double())[order]
    rank_C = _rank_in_group(gates.group_C[order])
    while float(cost.of(widths_G)) > limit:
        lower_G = (((widths_G - 1) / step_G).floor() * step_G).clamp(min=0)
        can_drop_G = lower_G > 0
        if not bool(can_drop_G.any()):
            raise GateError(
                f"with widths in steps of {_in_words(step_G)} at least {float(cost.of(widths_G)) / cost.full:.4g} of the full cost remain, "
                f"expected {limit / cost.full:.4g}; lower the step or raise the target"
            )
        group_C = gates.group_C[order]
        is_dropped_C = (rank_C >= lower_G[group_C]) & (rank_C < widths_G[group_C])
        lost_G = torch.zeros_like(widths_G).index_add(0, group_C, value_C * is_dropped_C)
        saved_G = cost.relative_gradient(widths_G) * (widths_G - lower_G)
        worth_G = (lost_G / saved_G.clamp(min=1e-12)).masked_fill(~can_drop_G, torch.inf)
        least = worth_G.argmin()
        widths_G[least] = lower_G[least]
    keep_C = torch.zeros_like(open_C)
    keep_C[order] = rank_C < widths_G[gates.group_C[order]]
    return Architecture.from_keep(gated.graph, gated.keep_indices(keep_C))


def _step_by_group(graph: ChannelGraph, step: int | Mapping[str, int]) -> Tensor:
    """Return (G,) float64, one step for each group."""
    steps = dict.fromkeys((group.name for group in graph.groups), step) if isinstance(step, int) else step
    for group in graph.groups:
        if not steps.get(group.name, 0) >= 1:
            raise GateError(f"step is {steps.get(group.name)} for group {group.name}, expected at least 1")
    return torch.tensor([steps[group.name] for group in graph.groups], dtype=torch.float64)


def _in_words(step_G: Tensor) -> str:
    low, high = int(step_G.min()), int(step_G.max())
    return str(low) if low == high else f"{low} to {high}"


def _most_probable_first(group_C: Tensor, open_C: Tensor, logits_C: Tensor) -> Tensor:
    """Return (C,) the channels group by group, in each the open ones before the closed ones, by falling logit."""
    by_logit = logits_C.argsort(descending=True, stable=True)
    by_openness = by_logit[(~open_C[by_logit]).to(torch.int8).argsort(stable=True)]
    return by_openness[group_C[by_openness].argsort(stable=True)]


def _rank_in_group(sorted_group_C: Tensor) -> Tensor:
    """Return (C,) the place of each channel in its group, for channels in the order of their groups."""
    counts = torch.bincount(sorted_group_C)
    begins = counts.cumsum(0) - counts
    return torch.arange(len(sorted_group_C), device=sorted_group_C.device) - begins[sorted_group_C]
