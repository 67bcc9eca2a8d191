"""One Ray Train run with all stages of a trial, started again when workers are lost.

A Train run is found again by its name and folder, which follow from the trial's id: called again, fit resumes from the last
checkpoint, and a trial that is done returns its final metrics without training.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError
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

from orchestrator.cluster.waiting import reported_while_waiting
from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import (
    ClusterError,
    OrchestratorError,
    OutOfMemoryError,
    TrialError,
    UserError,
)
from orchestrator.storage.files import num_bytes, wait_until_reachable
from orchestrator.storage.paths import CHECKPOINTS, TRAIN_RECORD, TrialPaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import is_whole, readable_states
from orchestrator.trial.assignment import BEST_BY, Assignment

logger = logging.getLogger(__name__)
# How often workers that died (a lost node, memory) are started again from one and the same checkpoint. Nodes that leave after
# a notice are not counted.
MAX_WORKER_FAILURES = 2


def fit(assignment: Assignment, cluster: ClusterConfig, train_folder: Path) -> EpochMetrics:
    """Run the assignment as the Train run <train_folder>/<name>, or resume it; return what rank 0 returned.

    Workers that were lost are started again from the last checkpoint, here and not by Ray Train, which would count over the whole
    run: of a training of days on machines that vanish, the third loss would be the last.
    """
    config_file, saved = TrialPaths(assignment.folder).config, train_folder / assignment.name
    num_failures = 0  # since the last new checkpoint
    while True:
        checkpoints = _checkpoints(saved)
        assignment = replace(assignment, resume_from=_unrecorded_checkpoint(saved))
        try:
            return _metrics(_trainer(assignment, cluster, train_folder).fit().return_value, assignment.name)
        except ActorDiedError as error:  # Ray Train's controller, before any worker
            if "CheckpointManagerInitializationError" not in str(error):
                raise
            os.replace(saved / TRAIN_RECORD, saved / f"{TRAIN_RECORD}.unreadable")
        except TrainingFailedError as error:
            was_away = not os.path.isfile(config_file)
            wait_until_reachable(config_file)
            assignment = replace(assignment, is_again=True)
            if was_away and isinstance(error, ControllerError):
                continue  # the controller writes to the storage as well, and gives up at once where the workers wait
            num_failures = 1 if _has_new(saved, checkpoints) else num_failures + 1
            if num_failures > MAX_WORKER_FAILURES or not _may_pass(error):
                raise _first_cause(error, assignment.name) from error


def fit_here(assignment: Assignment, cluster: ClusterConfig, train_folder: Path) -> EpochMetrics:
    """Do what fit does, in the command's own process, and log it when the workers wait for nodes; Tune's listener does so for trials."""
    log = TrialPaths(assignment.folder).log
    before = num_bytes(log)
    name = "the base network" if assignment.base_weights is None else assignment.name
    with reported_while_waiting(name, cluster, lambda: num_bytes(log) != before, logger.info):
        return fit(assignment, cluster, train_folder)


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
            label_selector=dict(cluster.worker_labels) or None,
        ),
        run_config=RunConfig(
            name=assignment.name,
            storage_path=str(train_folder.resolve()),
            failure_config=FailureConfig(
                max_failures=0
            ),  # fit counts; a node that leaves after a notice is not a failure
            # the best one; Ray Train also keeps the last one
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=BEST_BY),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _metrics(outcome: dict[str, Any], name: str) -> EpochMetrics:
    """Return what rank 0 returned. Raises: TrialError, UserError if that is an error that all ranks have met."""
    if "stopped" in outcome:
        raise TrialError(f"{name}: stopped on request, and saved")
    if "error" in outcome:
        raise (UserError if outcome["is_user_error"] else TrialError)(outcome["error"])
    return outcome


def _work(assignment: dict[str, Any]) -> EpochMetrics:
    """Run on each Train worker. The import is late because it takes seconds, and the trial's driver does not need it."""
    from orchestrator.trial.worker import train_loop_per_worker

    return train_loop_per_worker(assignment)


def _checkpoints(train_run: Path) -> set[str]:
    """Return the names of a Train run's checkpoints, which contain the time; some may be incomplete."""
    return {path.name for path in train_run.glob(CHECKPOINTS)}


def _unrecorded_checkpoint(train_run: Path) -> Path | None:
    """Return the newest complete checkpoint of a Train run without Ray Train's record of it; None where there is a record.

    The record is missing if another minor version of Ray wrote it, if it was damaged, or if the run was killed before the first.
    """
    if (train_run / TRAIN_RECORD).exists():
        return None
    return max((path for path in train_run.glob(CHECKPOINTS) if is_whole(path)), default=None)


def _has_new(train_run: Path, earlier: set[str]) -> bool:
    """Return whether there is a new complete checkpoint; on a full disk each attempt leaves a part of one."""
    return any(is_whole(train_run / name) for name in _checkpoints(train_run) - earlier)


def _may_pass(error: TrainingFailedError) -> bool:
    """Return whether other workers may succeed: some were lost, or a device was full, perhaps with the memory of others."""
    return isinstance(error, WorkerGroupError) and all(isinstance(one, OutOfMemoryError) for one in _errors_of(error))


def _errors_of(error: TrainingFailedError) -> list[OrchestratorError]:
    """Return the OrchestratorErrors that workers ended with, the lowest rank's first."""
    if not isinstance(error, WorkerGroupError):
        return []
    failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
    return [failure for failure in failures if isinstance(failure, OrchestratorError)]


def _first_cause(error: TrainingFailedError, name: str) -> OrchestratorError:
    """Return the OrchestratorError of the lowest rank that raised one, else a TrialError with how the workers ended."""
    if errors := _errors_of(error):
        return errors[0]
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    cause = failures[min(failures)] if failures else error
    return TrialError(
        f"{name}: its workers failed {MAX_WORKER_FAILURES + 1} times, the last time by {type(cause).__name__}: {cause}"
    )


def check_world_size(train_folder: Path, world_size: int) -> None:
    """Raise ClusterError if a trial under way, one with a checkpoint in Ray Train's folder, has another number of workers.

    Called before anything starts, so that no trial fails and all can be resumed once the number is set back.
    """
    for trial in sorted(train_folder.glob("*/")):
        states = list(readable_states(trial))
        if any(state["stage"] == "done" for state in states):
            continue
        for state in states:
            if state["world_size"] != world_size:
                raise ClusterError(
                    f"{trial.name} is in epoch {state['epochs_done']} of stage {state['stage']!r}, trained by "
                    f"{state['world_size']} workers, but the cluster now gives {world_size}; set workers_per_trial back to "
                    f"{state['world_size']}, or start the search under another name: --set name=..."
                )
