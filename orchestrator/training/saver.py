"""When a training is saved: after each epoch, and within one when it is time, a node is to go, or a stop was asked for."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

import gator
from orchestrator.errors import TrialError
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import NOT_JUDGED, Checkpoint
from orchestrator.training.loop import Training
from orchestrator.training.ranks import Ranks

logger = logging.getLogger(__name__)
NOTICE_EVERY_S = 5.0
"""How often is asked whether a node is to go: that is a barrier of all ranks. Clouds give notice of half a minute at least."""


class Session(Protocol):
    """What a worker needs from whatever runs it."""

    ranks: Ranks

    @property
    def is_restart(self) -> bool:
        """Whether there is a checkpoint to go on from."""

    def restore(self) -> Checkpoint | None:
        """Return the last checkpoint, None at the start."""

    def leaving_nodes(self) -> tuple[str, ...]:
        """Return the nodes of this training that were told to go, such as spot machines; every rank calls it."""

    def report(self, metrics: EpochMetrics, checkpoint: Checkpoint) -> None:
        """Publish the metrics and keep the checkpoint; every rank calls it."""


class StoppedError(TrialError):
    """The training was asked to stop, and was saved: raised on every rank at the same step."""


class Saver:
    """Saves through a session. Rank 0's clock and rank 0's view of the stop file decide for all ranks.

    stop_file: whoever wants the training saved and ended creates it, in storage that rank 0 sees.
    marker: a file that is there whenever the storage is; while it is away, saving waits.
    """

    def __init__(self, session: Session, *, every_s: float, stop_file: Path, marker: Path) -> None:
        self.session = session
        self.every_s = every_s
        self.stop_file = stop_file
        self.marker = marker
        self._saved_at = self._asked_at = time.monotonic()
        self._leaving: tuple[str, ...] = ()

    def save(self, metrics: EpochMetrics, checkpoint: Checkpoint) -> None:
        """Report and keep; every rank calls it. Raises: StorageError if the storage is away for too long."""
        if self.session.ranks.rank == 0:
            wait_until_reachable(self.marker)
        self.session.report(metrics, checkpoint)
        self._saved_at = time.monotonic()

    def check(self, make: Callable[[], Checkpoint]) -> None:
        """Save what `make` returns if it is time to; every rank calls it, at the same steps.

        Raises: StoppedError, once it is saved, if a stop was asked for.
        """
        ranks = self.session.ranks
        wanted = torch.zeros(3)
        if ranks.rank == 0:
            wanted[0] = time.monotonic() - self._saved_at >= self.every_s
            wanted[1] = os.path.exists(self.stop_file)  # Path.exists raises what a storage that is away answers
            wanted[2] = time.monotonic() - self._asked_at >= NOTICE_EVERY_S
        is_due, is_stop, is_to_ask = (ranks.sum(wanted) > 0).tolist()
        if is_due or is_stop or (is_to_ask and self._has_notice()):
            checkpoint = make()
            self.save(checkpoint.metrics, checkpoint)
        if is_stop:
            raise StoppedError("stopped as asked, and saved; it goes on from here")

    def _has_notice(self) -> bool:
        """Return whether further nodes have been told to go since the last call; training goes on until they are gone."""
        self._asked_at = time.monotonic()
        before, self._leaving = self._leaving, self.session.leaving_nodes()
        is_new = not set(self._leaving) <= set(before)
        if is_new:
            logger.info("is saved now, as %s was told to go", ", ".join(self._leaving))
        return is_new


def checkpoint_of(
    training: Training, *, epochs_done: int, metrics: EpochMetrics, architecture: gator.Architecture | None = None
) -> Checkpoint:
    """Return where the training stands: after an epoch, or within the one that follows epochs_done.

    metrics: what was last reported.    architecture: of the network as last reported; in fine-tuning, the network's.
    """
    network = training.network
    is_judged = training.stage != "gate" and epochs_done > 0 and not training.is_midway(epochs_done)
    return Checkpoint(
        stage=training.stage,
        epochs_done=epochs_done,
        world_size=training.ranks.world_size,
        architecture=None if architecture is None else architecture.to_json(),
        built=network.built_architecture().to_json() if isinstance(network, gator.GatedModel) else None,
        metrics=metrics,
        score=metrics.get("top1", NOT_JUDGED) if is_judged else NOT_JUDGED,
        tensors=training.state_dict(),
    )
