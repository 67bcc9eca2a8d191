"""When a training is saved: after each epoch, and within one when it is due, a node leaves, or a stop was requested."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from orchestrator.errors import TrialError
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.ranks import Ranks

logger = logging.getLogger(__name__)
NOTICE_EVERY_S = 5.0
"""Seconds between two questions whether a node leaves, each a barrier of all ranks. Clouds give at least 30 s of notice."""


STOPPED = "stopped on request, and saved; the same command resumes it"


class Session(Protocol):
    """What a worker needs from whatever runs it."""

    ranks: Ranks

    @property
    def is_restart(self) -> bool:
        """Whether there is a checkpoint to resume from."""

    def restore(self) -> Checkpoint | None:
        """Return the last checkpoint, None at the start."""

    def leaving_nodes(self) -> tuple[str, ...]:
        """Return the nodes of this training that have notice to leave, such as spot machines; every rank calls it."""

    def report(self, metrics: EpochMetrics, checkpoint: Checkpoint) -> None:
        """Publish the metrics and keep the checkpoint; every rank calls it."""


class StoppedError(TrialError):
    """The training was stopped on request, and saved: raised on every rank at the same step."""


class Saver:
    """Saves through a session. Rank 0's clock and rank 0's view of the stop file decide for all ranks.

    stop_file: requests, by existing, that the training is saved and ends; in storage that rank 0 sees.
    marker: a file that exists whenever the storage is reachable; until then saving waits.
    """

    def __init__(self, session: Session, *, every_s: float, stop_file: Path, marker: Path) -> None:
        self.session = session
        self.every_s = every_s
        self.stop_file = stop_file
        self.marker = marker
        self._saved_at = self._asked_at = time.monotonic()
        self._leaving: tuple[str, ...] = ()

    def save(self, metrics: EpochMetrics, checkpoint: Checkpoint) -> None:
        """Report and keep; every rank calls it. Raises: StorageError if the storage is unreachable for too long."""
        if self.session.ranks.rank == 0:
            wait_until_reachable(self.marker)
        self.session.report(metrics, checkpoint)
        self._saved_at = time.monotonic()

    def check(self, make: Callable[[], Checkpoint]) -> None:
        """Save what `make` returns if that is due; every rank calls it, at the same steps.

        Raises: StoppedError, once it is saved, if a stop was requested.
        """
        ranks = self.session.ranks
        wanted = torch.zeros(3)
        if ranks.rank == 0:
            wanted[0] = time.monotonic() - self._saved_at >= self.every_s
            wanted[1] = os.path.exists(self.stop_file)  # Path.exists raises an error for an unreachable storage
            wanted[2] = time.monotonic() - self._asked_at >= NOTICE_EVERY_S
        is_due, is_stop, is_to_ask = (ranks.sum(wanted) > 0).tolist()
        if is_due or is_stop or (is_to_ask and self._has_notice()):
            checkpoint = make()
            self.save(checkpoint.metrics, checkpoint)
        if is_stop:
            raise StoppedError(STOPPED)

    def check_stop(self) -> None:
        """Raise StoppedError if a stop was requested; every rank calls it, when all is saved: epochs of few steps have no check."""
        ranks = self.session.ranks
        if ranks.sum(torch.tensor([float(ranks.rank == 0 and os.path.exists(self.stop_file))])) > 0:
            raise StoppedError(STOPPED)

    def _has_notice(self) -> bool:
        """Return whether further nodes have got notice since the last call; training continues until they are gone."""
        self._asked_at = time.monotonic()
        before, self._leaving = self._leaving, self.session.leaving_nodes()
        is_new = not set(self._leaving) <= set(before)
        if is_new:
            logger.info("the training is saved now because these nodes leave: %s", ", ".join(self._leaving))
        return is_new
