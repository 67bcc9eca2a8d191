"""One trial as Ray Tune sees it: a light driver around one Ray Train run with all stages.

A Train run is found again by its name and folder, which follow from the trial's id: called again with the same config,
run_trial goes on where the last checkpoint stands, and a trial that is done reports its final metrics without training.
"""

import os
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.assignment import BEST_BY, Assignment
from orchestrator.cluster import TRIAL_DRIVER_CPU, ClusterConfig
from orchestrator.config import TrialConfig
from orchestrator.errors import OrchestratorError, OutOfMemoryError, TrialError, UserError
from orchestrator.paths import RunPaths, TrialPaths, wait_until_reachable, write_atomic
from orchestrator.records import read_metrics
from orchestrator.threads import run_in_thread

Metrics = dict[str, Any]
Trainable = Callable[[dict[str, Any]], None]

# A trial's driver only waits for its workers. Tune refuses 0 CPU; with the default of 1 the drivers would hold the CPUs
# that their own workers wait for.
TRIAL_DRIVER_RESOURCES = {"CPU": TRIAL_DRIVER_CPU, "node:__internal_head__": 0.001}
# How often workers that died (a lost node, memory) are started again from one and the same checkpoint. What a node's notice
# led to is not counted.
MAX_WORKER_FAILURES = 2
POLL_S = 0.5
TRAIN_FOLDER = "train"
"""In the run's folder of Ray's own state: a folder for each trial, with its checkpoints."""


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
            "cluster": self.cluster.model_dump_json(exclude={"mlflow_uri", "env_vars"}),  # Tune writes it to disk
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


def run_or_report(config: dict[str, Any], run: Trainable | None = None) -> None:
    """Run one trial: a Tune function trainable. run: run_trial, unless another is given.

    What the trial itself found wrong is reported, not raised: Tune tries again whatever is raised, and a NaN loss would
    come again. What is left to raise is a bug or a driver that died.
    """
    try:
        if "error" in config:
            raise OrchestratorError(config["error"])
        (run or run_trial)(config)
    except OrchestratorError as error:
        tune.report({"error": str(error), "final": True})


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial: a Tune function trainable. config: TrialRequest.to_dict().

    Reports to Tune the metrics of every epoch and, exactly once, the final ones (final=True), also when the trial was
    done before. Raises: TrialError, UserError.
    """
    request = TrialRequest.from_dict(config)
    epochs = NewEpochs(request.run.trial(request.trial_id).metrics)
    training = run_in_thread(lambda: train_trial(request), request.trial_id)
    while not wait([training], timeout=POLL_S).done:
        _report(epochs)
    _report(epochs)
    tune.report(training.result())


def _report(epochs: "NewEpochs") -> None:
    for metrics in epochs.read():
        tune.report(metrics)


class NewEpochs:
    """Reads each epoch of metrics.parquet once, except the final row.

    Those that were there before this driver are read too: the one before may have died with the last untold. The scheduler
    and MLflow pass over what they have heard.

    Ray's own way from Train to Tune, TuneReportCallback, starts a process per trial that takes 2.6 CPU seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: set[tuple[int, int]] = set()

    def read(self) -> list[Metrics]:
        """Return the epochs since the last call, without the metrics that they do not have."""
        rows = [row for row in self._rows() if _identity(row) not in self._seen and not row["final"]]
        self._seen |= {_identity(row) for row in rows}
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def _rows(self) -> list[Metrics]:
        return read_metrics(self._path) if self._path.exists() else []


def _identity(row: Metrics) -> tuple[int, int]:
    """Return what tells reports apart: an epoch that is run again has another time; the time alone may stand still."""
    return row["epoch"], row["timestamp_ms"]


def train_trial(request: TrialRequest) -> Metrics:
    """Run all stages of a trial that are not complete yet, and return its final metrics; needs Ray, but no Tune.

    Raises: TrialError, UserError; StorageError if the storage is away for too long.
    """
    wait_until_reachable(request.base_weights)  # else the trial's folder would be made anew under the mount point
    assignment = Assignment(
        name=request.trial_id,
        config=request.config,
        folder=request.run.trial(request.trial_id).root,
        base_weights=request.base_weights,
        latency_curve=request.run.latency_curve if request.run.latency_curve.exists() else None,
    )
    return fit(assignment, request.cluster, request.run.ray / TRAIN_FOLDER)


def fit(assignment: Assignment, cluster: ClusterConfig, train_folder: Path) -> Metrics:
    """Run the assignment as the Train run <train_folder>/<name>, or go on with it; return what rank 0 returned.

    Workers that were lost are started again from the last checkpoint, here and not by Ray Train, which would count over the whole
    run: of a training of days on machines that vanish, the third loss would be the last.
    """
    config_file, saved = TrialPaths(assignment.folder).config, train_folder / assignment.name
    if not config_file.exists():
        write_atomic(config_file, assignment.config.to_json())
    num_failures = 0  # since the last new checkpoint
    while True:
        checkpoints = _checkpoints(saved)
        try:
            return _metrics(_trainer(assignment, cluster, train_folder).fit().return_value, assignment.name)
        except TrainingFailedError as error:
            was_away = not os.path.isfile(config_file)
            wait_until_reachable(config_file)
            assignment = replace(assignment, is_again=True)
            if was_away and isinstance(error, ControllerError):
                continue  # it writes to the storage as well, behind our workers, who wait, and gives up at once
            num_failures = 1 if _has_new(saved, checkpoints) else num_failures + 1
            if num_failures > MAX_WORKER_FAILURES or not _may_pass(error):
                raise _first_cause(error, assignment.name) from error


def _trainer(assignment: Assignment, cluster: ClusterConfig, train_folder: Path) -> TorchTrainer:
    use_gpu = cluster.resources_per_worker.get("GPU", 0) > 0
    return TorchTrainer(
        _work,
        train_loop_config=replace(assignment, is_elastic=cluster.is_elastic).to_dict(),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(cluster.fewest_workers, cluster.workers_per_trial)
            if cluster.is_elastic
            else cluster.workers_per_trial,
            use_gpu=use_gpu,
            resources_per_worker=dict(cluster.resources_per_worker),
        ),
        run_config=RunConfig(
            name=assignment.name,
            storage_path=str(train_folder.resolve()),
            failure_config=FailureConfig(max_failures=0),  # fit counts; a node that was told to go is no failure
            # the best one; Ray Train keeps the last one besides
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=BEST_BY),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _metrics(outcome: dict[str, Any], name: str) -> Metrics:
    """Return what rank 0 returned. Raises: TrialError, UserError if that says what all ranks have met alike."""
    if "stopped" in outcome:
        raise TrialError(f"{name}: stopped as asked, and saved")
    if "error" in outcome:
        raise (UserError if outcome["is_user_error"] else TrialError)(outcome["error"])
    return outcome


def _work(assignment: dict[str, Any]) -> Metrics:
    """What each Train worker calls. The import is here because it takes seconds that the trial's driver has no use for."""
    from orchestrator.worker import train_loop_per_worker

    return train_loop_per_worker(assignment)


def _checkpoints(train_run: Path) -> set[str]:
    """Return the names of a Train run's checkpoints, which have the time in them; not all of them need be whole."""
    return {path.name for path in train_run.glob("checkpoint_*")}


def _has_new(train_run: Path, earlier: set[str]) -> bool:
    """Return whether there is a whole checkpoint beside the earlier ones; on a full disk each attempt leaves a part of one."""
    from orchestrator.checkpoint import is_whole  # late: torch takes seconds, and few drivers come here

    return any(is_whole(train_run / name) for name in _checkpoints(train_run) - earlier)


def _may_pass(error: TrainingFailedError) -> bool:
    """Return whether other workers may do better: some were lost, or a device was full, as others may have held the memory."""
    return isinstance(error, WorkerGroupError) and all(isinstance(told, OutOfMemoryError) for told in _told(error))


def _told(error: TrainingFailedError) -> list[OrchestratorError]:
    """Return the errors of ours that workers ended with, the lowest rank's first."""
    if not isinstance(error, WorkerGroupError):
        return []
    failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    return [failure for failure in failures if isinstance(failure, OrchestratorError)]


def _first_cause(error: TrainingFailedError, name: str) -> OrchestratorError:
    """Return our own error of the lowest rank that raised one, else a TrialError that tells how the workers ended."""
    if told := _told(error):
        return told[0]
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    cause = failures[min(failures)] if failures else error
    return TrialError(
        f"{name}: its workers failed {MAX_WORKER_FAILURES + 1} times, the last time by {type(cause).__name__}: {cause}"
    )
