"""The auxiliary loss on open channels, with a given weight or one controlled towards a target.

Source of the loss: Gator, arXiv 2205.15404. The target control is not in the paper: a weight does not determine where a run ends,
and an uncontrolled run can fall from 0.46 to 0.07 of the MACs within one epoch.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gator.costs.base import CostModel, check_costs_something
from gator.errors import GateError
from gator.gating.gated import GatedModel
from gator.gating.gates import ChannelGates
from gator.graph.architecture import Architecture
from gator.graph.graph import full_widths

BEGIN_AT = 0.1
"""Progress of the gating stage at which the first channels close."""
REACH_AT = 0.7
"""Progress at which the target is to be reached."""
MOST_AT_ONCE = 4
"""A step closes at most this multiple of the channels that its part of the way would take if all cost the same."""
SELECT_AT = 0.9
"""Progress at which the missing channels are selected by the logits alone."""
TOLERANCE = 0.005
"""Share of the target by which the cost may end below it."""
LAST_TOLERANCE = 0.01
"""The same where it would else end above the target by more than this."""
PROPORTIONAL, INTEGRAL = 50.0, 1000.0
"""Gains of the control, per unit of relative error and per unit of relative error times progress; see TargetControl."""
LARGEST_WEIGHT = 100.0
"""Pressure never exceeds this when no weight is given."""


class GateLoss(nn.Module):
    """loss_weight * sum over groups of W_g * n_g, which has the gradient of loss_weight * C(n) / C(full).

    n_g is the mean over the batch of the open gates of group g; W_g = dC/dn_g / C(full) is taken at the kept widths and held
    constant, so that the loss is linear in the samples and exact under gradient accumulation and data parallelism.

    weight alone: the paper's loss. target_ratio (of cost.full) or target (in cost.unit): channels close one after another from
    10 % of the stage on, so that the cost reaches the target at 70 % and stays there, and the weight is controlled to match.
    Both: weight is the starting and the largest pressure.
    target_cost: the cost that the target is for, if not `cost`: reduce latency until so many MACs are left.

    Raises: GateError if neither is given, a cost is 0, or the target is out of range or below what can be reached.

    >>> gate_loss = GateLoss(cost, target_ratio=0.5)                              # doctest: +SKIP
    >>> loss = cross_entropy(gated(images), labels) + gate_loss(gated, progress)  # doctest: +SKIP

    A step of several micro-batches begins with begin_step(gated, progress), and each of them calls gate_loss(gated).
    """

    weight: Tensor

    def __init__(
        self,
        cost: CostModel,
        weight: float | None = None,
        *,
        target_ratio: float | None = None,
        target: float | None = None,
        target_cost: CostModel | None = None,
    ) -> None:
        super().__init__()
        aim = cost if target_cost is None else target_cost
        check_costs_something(cost)
        check_costs_something(aim)
        if target is not None and target_ratio is not None:
            raise GateError(f"target ({target} {aim.unit}) and target_ratio ({target_ratio}) are both given; give one")
        if target is not None:
            target_ratio = target / aim.full
        if weight is None and target_ratio is None:
            raise GateError("a gate loss needs weight, target_ratio or target; got none")
        if weight is not None and not weight >= 0:
            raise GateError(f"weight is {weight}, expected a number >= 0")
        for one in {cost, aim}:
            check_widths_cost(one)
        self.cost = cost
        self.control = None if target_ratio is None else TargetControl(aim, target_ratio, weight)
        self._has_begun = False
        self.register_buffer("weight", torch.tensor(1.0 if weight is None else float(weight), dtype=torch.float64))

    def begin_step(self, gated: GatedModel, progress: float) -> None:
        """Run the control before the first forward pass of an optimizer step; does nothing without a target.

        Between micro-batches it would close channels that were open in the first of them alone.
        """
        if self.control is not None:
            self._control(self.control, gated, progress)
            gated.begin_step()

    def _control(self, control: "TargetControl", gated: GatedModel, progress: float) -> None:
        if not 0 <= progress <= 1 + 1e-6:  # such as a count of epochs; a share may be rounded up
            raise GateError(f"progress is {progress:.6g}, expected the finished share of the gating stage, in [0, 1]")
        gated.gates.settle()  # the forward pass would do it
        self._follow(gated)
        self.weight.copy_(control.step(gated, progress))
        self._has_begun = True

    def forward(self, gated: GatedModel, progress: float | None = None) -> Tensor:
        """Return the loss of the latest forward pass of `gated` as a scalar tensor.

        progress: finished share of the gating stage, in [0, 1]; needed with a target unless begin_step() was called,
        ignored without a target.
        """
        if self.control is not None:
            if progress is not None:
                self._control(self.control, gated, progress)
            elif not self._has_begun:
                raise GateError(
                    "with a target, call gate_loss(gated, progress) with progress in [0, 1], or begin_step() first"
                )
        self._follow(gated)
        weight_G = gated.group_weights(self.cost)
        mask_C = gated.mask_NC.mean(dim=0)
        return self.weight.to(mask_C.dtype) * (weight_G.to(mask_C.dtype)[gated.gates.group_C] * mask_C).sum()

    def _follow(self, gated: GatedModel) -> None:
        if not gated.training:
            raise GateError("the gated network is in eval mode, in which gates do not learn; call gated.train() first")
        for one in {self.cost, self.cost if self.control is None else self.control.cost}:
            gated.check_is_cost_of_this(one)
        device = gated.gates.logits_C.device
        if self.weight.device != device:
            self.to(device)

    @property
    def weight_now(self) -> float:
        """The pressure in force."""
        return float(self.weight)


class TargetControl(nn.Module):
    """Closes channels along a straight line of the cost, in the order of their logits, and drives the pressure to match.

    W_g makes logits of different groups comparable: task gradient per unit of cost. The allowed cost falls from the full one at
    BEGIN_AT to the target at REACH_AT. Whenever the network costs more, its channels of the lowest logits close; none closes
    before, so neither a large part of the network goes at once, nor is the target overshot by more than TOLERANCE (at the end
    LAST_TOLERANCE, in a network whose channels are large).

    The marginal channel is the last that has to close to meet the target. The pressure leads its logit down a straight line
    from its value at the first step to 0 at REACH_AT, so that channels are often closed in training before they close for
    good: the logarithm of the weight is the sum of an integral and a proportional part of the distance to that line. The
    gains give a critically damped second-order system: with a logit that falls as fast as the line when the weight is right,
    omega^2 = INTEGRAL / REACH_AT and damping PROPORTIONAL / REACH_AT.
    """

    log_weight: Tensor
    start: Tensor

    def __init__(self, cost: CostModel, target_ratio: float, weight: float | None) -> None:
        super().__init__()
        if not 0 < target_ratio <= 1:
            raise GateError(f"the target is {target_ratio:.4g} of the full cost, expected a share in (0, 1]")
        lowest = lowest_ratio(cost)
        if target_ratio < lowest:
            raise GateError(
                f"the target is {target_ratio:.4g} of the full cost, but with one channel per group and no removable block "
                f"{lowest:.4g} remain: the lowest that can be reached is {lowest * cost.full:.4g} {cost.unit}; raise the "
                f"target or trace more of the network"
            )
        self.cost, self.target_ratio = cost, target_ratio
        self.largest = LARGEST_WEIGHT if weight is None else weight
        log_weight = math.log(max(1.0 if weight is None else weight, 1e-6))
        self.register_buffer("log_weight", torch.tensor(log_weight, dtype=torch.float64))
        self.register_buffer("start", torch.tensor(torch.nan, dtype=torch.float64))  # of the marginal logit's line
        # No tensors: a step must not wait for the device.
        self.has_selected = False
        self.last_progress = 0.0

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state besides the buffers."""
        return {"has_selected": self.has_selected, "last_progress": self.last_progress}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state of get_extra_state()."""
        self.has_selected, self.last_progress = state["has_selected"], state["last_progress"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Read a state, also one of before 2026-11-28, which had the last progress as a buffer."""
        extra, progress = f"{prefix}_extra_state", state_dict.pop(f"{prefix}last_progress", None)
        if progress is not None:
            state_dict[extra] = {"has_selected": state_dict[extra], "last_progress": float(progress)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def allowed_ratio(self, progress: float) -> float:
        """Return the share of the full cost that the network may have at this progress."""
        passed = (progress - BEGIN_AT) / (REACH_AT - BEGIN_AT)
        return 1 - (1 - self.target_ratio) * min(max(passed, 0.0), 1.0)

    @torch.no_grad()
    def step(self, gated: GatedModel, progress: float) -> Tensor:
        """Close the channels that are due, and return the pressure for this step."""
        if progress >= SELECT_AT and not self.has_selected:
            self._select(gated)
        gates = gated.gates
        last_C = gates.last_of_its_group()
        open_C = gates.open_C(last_C)
        order, rank = _closing_order(gates, open_C)
        num_closing, num_due = self._nums_that_fit(
            gates, open_C, order, (self.target_ratio, self.allowed_ratio(progress))
        ).unbind()
        passed = max(progress - self.last_progress, 0.0)
        self.last_progress = progress
        pressure = self._pressure(gates, order, num_closing, progress, min(passed, 0.1))
        share = min(MOST_AT_ONCE * passed / (REACH_AT - BEGIN_AT), 1.0)
        due_C = rank < num_due.clamp(max=1 + int(share * len(order)))
        gates.close(due_C, last_C)
        gates.closable_C.copy_(due_C)  # all others wait at 0 for their turn
        return torch.where(num_closing > 0, pressure, 0.0)

    def _select(self, gated: GatedModel) -> None:
        """Close the channels that are still missing, by rising logit, except those of groups too large for the remaining cost.

        Runs once, in one round a group, so it may wait for the device.
        """
        gates = gated.gates
        open_C = gates.open_C().clone()
        target = self.target_ratio * self.cost.full
        for tolerance in (TOLERANCE, LAST_TOLERANCE):
            self._close_what_fits(gates, open_C, tolerance)
            if bool(self._cost_at(gates, gates.count(open_C)) <= target * (1 + LAST_TOLERANCE)):
                break
        gates.close(~open_C)
        self.has_selected = True

    def _close_what_fits(self, gates: ChannelGates, open_C: Tensor, tolerance: float) -> None:
        candidates_C = open_C.clone()
        while bool(candidates_C.any()):
            order, _ = _closing_order(gates, candidates_C)
            (fit,) = self._nums_that_fit(gates, open_C, order, (self.target_ratio,), tolerance).tolist()
            num_closing = min(fit, int(candidates_C.sum()))
            open_C[order[:num_closing]] = False
            candidates_C[order[:num_closing]] = False
            if num_closing < len(order):  # the next one is too large, and with it all of its group, which cost the same
                candidates_C &= gates.group_C != gates.group_C[order[num_closing]]

    def _nums_that_fit(
        self,
        gates: ChannelGates,
        open_C: Tensor,
        order: Tensor,
        ratios: tuple[float, ...],
        tolerance: float = TOLERANCE,
    ) -> Tensor:
        """Return for each of R shares how many channels can close in this order while the others cost the share, less the tolerance.

        (R,) int64, at most the open channels. The cost falls as channels close, so two rounds find the number without waiting
        for the device: the costs at the ends of about sqrt(C) parts of the order, then those within the part that each share ends in.
        """
        floors = [ratio * self.cost.full * (1 - tolerance) for ratio in ratios]
        length = math.isqrt(len(order) - 1) + 1
        missing = -len(order) % length
        group_PL = pad(gates.group_C[order], (0, missing)).view(-1, length)
        is_open_PL = pad(open_C[order].to(torch.float64), (0, missing)).view(-1, length)
        open_G = gates.count(open_C)
        place_P = len(open_G) * torch.arange(len(group_PL), device=order.device)
        flat = open_G.new_zeros(len(place_P) * len(open_G))
        flat.index_add_(0, (group_PL + place_P[:, None]).flatten(), is_open_PL.flatten())
        in_part_PG = flat.view(len(place_P), len(open_G))
        closed_PG = in_part_PG.cumsum(0)  # whole numbers: exact in any order
        cost_P = self._cost_at(gates, open_G - closed_PG)
        part_R = torch.stack([(cost_P >= floor).sum() for floor in floors]).clamp(max=len(place_P) - 1)
        before_RG = (closed_PG - in_part_PG).index_select(0, part_R)
        group_RL, is_open_RL = group_PL.index_select(0, part_R), is_open_PL.index_select(0, part_R)
        number_G = torch.arange(len(open_G), device=order.device)
        closed_RLG = ((group_RL[..., None] == number_G) * is_open_RL[..., None]).cumsum(1) + before_RG[:, None]
        cost_RL = self._cost_at(gates, open_G - closed_RLG)
        in_part_R = torch.stack([(cost_L >= floor).sum() for cost_L, floor in zip(cost_RL, floors, strict=True)])
        return torch.minimum(part_R * length + in_part_R, open_G.sum().to(torch.int64))

    def _cost_at(self, gates: ChannelGates, widths_G: Tensor) -> Tensor:
        """Return the cost at (..., G) widths, with protected groups at one channel at least and removed blocks at zero."""
        widths_G = torch.where(gates.protected_G, widths_G.clamp(min=1), widths_G)
        return self.cost.of(widths_G.masked_fill(gates.gone_G(widths_G), 0))

    def _pressure(
        self, gates: ChannelGates, order: Tensor, num_closing: Tensor, progress: float, passed: float
    ) -> Tensor:
        last = order.index_select(0, (num_closing - 1).clamp(min=0)[None])
        marginal = gates.logits_C.index_select(0, last).squeeze(0).to(torch.float64)
        lowest = 0.5 * gates.config.init_logit  # a shorter line would make the gains too large
        self.start.copy_(torch.where(self.start.isnan(), marginal.clamp(min=lowest), self.start))
        error = marginal.clamp(max=self.start) / self.start - max(0.0, 1 - progress / REACH_AT)
        self.log_weight.add_(INTEGRAL * error * passed).clamp_(math.log(1e-6), math.log(max(self.largest, 1e-6)))
        return torch.exp(self.log_weight + PROPORTIONAL * error).clamp(max=self.largest)


def _closing_order(gates: ChannelGates, candidates_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return all channels, candidates first by rising logit, and the place of each channel in that order."""
    order = gates.logits_C.masked_fill(~candidates_C, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return order, rank


def check_widths_cost(cost: CostModel) -> None:
    """Raise GateError if narrowing most groups of the unpruned network saves nothing: their gates would not learn.

    So it is with the times of an eager network on a GPU at a batch of 1: every width takes as long as its launch.
    """
    weight_G = cost.relative_gradient(full_widths(cost.graph))
    num_free = int((weight_G == 0).sum())
    if 2 * num_free > len(weight_G):
        raise GateError(
            f"{type(cost).__name__} of {cost.graph.model} does not fall when {num_free} of its {len(weight_G)} groups get narrower, "
            "expected so of half of them at most, because gates learn from what their channels cost; measure a latency table with "
            "runtime cuda_graph or for a larger batch, or choose another cost"
        )


def lowest_ratio(cost: CostModel) -> float:
    """Return the share of the full cost that remains when everything removable is removed."""
    keep = {group.name: (0,) if group.block is None else () for group in cost.graph.groups}
    return cost(Architecture.from_keep(cost.graph, keep)) / cost.full
