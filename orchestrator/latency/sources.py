"""Where the latency of a pruned network comes from: one interface, three sources.

ComputedLatency   MACs over a constant number of MACs per millisecond. For runs that must give the same numbers twice.
PredictedLatency  for networks that are timed apart from their trials: predicted by the latency table, if there is one, or by
                  a curve over MACs that was measured before the first trial.
TimedLatency      times the network on the device that holds it. On a GPU the worker does so where it trained, while the
                  other ranks wait.

Networks are timed apart on CPUs, which trials share (timing.py has the reason), and on the nodes that a cluster reserves for
measurements. After the last trial all finished networks are timed there in turns: remeasure.py.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

import gator
from gator.graph.architecture import Architecture
from orchestrator.config.trial import ProfileConfig, TrialConfig
from orchestrator.latency.curve import Curve
from orchestrator.latency.record import Latency, latency_columns, measured_latency
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.timing import NUM_REPEATS_OF_ESTIMATE, device_lock, time_calmly

MACS_PER_MS = 1e7
"""Speed of the device that ComputedLatency assumes."""


class LatencySource(ABC):
    """Gives the latency of a pruned network."""

    @abstractmethod
    def measure(self, network: nn.Module, architecture: Architecture, *, batch_size: int, num_repeats: int) -> Latency:
        """Return the latency of `network`, which is the trial's model pruned to `architecture`."""

    def estimate(self, network: nn.Module, architecture: Architecture, *, batch_size: int) -> Latency:
        """Return a latency by which a scheduler may compare unfinished networks: that of a few repeats."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=NUM_REPEATS_OF_ESTIMATE)


class ComputedLatency(LatencySource):
    """Latency computed from the MACs: exact and repeatable, but of no real device."""

    def __init__(self, macs: gator.MacsCost) -> None:
        self._macs = macs

    def measure(self, network: nn.Module, architecture: Architecture, *, batch_size: int, num_repeats: int) -> Latency:
        """Return the MACs of the batch over MACS_PER_MS, without spread."""
        latency_ms = self._macs(architecture) * batch_size / MACS_PER_MS
        return Latency(median_ms=latency_ms, p10_ms=latency_ms, p90_ms=latency_ms, device="model")


class TimedLatency(LatencySource):
    """Latency on the device that holds the network, in this process."""

    def __init__(self, input_shape: tuple[int, ...], profile: ProfileConfig) -> None:
        self._input_shape = input_shape
        self._profile = profile

    def measure(self, network: nn.Module, architecture: Architecture, *, batch_size: int, num_repeats: int) -> Latency:
        """Time the network itself."""
        device = next(network.parameters()).device
        timer = Timing.on(device, self._profile).timer(network, self._input_shape, batch_size)
        with device_lock(device):
            measured = time_calmly(timer, num_repeats)
        return measured_latency(measured, noisy=measured.is_noisy, file_sha256=timer.file_sha256)


class PredictedLatency(LatencySource):
    """Latency by a prediction: the same for all trials, whatever else runs on the machine.

    table: predicts for its batch size instead of the curve, which depends on the MACs alone.
    """

    def __init__(self, curve: Curve, macs: gator.MacsCost, table: gator.LatencyCost | None = None) -> None:
        self._curve = curve
        self._macs = macs
        self._table = table

    def measure(self, network: nn.Module, architecture: Architecture, *, batch_size: int, num_repeats: int) -> Latency:
        """Return the milliseconds of the architecture by the table, or of its MACs by the curve; remeasure.py measures later."""
        if self._table is not None and self._table.table.conditions.batch_size == batch_size:
            return Latency(median_ms=self._table(architecture))
        return Latency(median_ms=self._curve.at(self._macs(architecture), batch_size))


def make_source(
    config: TrialConfig,
    input_shape: tuple[int, ...],
    macs: gator.MacsCost,
    curve: Curve | None,
    table: gator.LatencyCost | None = None,
) -> LatencySource:
    """Return the latency source of a trial's networks, as profile.clock and the place of the timing decide.

    curve: for networks that are timed apart from their trials, else None.    table: a cost of the device they are timed on.
    """
    if config.profile.clock == "model":
        return ComputedLatency(macs)
    if curve is not None:
        return PredictedLatency(curve, macs, table)
    return TimedLatency(input_shape, config.profile)


def measure_latencies(
    source: LatencySource, network: nn.Module, architecture: Architecture, profile: ProfileConfig
) -> dict[str, Any]:
    """Return the latency columns of results.parquet: the first batch size with its conditions, others with their spread."""
    return latency_columns(
        {
            size: source.measure(network, architecture, batch_size=size, num_repeats=profile.num_repeats)
            for size in profile.batch_sizes
        }
    )
