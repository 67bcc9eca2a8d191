"""One Ray Train run with all stages of a trial, started again when workers are lost.

A Train run is found again by its name and folder, which follow from the trial's id: called again, fit resumes from the last
checkpoint, and a trial that is done returns its final metrics without training.
"""

import errno
import logging
from collections.abc import Callable
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
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.cluster.waiting import reported_while_waiting
from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import (
    OrchestratorError,
    OutOfMemoryError,
    StorageError,
    TrialError,
    UserError,
)
from orchestrator.storage.files import num_bytes
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.trial.assignment import BEST_BY, Assignment
from orchestrator.trial.exchange import files_received
from orchestrator.trial.process_group import ProcessGroupConfig
from orchestrator.trial.train_runs import TrainRuns

logger = logging.getLogger(__name__)
# How often workers that died (a lost node, memory) are started again from one and the same checkpoint. Nodes that leave after
# a notice are not counted.
MAX_WORKER_FAILURES = 2
DISK_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE}
"""Errors of a disk that is full, broken, read-only or away: no fault of the trial."""


def fit(assignment: Assignment, cluster: ClusterConfig, train_folder: str | Path) -> EpochMetrics:
    """Run the assignment as the Train run <train_folder>/<name>, or resume it; return what rank 0 returned.

    Workers that were lost are started again from the last checkpoint, here and not by Ray Train, which would count over the whole
    run: of a training of days on machines that vanish, the third loss would be the last.
    train_folder: a path or an address.
    """
    with files_received(assignment) as wait_for_storage:
        return _fit(assignment, cluster, TrainRuns(train_folder), wait_for_storage)


def _fit(
    assignment: Assignment, cluster: ClusterConfig, runs: TrainRuns, wait_for_storage: Callable[[], bool]
) -> EpochMetrics:
    name, num_failures = assignment.name, 0  # since the last new checkpoint
    while True:
        checkpoints = runs.checkpoints(name)
        assignment = replace(assignment, resume_from=runs.unrecorded_checkpoint(name))
        try:
            return _metrics(_trainer(assignment, cluster, runs.place).fit().return_value, name)
        except ActorDiedError as error:  # Ray Train's controller, before any worker
            if "CheckpointManagerInitializationError" not in str(error):
                raise
            runs.set_record_aside(name)
        except TrainingFailedError as error:
            was_away = wait_for_storage()
            assignment = replace(assignment, is_again=True)
            if was_away and isinstance(error, ControllerError):
                continue  # the controller writes to the storage as well, and gives up at once where the workers wait
            num_failures = 1 if runs.has_new(name, checkpoints) else num_failures + 1
            if num_failures > MAX_WORKER_FAILURES or not _may_pass(error):
                raise _first_cause(error, name) from error


def fit_here(assignment: Assignment, cluster: ClusterConfig, train_folder: str) -> EpochMetrics:
    """Do what fit does, in the command's own process, and log it when the workers wait for nodes; Tune's listener does so for trials."""
    log = TrialPaths(assignment.folder).log
    before = num_bytes(log)
    name = "the base network" if assignment.base_weights is None else assignment.name
    with reported_while_waiting(name, cluster, lambda: num_bytes(log) != before, logger.info):
        return fit(assignment, cluster, train_folder)


def _trainer(assignment: Assignment, cluster: ClusterConfig, place: str) -> DataParallelTrainer:
    use_gpu = cluster.resources_per_worker.get("GPU", 0) > 0
    return DataParallelTrainer(
        _work,
        train_loop_config=replace(assignment, is_elastic=cluster.is_elastic).to_dict(),
        backend_config=ProcessGroupConfig(backend="nccl" if use_gpu else "gloo"),
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
            storage_path=place,
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


def _may_pass(error: TrainingFailedError) -> bool:
    """Return whether other workers may succeed: some were lost, the storage was away, or a device was full, perhaps with the memory
    of others.
    """
    passing = (OutOfMemoryError, StorageError)
    return isinstance(error, WorkerGroupError) and all(isinstance(one, passing) for one in _errors_of(error))


def _causes(error: TrainingFailedError) -> list[Exception]:
    """Return what the workers ended with, the lowest rank's first, or what Ray Train's controller ended with."""
    if isinstance(error, ControllerError):
        return [error.controller_failure]
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return [failures[rank] for rank in sorted(failures)]


def _errors_of(error: TrainingFailedError) -> list[OrchestratorError]:
    """Return the OrchestratorErrors among the causes."""
    return [cause for cause in _causes(error) if isinstance(cause, OrchestratorError)]


def _first_cause(error: TrainingFailedError, name: str) -> OrchestratorError:
    """Return a StorageError if a disk failed on any rank or under the controller, else the first OrchestratorError.

    Without either, it is a TrialError that says how the workers ended.
    """
    causes = _causes(error)
    disks = [found for cause in causes if (found := disk_failure(cause, name)) is not None]
    if errors := disks or _errors_of(error):
        return errors[0]
    if not isinstance(error, WorkerGroupError):
        return TrialError(f"{name}: Ray Train could not run its workers: {type(error).__name__}: {error}")
    cause = causes[0] if causes else error
    return TrialError(
        f"{name}: its workers failed {MAX_WORKER_FAILURES + 1} times, the last time by {type(cause).__name__}: {cause}"
    )


def disk_failure(error: Exception, name: str) -> StorageError | None:
    """Return an error of a disk as one of this project, for the trial of this name; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_FAILURES:
        return None
    return StorageError(f"{name}: a disk failed ({error}); free or repair it, then rerun the same command to resume")
