"""The network that the trials start from: trained once for all of them, and measured as they are."""

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

import gator
from orchestrator import datasets, models
from orchestrator.assignment import Assignment
from orchestrator.clocks import Curve, make_clock, measure_latencies, take_curve
from orchestrator.cluster import ClusterConfig
from orchestrator.config import TrialConfig
from orchestrator.loop import Shard, evaluate
from orchestrator.models import build_traced
from orchestrator.paths import BasePaths, StoragePaths, write_atomic
from orchestrator.pretraining import save_base
from orchestrator.saver import Metrics
from orchestrator.timing import in_own_process, measuring_device
from orchestrator.trial import fit

logger = logging.getLogger(__name__)

BASE_RECORD = "base.json"
"""How the base network came about, for a person; this program reads it nowhere."""
BASE_RECORD_VERSION = 1


def ensure_base(config: TrialConfig, storage: StoragePaths, cluster: ClusterConfig) -> Path:
    """Return the weights that trials of this config start from; trains them if the storage does not hold them yet.

    They are shared by all searches with the same TrialConfig.base_hash(); of two that need them at once, one trains and
    the other waits.
    Raises: TrialError, UserError.
    """
    paths = storage.base(config.base_hash())
    paths.root.mkdir(parents=True, exist_ok=True)
    with _exclusive(paths.root / ".lock"):
        if not paths.weights.is_file():
            metrics = _make_base(config, paths, cluster)
            record = {"version": BASE_RECORD_VERSION, "config": config.model_dump(mode="json"), "metrics": metrics}
            write_atomic(paths.root / BASE_RECORD, json.dumps(record, indent=2))
    return paths.weights


def _make_base(config: TrialConfig, paths: BasePaths, cluster: ClusterConfig) -> Metrics:
    if config.pretraining.epochs == 0:
        save_base(models.build(config.model), paths)
        return {}
    return fit(
        Assignment(name="base", config=config, folder=paths.root.resolve(), base_weights=None), cluster, paths.ray
    )


def measure_unpruned(config: TrialConfig, base_weights: Path, cluster: ClusterConfig) -> tuple[Metrics, Curve | None]:
    """Return the row of results.parquet of the unpruned network, and the curve that trials estimate from which are measured apart.

    base_weights: from ensure_base. Call it while nothing trains.
    """
    row, curve_json = in_own_process(
        _measure_unpruned,
        config.model_dump_json(),
        str(base_weights.resolve()),
        measuring_device(cluster),
        cluster.measures_apart,
        profile=config.profile,
        cluster=cluster,
        num_gpus=cluster.gpus_to_measure,
    )
    return row, None if curve_json is None else Curve.from_json(curve_json)


def _measure_unpruned(
    config_json: str, base_weights: str, device_name: str, measures_apart: bool
) -> tuple[Metrics, str | None]:
    config, device = TrialConfig.model_validate_json(config_json), torch.device(device_name)
    splits = datasets.load(config.data, config.seed)
    network, graph = build_traced(config.model, splits.input_shape)
    network.load_state_dict(load_file(base_weights))
    network.to(device)
    macs, full = gator.MacsCost(graph), gator.Architecture.full(graph)
    accuracy = evaluate(network, splits.val, batch_size=config.evaluation.batch_size, shard=Shard(device=device))
    clock = make_clock(config, splits.input_shape, macs, device, curve=None)
    row = {
        "trial_id": "unpruned",
        "kind": "unpruned",
        "status": "finished",
        **vars(accuracy),
        **measure_latencies(clock, network, full, config.profile),
        "macs": round(macs.full),
        "macs_ratio": 1.0,
        "params": round(gator.ParamsCost(graph).full),
    }
    if config.profile.clock == "model" or not measures_apart:
        return row, None
    return row, take_curve(network, graph, config.profile).to_json()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file; waits for another process that holds it. The kernel lets go of it when the process dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waits for another search that trains the same base network (%s)", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
