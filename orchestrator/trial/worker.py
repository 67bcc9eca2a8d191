"""What each worker of a trial runs: it resumes from the last checkpoint, under Ray Train or without it.

All ranks run the same code and meet in the collectives; rank 0 alone writes files, reads clocks and logs. The stages
reach Ray through a Session only, so that they also run without it. A trial that is done returns its final metrics at once.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from ray.train import Checkpoint as RayCheckpoint

import gator
from orchestrator.cluster.connection import WATCH_NODES
from orchestrator.config.trial import TrialConfig
from orchestrator.datasets.seeds import seed_everything
from orchestrator.datasets.splits import load
from orchestrator.errors import (
    ClusterError,
    ConfigError,
    DamagedCheckpointError,
    DataError,
    LatencyTableError,
    OrchestratorError,
    StorageError,
    UserError,
)
from orchestrator.masking import MaskingFormatter
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.context import Context
from orchestrator.training.loop import LossNotFiniteError
from orchestrator.training.out_of_memory import lack_of_memory_named
from orchestrator.training.ranks import Ranks
from orchestrator.training.saver import Saver, Session, StoppedError
from orchestrator.trial.assignment import BEST_BY, Assignment
from orchestrator.trial.exchange import files_sent
from orchestrator.trial.plain_choices import data_of
from orchestrator.trial.stages import TrialStages, pretrain

logger = logging.getLogger(__name__)


class RaySession:
    """The session of a Ray Train worker.

    resume_from: the place of a checkpoint that counts as long as Ray Train has recorded none.
    send_files: brings the files that belong to a checkpoint to where they are kept.
    """

    def __init__(self, resume_from: str | None, send_files: Callable[[], None]) -> None:
        self.ranks = Ranks.current(ray.train.torch.get_device())
        self.resume_from = resume_from
        self.send_files = send_files

    @property
    def is_restart(self) -> bool:
        """Whether there is a checkpoint."""
        return ray.train.get_checkpoint() is not None or self.resume_from is not None

    def leaving_nodes(self) -> tuple[str, ...]:
        """Ask Ray Train, which agrees on one answer for all ranks."""
        if os.environ.get(WATCH_NODES) == "0":
            return ()
        notice = ray.train.get_preemption_info()
        return () if notice is None else tuple(notice.preempted_node_ids)

    def restore(self) -> Checkpoint | None:
        """Read the checkpoint that Ray Train kept, or else resume_from."""
        kept = ray.train.get_checkpoint()
        if kept is not None:
            with kept.as_directory() as folder:
                return Checkpoint.load(Path(folder), self.ranks.device)
        if self.resume_from is None:
            return None
        logger.warning(
            "training resumes from %s, because Ray %s has no record of this run that it can read",
            self.resume_from,
            ray.__version__,
        )
        with RayCheckpoint(self.resume_from).as_directory() as folder:
            return Checkpoint.load(Path(folder), self.ranks.device)

    def report(self, metrics: EpochMetrics, checkpoint: Checkpoint) -> None:
        """Report to Ray Train, which copies rank 0's folder into the run's storage; a barrier between the ranks."""
        if self.ranks.rank != 0:
            ray.train.report(metrics)
            return
        self.send_files()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder))
            scored = {**metrics, BEST_BY: checkpoint.score}
            ray.train.report(scored, checkpoint=RayCheckpoint.from_directory(folder))


def train_loop_per_worker(assignment: dict[str, Any]) -> EpochMetrics:
    """Run an Assignment's stages on this Ray Train worker and return its last metrics (rank 0's count).

    An error that all ranks meet is returned: {"error": message, "is_user_error": bool}; so is {"stopped": True} after a stop
    on request. An error of one node alone, such as damaged data, is raised, so that no rank waits for that node.
    """
    try:
        is_sender = Ranks.current(torch.device("cpu")).rank == 0
        with files_sent(Assignment.from_dict(assignment), is_sender=is_sender) as (todo, send_files):
            return run_assignment(todo, RaySession(todo.resume_from, send_files))
    except StoppedError:
        return {"stopped": True}
    except (
        LossNotFiniteError,
        gator.GateError,
        gator.PruneError,
        ConfigError,
        ClusterError,
        LatencyTableError,
    ) as error:
        return {"error": f"{assignment['name']}: {error}", "is_user_error": isinstance(error, UserError)}
    except (DataError, StorageError) as error:
        raise type(error)(f"{assignment['name']} on {socket.gethostname()}: {error}") from error


def run_assignment(assignment: Assignment, session: Session) -> EpochMetrics:
    """Run what the session's checkpoint does not show as complete, and return the last metrics."""
    paths = TrialPaths(assignment.folder)
    if assignment.is_again or session.is_restart:
        wait_until_reachable(paths.config)  # else the checkpoint would be taken for damaged
    _check_folder_is_shared(paths.config, session.ranks)
    paths.refuse_links()
    config = assignment.config
    seed_everything(config.seed, "start", 0, session.ranks.rank)
    with _log_file(paths.log, session.ranks):
        checkpoint = _restore(session)
        if checkpoint is not None and checkpoint.stage == "done":
            return checkpoint.metrics
        if not assignment.is_elastic:
            _check_world_size(checkpoint, session.ranks)
        try:
            with lack_of_memory_named(config, session.ranks):
                context = _context(assignment, config, session)
                if assignment.base_weights is None:
                    return pretrain(context, checkpoint)
                return TrialStages(context, assignment).run(checkpoint)
        except OrchestratorError as error:
            level = logging.INFO if isinstance(error, StoppedError) else logging.ERROR
            logger.log(level, "%s", error)  # also for the log file, which outlives this process
            raise
        except Exception:  # of torch or of a person's own network: only the traceback says where
            logger.exception("the worker failed")
            raise


def _context(assignment: Assignment, config: TrialConfig, session: Session) -> Context:
    """Return what the stages share; loads the images. The base network sees whole ones, whatever its trials do.

    Raises: ConfigError if the network has another number of outputs than the images have classes; a plan sees local images only.
    """
    paths = TrialPaths(assignment.folder)
    data = config.data if assignment.base_weights is None else data_of(config)
    splits = load(data, config.seed)
    if splits.num_classes != config.model.num_classes:
        raise ConfigError(
            f"model.num_classes: found {config.model.num_classes}, expected {splits.num_classes}, the number of classes of "
            f"{data.train or data.name}; set base.model.num_classes to it"
        )
    return Context(
        config=config,
        paths=paths,
        splits=splits,
        ranks=session.ranks,
        saver=Saver(session, every_s=config.training.checkpoint_every_s, stop_file=paths.stop, marker=paths.config),
        is_elastic=assignment.is_elastic,
    )


def _restore(session: Session) -> Checkpoint | None:
    """Return the last checkpoint; None, on every rank, at the start or if it is damaged for any of them."""
    checkpoint, damage = None, None
    try:
        checkpoint = session.restore()
    except DamagedCheckpointError as error:
        damage = error
    if session.ranks.sum(torch.tensor(int(damage is not None))) == 0:
        return checkpoint
    logger.warning(
        "training starts from the beginning because the last checkpoint is damaged: %s", damage or "on another worker"
    )
    return None


def _check_world_size(checkpoint: Checkpoint | None, ranks: Ranks) -> None:
    """Raise ClusterError, on every rank, if another number of workers trained the checkpoint.

    The split of each global batch and BatchNorm's batches would change within a stage.
    """
    if checkpoint is not None and checkpoint.world_size != ranks.world_size:
        raise ClusterError(
            f"the checkpoint was trained by {checkpoint.world_size} workers, now there are {ranks.world_size}; set the "
            f"cluster's workers_per_trial back to {checkpoint.world_size}, the checkpoint is kept"
        )


def _check_folder_is_shared(config: Path, ranks: Ranks) -> None:
    """Raise ClusterError, on every rank, unless every rank sees the config.json that the driver wrote.

    Ray would find out when a worker restarts elsewhere, and then by a FileNotFoundError.
    """
    num_seeing = int(ranks.sum(torch.tensor(int(config.is_file()))))
    if num_seeing < ranks.world_size:
        raise ClusterError(
            f"{config} was written by the driver, but only {num_seeing} of {ranks.world_size} workers see it; "
            "the cluster's storage must be a folder that every node mounts"
        )


@contextmanager
def _log_file(path: Path, ranks: Ranks) -> Iterator[None]:
    """Append what rank 0 logs to the file as well."""
    if ranks.rank != 0:
        yield
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("orchestrator")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
