"""Latency as a cost: the sum of a table's times over all calls of a network, calibrated by a few whole-network times.

    latency(n) = scale_layers * sum of convolutions and linear layers + scale_others * sum of all other calls + ms_per_call * calls

Timed alone, a call finds its inputs in the cache and the interpreter warm; the three factors correct for that, and for what a
runtime fuses, such as additions into convolutions. They are
fitted to the whole-network times in the table. The stated error is that of predicting each of these times from all others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gator.costs.base import BlockMask, CostModel, move_to
from gator.costs.counted import MacsCost
from gator.errors import LatencyError
from gator.graph.graph import ChannelGraph, full_widths
from gator.latency.table import LatencyTable, NetworkTime, largest_widths

PRIOR = 0.03
"""Weight of "all factors as they are" in the fit, as if it were known to so large a relative error per timing."""
SECANT_CHANNELS = 8
"""Least number of channels for the secant W_g: the times of a table are not exact enough for a derivative."""


@dataclass(frozen=True)
class Calibration:
    """How sums of single calls become the time of a network."""

    scale_layers: float
    scale_others: float
    ms_per_call: float
    num_networks: int
    """Whole-network times that were fitted."""
    mean_error: float | None
    """Mean relative error over these, each predicted from all others; None with fewer than three."""
    p90_error: float | None
    """90th percentile of the same."""

    def __str__(self) -> str:
        if self.mean_error is None:
            return f"not calibrated: {self.num_networks} whole-network times, of which 3 are needed to state an error"
        return f"mean error {self.mean_error:.1%}, p90 {self.p90_error:.1%} over {self.num_networks} whole networks"


class LatencyCost(CostModel):
    """Milliseconds of one forward pass of the table's batch, as a function of the widths.

    Piecewise linear along the inputs and the outputs of each call, and monotone. Never falls below the times at one channel.

    Raises: LatencyError if the table lacks a kind of call of this network, by name, or ends below its widths.

    >>> cost = LatencyCost(graph, table)                                  # doctest: +SKIP
    >>> cost(architecture), cost.calibration.mean_error                   # doctest: +SKIP
    (4.2, 0.024)
    """

    def __init__(self, graph: ChannelGraph, table: LatencyTable) -> None:
        self.graph, self.table, self.unit = graph, table, "ms"
        _check_complete(graph, table)
        kinds = list(dict.fromkeys(op.kind for op in graph.ops))
        number_of = {kind: number for number, kind in enumerate(kinds)}
        self._largest = largest_widths(graph)
        grids = [table.grid(kind, *self._largest[kind]) for kind in kinds]
        self._lines_in_KA = _padded([grid.lines_in for grid in grids])
        self._lines_out_KB = _padded([grid.lines_out for grid in grids])
        rows, columns = self._lines_in_KA.shape[1], self._lines_out_KB.shape[1]
        missing = [(0, columns - grid.times_ms.shape[1], 0, rows - grid.times_ms.shape[0]) for grid in grids]
        times = [pad(grid.times_ms[None], lack, mode="replicate") for grid, lack in zip(grids, missing, strict=True)]
        self._times_KAB = torch.cat(times)
        self._kind_T = torch.tensor([number_of[op.kind] for op in graph.ops])
        self._in_TG = torch.stack([op.num_in for op in graph.ops])
        self._out_TG = torch.stack([op.num_out for op in graph.ops])
        self._is_layer_T = torch.tensor([op.kind.is_layer for op in graph.ops]).double()
        self._blocks = BlockMask(graph, [[op.block == block.name for block in graph.blocks] for op in graph.ops])
        self._steps_G = torch.tensor([float(max(SECANT_CHANNELS, step)) for step in self.hardware_steps().values()])
        self._full_G = full_widths(graph)
        self.calibration = self._calibrate(table.networks_of(graph))
        factors = self.calibration.scale_layers, self.calibration.scale_others, self.calibration.ms_per_call
        self._factors = torch.tensor(factors, dtype=torch.float64)
        _ = self.full  # computed now: no training step waits for it

    def of(self, widths: Tensor) -> Tensor:
        """Return the milliseconds; see CostModel.of."""
        move_to(widths, self, "_factors")
        return self._sums(widths) @ self._factors

    def relative_gradient(self, widths: Tensor) -> Tensor:
        """Return (G,) W_g: not the derivative but the secant over a hardware step below each width, over the full cost.

        A table's lines have kinks and its times are measured; a derivative would be 0 on every flat stretch.
        """
        widths = widths.detach()
        with torch.no_grad():
            move_to(widths, self, "_steps_G", "_full_G")
            low_G = (widths - self._steps_G).clamp(min=1)
            high_G = torch.minimum(low_G + self._steps_G, self._full_G)  # near one channel the step is above the width
            low_G, high_G = low_G.where(widths > 0, 0), high_G.where(widths > 0, 0)
            difference_G = self.of(_one_replaced(widths, high_G)) - self.of(_one_replaced(widths, low_G))
        return (difference_G / (high_G - low_G).clamp(min=1e-6)).clamp(min=0) / self.full

    def shares(self) -> dict[str, "GroupShare"]:
        """Return for each group what halving it alone saves."""
        macs, full_G = MacsCost(self.graph), full_widths(self.graph)
        halved_GG = _one_replaced(full_G, (full_G / 2).floor().clamp(min=1))
        return {
            group.name: GroupShare(macs=1 - float(macs.of(widths)) / macs.full, latency=1 - halved_ms / self.full)
            for group, widths, halved_ms in zip(self.graph.groups, halved_GG, self.of(halved_GG).tolist(), strict=True)
        }

    def hardware_steps(self) -> dict[str, int]:
        """Return for each group the channels by which it must shrink before its layers get faster: 1, 2, 4, ... or 64."""
        steps = {}
        for number, group in enumerate(self.graph.groups):
            writers = [op for op in self.graph.ops if op.kind.has_two_widths and float(op.num_out[number]) == 1]
            steps[group.name] = max(
                (self.table.hardware_step(op.kind, *self._largest[op.kind]) for op in writers), default=1
            )
        return steps

    # --- sums of calls ------------------------------------------------------------------------------------------------

    def _sums(self, widths: Tensor) -> Tensor:
        """Return (..., 3): milliseconds of layers, of all other calls, and the number of calls, for (..., G) widths."""
        move_to(
            widths, self, "_lines_in_KA", "_lines_out_KB", "_times_KAB", "_kind_T", "_in_TG", "_out_TG", "_is_layer_T"
        )
        extended = torch.cat([widths, widths.new_ones(*widths.shape[:-1], 1)], dim=-1)
        times_T = self._interpolated(extended @ self._in_TG.T, extended @ self._out_TG.T)
        alive_T = self._blocks.alive_T(widths)
        layers, others = times_T * alive_T * self._is_layer_T, times_T * alive_T * (1 - self._is_layer_T)
        return torch.stack([layers.sum(-1), others.sum(-1), alive_T.sum(-1)], dim=-1)

    def _interpolated(self, in_T: Tensor, out_T: Tensor) -> Tensor:
        """Return (..., T) milliseconds at (..., T) widths."""
        row_T, across_T = _place(in_T, self._lines_in_KA[self._kind_T])
        column_T, along_T = _place(out_T, self._lines_out_KB[self._kind_T])

        def corner(rows: int, columns: int) -> Tensor:
            return self._times_KAB[self._kind_T, row_T + rows, column_T + columns]

        low = corner(0, 0) + (corner(0, 1) - corner(0, 0)) * along_T
        high = corner(1, 0) + (corner(1, 1) - corner(1, 0)) * along_T
        return low + (high - low) * across_T

    # --- calibration --------------------------------------------------------------------------------------------------

    def _calibrate(self, networks: Sequence[NetworkTime]) -> Calibration:
        if not networks:
            return Calibration(1.0, 1.0, 0.0, 0, None, None)
        widths = [[network.widths[group.name] for group in self.graph.groups] for network in networks]
        sums = self._sums(torch.tensor(widths, dtype=torch.float64))
        times_ms = torch.tensor([network.median_ms for network in networks], dtype=torch.float64)
        factors = _fit(sums, times_ms)
        mean, p90 = None, None
        if len(networks) >= 3:
            errors = _errors_of_left_out(sums, times_ms)
            mean, p90 = float(errors.mean()), float(errors.quantile(0.9))
        scale_layers, scale_others, ms_per_call = factors.tolist()
        return Calibration(scale_layers, scale_others, ms_per_call, len(networks), mean, p90)


@dataclass(frozen=True)
class GroupShare:
    """What halving one group alone saves, as shares of the unpruned network."""

    macs: float
    latency: float
    """Negative where halving made the network slower."""

    @property
    def quotient(self) -> float:
        """The paper's multiplier: a group above 1 takes more time than its MACs say."""
        return self.latency / max(self.macs, 1e-12)


def _check_complete(graph: ChannelGraph, table: LatencyTable) -> None:
    for kind, (most_in, most_out) in largest_widths(graph).items():
        times = table.times.get(kind, {})
        has_in, has_out = (max((point[side] for point in times), default=0) for side in (0, 1))
        if has_in < most_in or has_out < most_out:
            module = next(op.module for op in graph.ops if op.kind == kind)
            found = f"only up to {has_in} to {has_out} channels" if times else "not at all"
            raise LatencyError(
                f"the table for {table.conditions.device} has {kind}, which {module!r} runs from {most_in} to {most_out} "
                f"channels, {found}; measure the table for this network"
            )


def _fit(sums_N3: Tensor, times_N: Tensor) -> Tensor:
    """Return the three factors of the calibration: least squares of the relative error, none negative, near (1, 1, 0).

    The prior also decides what few timings cannot: with one of them the factors hardly differ.
    """
    typical_ms = float(times_N.mean())
    call_ms = 0.01 * typical_ms / float(sums_N3[:, 2].mean())  # a hundredth of the time: the unit of the third factor
    scaled = sums_N3 * sums_N3.new_tensor([1.0, 1.0, call_ms])
    rows = torch.cat([scaled / times_N[:, None], PRIOR * torch.eye(3, dtype=torch.float64)])
    target = torch.cat([torch.ones_like(times_N), PRIOR * sums_N3.new_tensor([1.0, 1.0, 0.0])])
    best, least = sums_N3.new_tensor([1.0, 1.0, 0.0]), float("inf")
    for free in itertools.product((False, True), repeat=3):  # eight choices of what is zero: exact and short
        chosen = [position for position, is_free in enumerate(free) if is_free]
        if not chosen:
            continue
        factors = sums_N3.new_zeros(3)
        factors[chosen] = torch.linalg.lstsq(rows[:, chosen], target[:, None]).solution.squeeze(1)
        loss = float((rows @ factors - target).square().sum())
        if bool((factors >= 0).all()) and loss < least:
            best, least = factors, loss
    return best * best.new_tensor([1.0, 1.0, call_ms])


def _errors_of_left_out(sums_N3: Tensor, times_N: Tensor) -> Tensor:
    """Return (N,) the relative error of each time, predicted with factors fitted to all others."""
    errors = []
    for left_out in range(len(times_N)):
        rest = torch.arange(len(times_N)) != left_out
        predicted_ms = sums_N3[left_out] @ _fit(sums_N3[rest], times_N[rest])
        errors.append((predicted_ms / times_N[left_out] - 1).abs())
    return torch.stack(errors)


# --- grids of unequal size in one tensor ------------------------------------------------------------------------------


def _padded(lines: Sequence[Tensor]) -> Tensor:
    """Return (K, longest) lines; padding continues to rise, so that each has at least two lines and is searched alike."""
    longest = max(2, *(len(line) for line in lines))
    return torch.stack([torch.cat([line, line[-1] + torch.arange(1, longest - len(line) + 1)]) for line in lines])


def _place(width_T: Tensor, lines_TL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (..., T) interval of each width among its (T, L) lines, and the position of the width in it, in [0, 1]."""
    with torch.no_grad():
        beyond = width_T.detach().unsqueeze(-1) >= lines_TL[:, 1:-1]
        interval_T = beyond.sum(-1)
    low = lines_TL.expand(*width_T.shape, -1).gather(-1, interval_T.unsqueeze(-1)).squeeze(-1)
    high = lines_TL.expand(*width_T.shape, -1).gather(-1, interval_T.unsqueeze(-1) + 1).squeeze(-1)
    return interval_T, ((width_T - low) / (high - low)).clamp(0, 1)


def _one_replaced(widths_G: Tensor, others_G: Tensor) -> Tensor:
    """Return (G, G): in row g the widths, except that group g has its width of `others_G`."""
    return widths_G + torch.diag(others_G - widths_G)
