"""Checks before Ray starts: whether the target can be reached, a batch filled, and the network pruned exactly."""

import logging
import math
from collections.abc import Iterator

import torch

import gator
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.packages import ONNX_PACKAGES, missing_packages
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import ProfileConfig, TrialConfig
from orchestrator.datasets import splits as datasets
from orchestrator.errors import ConfigError
from orchestrator.models import networks as models
from orchestrator.training.loaders import check_batches
from orchestrator.trial.costs import TrialCosts

logger = logging.getLogger(__name__)
TARGETS = ("gating.target_ratio", "gating.target_ms")


def check_start(config: SearchConfig | TrialConfig, cluster: ClusterConfig) -> None:
    """Raise ConfigError for what no trial could train with on this cluster; workers check what depends on the images.

    Verifies that the network is pruned exactly, which takes seconds (models.verify).
    Raises: as check_targets does.
    """
    trial = config if isinstance(config, TrialConfig) else config.base
    for num_workers in {cluster.fewest_workers, cluster.workers_per_trial}:
        check_batches(trial.data, _most_left(trial), num_workers, is_elastic=cluster.is_elastic)
    check_runtime(trial.profile, cluster)
    if trial.profile.runtime == "onnxruntime" and trial.has_gates and trial.pruning.round_to == 1:
        logger.warning(
            "pruning.round_to is 1: with a number of channels that 4 does not divide, ONNX Runtime can be slower than with the whole "
            "network on a CPU; set pruning.round_to to 4, 8 or auto"
        )
    check_targets(config)
    if not trial.sees_smaller_images:  # that one keeps the whole network
        models.verify(trial.model, trial.data.image_size)


def check_runtime(profile: ProfileConfig, cluster: ClusterConfig) -> None:
    """Raise ConfigError where networks cannot be timed in profile.runtime on this cluster, as far as it is known here."""
    if profile.clock == "model":
        return
    if profile.runtime in ("cuda_graph", "tensorrt") and not cluster.gpus_to_measure:
        raise ConfigError(
            f"profile.runtime {profile.runtime} needs a GPU, but this cluster times networks on CPUs; set profile.runtime to eager, "
            "compile or onnxruntime, or give the cluster's resources_per_worker a GPU"
        )
    missing = missing_packages(ONNX_PACKAGES) if profile.runtime in ("onnxruntime", "tensorrt") else []
    if missing:
        raise ConfigError(
            f"profile.runtime {profile.runtime} needs {', '.join(missing)}; pip install {' '.join(missing)} on every node, or set "
            "profile.runtime to eager"
        )


def _most_left(trial: TrialConfig) -> int | None:
    """Return the images that there are to train on at most once some are held out; None where only the workers can count them.

    How many are held out of each class is rounded, so that as many as half of the classes may be missing from data.validation_share.
    """
    data, num_rounded = trial.data, trial.model.num_classes / 2
    enough = math.ceil((data.global_batch_size + num_rounded) / (1 - data.validation_share)) + 1
    num_images = datasets.num_train(data, enough=enough)
    if num_images is None:
        return None
    return num_images - max(1, math.ceil(data.validation_share * num_images - num_rounded))


def check_targets(config: SearchConfig | TrialConfig) -> None:
    """Raise ConfigError if the lowest target of any trial is below what can be reached, also in the steps of pruning.round_to.

    Traces the network, which takes about as long as a few training steps; where there is no target it does nothing.
    Raises: LatencyTableError for a latency table that is absent, damaged or of another network.
    """
    trial = config if isinstance(config, TrialConfig) else _with_lowest_target(config)
    gating = trial.gating
    if not trial.has_gates or (gating.target_ratio is None and gating.target_ms is None):
        return
    costs = TrialCosts(trial, models.trace_shapes(trial.model, trial.data.image_size, 2), torch.device("meta"))
    aim = costs.target()
    try:
        gator.GateLoss(costs.pressure(), target_ratio=gating.target_ratio, target=gating.target_ms, target_cost=aim)
    except gator.GateError as error:
        raise ConfigError(f"{trial.model.name} at {trial.data.image_size} px: {error}") from error
    step = costs.alignment()
    target, lowest = costs.target_value(), _narrowest_cost(aim, step)
    assert target is not None
    if target < lowest:
        raise ConfigError(
            f"{trial.model.name} at {trial.data.image_size} px: the target is {target / aim.full:.4g} of the full cost, but with "
            f"widths in steps of pruning.round_to ({trial.pruning.round_to}) {lowest / aim.full:.4g} remain at least; raise the target or "
            "lower pruning.round_to"
        )


def _with_lowest_target(config: SearchConfig) -> TrialConfig:
    """Return the config of a trial with the lowest target that the space allows, all else as in base."""
    trial = config.base
    for name in TARGETS:
        values = [value for value in _values(config, name) if isinstance(value, int | float)]
        if values:
            field = name.removeprefix("gating.")
            gating = trial.gating.model_copy(update={field: float(min(values))})
            trial = trial.model_copy(update={"gating": gating})
    return trial


def _values(config: SearchConfig, name: str) -> Iterator[object]:
    """Yield what a parameter can be: its domain's corners, or base's value where it is not searched, and the given points'."""
    domain = config.params.get(name)
    if domain is None:
        yield getattr(config.base.gating, name.removeprefix("gating."))
    else:
        yield from domain.corners()
    yield from (point[name] for point in config.search.points_to_evaluate if name in point)


def _narrowest_cost(cost: gator.CostModel, step: int | dict[str, int]) -> float:
    """Return the cost with one step of channels in each group that must keep any, and the removable blocks gone."""
    keep = {
        group.name: ()
        if group.block
        else range(min(group.num_channels, step if isinstance(step, int) else step[group.name]))
        for group in cost.graph.groups
    }
    return cost(gator.Architecture.from_keep(cost.graph, keep))
