"""The cost models of a trial: of its gates' loss and of its target; and the steps that its widths are aligned to."""

import logging
from functools import cached_property
from pathlib import Path

import torch

import gator
from gator.costs.counted import COUNTED
from gator.latency.forward import device_name
from gator.latency.measurement import Conditions
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import LatencyTableError
from orchestrator.latency.runtimes import Timing
from orchestrator.latency.tables import read_table
from orchestrator.models.networks import build_traced

logger = logging.getLogger(__name__)


def size_metrics(graph: gator.ChannelGraph, architecture: gator.Architecture, unpruned_macs: float) -> dict[str, float]:
    """Return the metrics of a network's size; a new one goes here. unpruned_macs: what macs_ratio is a share of."""
    macs = gator.MacsCost(graph)(architecture)
    return {
        "macs": round(macs),
        "macs_ratio": float(macs / unpruned_macs),
        "params": round(gator.ParamsCost(graph)(architecture)),
    }


class TrialCosts:
    """The cost models that a trial's config asks for, over one traced network.

    Raises: LatencyTableError, where the latency table is read, if it is not one for this network.
    """

    def __init__(self, config: TrialConfig, graph: gator.ChannelGraph, device: torch.device) -> None:
        self.config = config
        self.graph = graph
        self.device = device
        self.macs = gator.MacsCost(graph)
        self.unpruned_macs = self._unpruned_macs()

    def pressure(self) -> gator.CostModel:
        """Return the mixture that gating.cost asks for; with a target in milliseconds the latency itself."""
        weights = self.config.gating.cost
        if self.config.gating.target_ms is not None:
            return self._latency_cost
        parts: dict[gator.CostModel, float] = {
            cost(self.graph): getattr(weights, name) for name, cost in COUNTED.items()
        }
        if weights.latency > 0:
            parts[self._latency_cost] = weights.latency
        return gator.MixedCost(parts)

    def target(self) -> gator.CostModel:
        """Return what the target is a target of."""
        return self.macs if self.config.gating.target_of == "macs" else self.pressure()

    def target_value(self) -> float | None:
        """Return where target() is to end, in its unit; None where the gates have no target."""
        gating = self.config.gating
        if gating.target_ms is not None:
            return gating.target_ms
        return None if gating.target_ratio is None else gating.target_ratio * self.target().full

    def timed_here(self) -> gator.LatencyCost | None:
        """Return the cost of a latency table that holds for the device networks are timed on; None if there is none.

        Raises: LatencyTableError.
        """
        profile = self.config.profile
        is_here = profile.latency_table is not None and profile.table_device is None
        return self._latency_cost if is_here and self.config.has_gates else None

    @cached_property
    def _latency_cost(self) -> gator.LatencyCost:
        """The cost of profile.latency_table. Raises: LatencyTableError if the table is not one for this network."""
        profile = self.config.profile
        assert profile.latency_table is not None
        table = read_table(Path(profile.latency_table))
        self._check_table(table.conditions)
        round_to = self.config.pruning.round_to
        if round_to != "auto" and round_to % table.width_step:
            raise LatencyTableError(
                f"{profile.latency_table} holds for multiples of {table.width_step} channels, but pruning.round_to is {round_to}, and "
                f"other widths are several times slower in ONNX Runtime; set pruning.round_to to {table.width_step} or auto"
            )
        try:
            cost = gator.LatencyCost(self.graph, table)
        except gator.LatencyError as error:
            raise LatencyTableError(f"{profile.latency_table}: {error}, with `orchestrator measure`") from error
        logger.info("%s: %.4g ms unpruned, %s", table.conditions.device, cost.full, cost.calibration)
        return cost

    def _check_table(self, found: Conditions) -> None:
        """Raise LatencyTableError, naming both, unless a table holds for what the config asks for: see profile.table_device.

        On the meta device, which stands for an unknown one, neither the device's name nor what goes by it is compared.
        """
        profile, is_unknown = self.config.profile, self.device.type == "meta"
        if found.batch_size != profile.batch_sizes[0]:
            raise LatencyTableError(
                f"{profile.latency_table} holds for batch size {found.batch_size}, profile.batch_sizes begins "
                f"with {profile.batch_sizes[0]}; measure a table for that size, or put the table's first"
            )
        expected: dict[str, object] = {"device": profile.table_device}
        if profile.table_device is None:
            timing = Timing.on(self.device, profile)
            names = ("runtime", "dtype", "layout", "num_threads")
            expected = {
                name: getattr(timing, name) for name in names if getattr(profile, name) != "auto" or not is_unknown
            }
            if not is_unknown:
                expected["device"] = device_name(self.device)
        different = [
            f"{name} {getattr(found, name)}, expected {value}"
            for name, value in expected.items()
            if getattr(found, name) != value
        ]
        if different:
            raise LatencyTableError(
                f"{profile.latency_table} holds for {'; '.join(different)}; measure a table for what networks are timed on here, or "
                f'set profile.table_device to "{found.device}" to prune for that device'
            )

    def alignment(self) -> int | dict[str, int]:
        """Return what widths are to be multiples of; with auto each group's own step where a latency table has it."""
        step = self.config.pruning.round_to
        if step != "auto":
            return step
        if self.config.profile.latency_table is not None:
            return self._latency_cost.hardware_steps()
        return gator.hardware_step(self.device)

    def _unpruned_macs(self) -> float:
        """Return what macs_ratio is a share of: the whole network's MACs at data.image_size."""
        if not self.config.sees_smaller_images:
            return self.macs.full
        size = self.config.data.image_size
        return build_traced(self.config.model, (3, size, size))[1].full_macs
