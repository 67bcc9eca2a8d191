"""One trial as Ray Tune sees it: a light driver around one Ray Train run with all stages; and what trials start from.

A Train run is found again by its name and folder, which follow from the trial's id: called again with the same config,
run_trial goes on where the last checkpoint stands, and a trial that is done reports its final metrics without training.
"""

import fcntl
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.train import Checkpoint as RayCheckpoint
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from safetensors.torch import load_file

import gator
from orchestrator import datasets, models
from orchestrator.cluster import TRIAL_DRIVER_CPU, ClusterConfig
from orchestrator.config import TrialConfig
from orchestrator.errors import OrchestratorError, TrialError, UserError
from orchestrator.loop import Shard, evaluate
from orchestrator.measure import build_traced, make_clock, measure_latencies
from orchestrator.paths import BasePaths, RunPaths, StoragePaths, TrialPaths, write_atomic
from orchestrator.worker import Assignment, Metrics, save_base, train_loop_per_worker

logger = logging.getLogger(__name__)

# A trial's driver only waits for its workers. Tune refuses 0 CPU; with the default of 1 the drivers would hold the CPUs
# that their own workers wait for.
TRIAL_DRIVER_RESOURCES = {"CPU": TRIAL_DRIVER_CPU, "node:__internal_head__": 0.001}
# How often workers that died (a lost node, memory) are started again from the last checkpoint.
MAX_WORKER_FAILURES = 2
BASE_RECORD = "base.json"


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """What run_trial needs to know, as the plain dict that Tune passes on."""

    trial_id: str
    config: TrialConfig
    run: RunPaths
    base_weights: Path
    """From ensure_base."""
    cluster: ClusterConfig

    def to_dict(self) -> dict[str, str]:
        """Return plain strings, the paths absolute: trials run in another working directory."""
        return {
            "trial_id": self.trial_id,
            "trial_config": self.config.model_dump_json(),
            "run_dir": str(self.run.root.resolve()),
            "base_weights": str(self.base_weights.resolve()),
            "cluster": self.cluster.model_dump_json(),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, str]) -> "TrialRequest":
        """Read what to_dict returned."""
        return cls(
            trial_id=plain["trial_id"],
            config=TrialConfig.model_validate_json(plain["trial_config"]),
            run=RunPaths(Path(plain["run_dir"])),
            base_weights=Path(plain["base_weights"]),
            cluster=ClusterConfig.model_validate_json(plain["cluster"]),
        )


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial: a Tune function trainable. config: TrialRequest.to_dict().

    Reports to Tune the metrics of every epoch and, exactly once, the final ones (final=True), also when the trial was
    done before. Raises: TrialError, UserError.
    """
    request = TrialRequest.from_dict(config)
    tune.report(train_trial(request, callbacks=[EpochsToTune()]))


def train_trial(request: TrialRequest, callbacks: Sequence[UserCallback] = ()) -> Metrics:
    """Run all stages of a trial that are not complete yet, and return its final metrics; needs Ray, but no Tune.

    Raises: TrialError, UserError.
    """
    assignment = Assignment(
        name=request.trial_id,
        config=request.config,
        folder=request.run.trial(request.trial_id).root,
        base_weights=request.base_weights,
    )
    return _fit(assignment, request.cluster, request.run.ray / "train", callbacks)


class EpochsToTune(TuneReportCallback):
    """Passes each epoch's metrics from Train to Tune; not the final ones, which a run that was done would not send."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: RayCheckpoint | None) -> None:
        """Called by Train's controller after every rank has reported; rank 0's metrics count."""
        if not metrics[0].get("final"):
            super().after_report(run_context, metrics, checkpoint)


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
            write_atomic(
                paths.root / BASE_RECORD,
                json.dumps({"config": config.model_dump(mode="json"), "metrics": metrics}, indent=2),
            )
    return paths.weights


def _make_base(config: TrialConfig, paths: BasePaths, cluster: ClusterConfig) -> Metrics:
    if config.pretraining.epochs == 0:
        save_base(models.build(config.model), paths)
        return {}
    return _fit(
        Assignment(name="base", config=config, folder=paths.root.resolve(), base_weights=None), cluster, paths.ray
    )


def unpruned_row(config: TrialConfig, base_weights: Path, cluster: ClusterConfig) -> dict[str, Any]:
    """Return the row of results.parquet of the unpruned network, taken as the trials' are.

    base_weights: from ensure_base. On CPU with profile.clock "wall" the probe must be running (measure.start_probe).
    Works on a GPU of the cluster where the workers have GPUs, and in this process elsewhere.
    """
    num_gpus = cluster.resources_per_worker.get("GPU", 0)
    if num_gpus:
        return ray.get(
            ray.remote(num_gpus=num_gpus)(_measure_unpruned).remote(config.model_dump_json(), str(base_weights), "cuda")
        )
    return _measure_unpruned(config.model_dump_json(), str(base_weights), "cpu")


def _measure_unpruned(config_json: str, base_weights: str, device_name: str) -> dict[str, Any]:
    config, device = TrialConfig.model_validate_json(config_json), torch.device(device_name)
    splits = datasets.load(config.data, config.seed)
    network, graph = build_traced(config.model, splits.input_shape)
    network.load_state_dict(load_file(base_weights))
    network.to(device)
    macs, full = gator.MacsCost(graph), gator.Architecture.full(graph)
    accuracy = evaluate(network, splits.val, batch_size=config.evaluation.batch_size, shard=Shard(device=device))
    clock = make_clock(config, splits.input_shape, macs, device)
    return {
        "trial_id": "unpruned",
        "kind": "unpruned",
        "status": "finished",
        **vars(accuracy),
        **measure_latencies(clock, network, full, config.profile),
        "macs": round(macs.full),
        "macs_ratio": 1.0,
        "params": round(gator.ParamsCost(graph).full),
    }


def _fit(
    assignment: Assignment, cluster: ClusterConfig, train_folder: Path, callbacks: Sequence[UserCallback] = ()
) -> Metrics:
    """Run the assignment as the Train run <train_folder>/<name>, or go on with it; return what rank 0 returned."""
    config_file = TrialPaths(assignment.folder).config
    if not config_file.exists():
        write_atomic(config_file, assignment.config.to_json())
    use_gpu = cluster.resources_per_worker.get("GPU", 0) > 0
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config=assignment.to_dict(),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers_per_trial,
            use_gpu=use_gpu,
            resources_per_worker=dict(cluster.resources_per_worker),
        ),
        run_config=RunConfig(
            name=assignment.name,
            storage_path=str(train_folder.resolve()),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _first_cause(error, assignment.name) from error
    if "error" in outcome:
        raise (UserError if outcome["is_user_error"] else TrialError)(outcome["error"])
    return outcome


def _first_cause(error: TrainingFailedError, name: str) -> OrchestratorError:
    """Return our own error of the lowest rank that raised one, else a TrialError that tells how the workers ended."""
    failures = (
        [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
        if isinstance(error, WorkerGroupError)
        else []
    )
    ours = [failure for failure in failures if isinstance(failure, OrchestratorError)]
    if ours:
        return ours[0]
    cause = failures[0] if failures else error
    return TrialError(
        f"{name}: its workers failed {MAX_WORKER_FAILURES + 1} times, the last time by {type(cause).__name__}: {cause}"
    )


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
