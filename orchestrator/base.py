"""The network that the trials start from: trained once for all of them, and measured as they are."""

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import gator
from gator.weights import load_weights
from orchestrator import datasets, models
from orchestrator.assignment import Assignment
from orchestrator.clocks import Curve, make_clock, measure_latencies, take_curve
from orchestrator.cluster import ClusterConfig
from orchestrator.config import TrialConfig
from orchestrator.loop import Shard, evaluate
from orchestrator.models import build_traced
from orchestrator.paths import BasePaths, StoragePaths, open_lock, remove_leftovers, write_atomic
from orchestrator.pretraining import save_base
from orchestrator.saver import Metrics
from orchestrator.timing import in_own_process, measuring_device
from orchestrator.trial import fit

logger = logging.getLogger(__name__)

BASE_RECORD = "base.json"
"""How the base network came about, for a person; this program reads it nowhere."""
BASE_RECORD_VERSION = 1


def ensure_base(
    config: TrialConfig, storage: StoragePaths, cluster: ClusterConfig, stop_files: list[Path] | None = None
) -> Path:
    """Return the weights that trials of this config start from; trains them if the storage does not hold them yet.

    They are shared by all searches with the same TrialConfig.base_hash(); of two that need them at once, one trains and
    the other waits. Damaged weights are made again.
    stop_files: gets the network's stop file before its training begins, if it does in this process.
    Raises: TrialError, UserError; RunDirError if a file of it leads elsewhere.
    """
    paths = storage.base(config.base_hash())
    paths.root.mkdir(parents=True, exist_ok=True)
    with _exclusive(paths.root / ".lock"):
        paths.refuse_links()
        remove_leftovers(paths.root)
        if not _is_there(paths.weights):
            paths.stop.unlink(missing_ok=True)  # of whoever was interrupted
            if stop_files is not None:
                stop_files.append(paths.stop)
            metrics = _make_base(config, paths, cluster)
            record = {"version": BASE_RECORD_VERSION, "config": config.model_dump(mode="json"), "metrics": metrics}
            write_atomic(paths.root / BASE_RECORD, json.dumps(record, indent=2))
    return paths.weights


def _is_there(weights: Path) -> bool:
    """Return whether the base network is there as it was written."""
    if not weights.is_file():
        return False
    try:
        load_weights(weights)
    except gator.ArtifactError as error:
        logger.warning("the base network is made again: %s", error)
        return False
    return True


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
    models.load_base(network, Path(base_weights))
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
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waits for another search that trains the same base network (%s)", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
