"""When a training is saved: after each epoch, and within one when enough time has passed or a stop was asked for."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

import gator
from orchestrator.checkpoint import NOT_JUDGED, Checkpoint
from orchestrator.errors import TrialError
from orchestrator.loop import Shard, Training

Metrics = dict[str, Any]


class Session(Protocol):
    """What a worker needs from whatever runs it."""

    shard: Shard

    def restore(self) -> Checkpoint | None:
        """Return the last checkpoint, None at the start."""

    def report(self, metrics: Metrics, checkpoint: Checkpoint) -> None:
        """Publish the metrics and keep the checkpoint; every rank calls it."""


class StoppedError(TrialError):
    """The training was asked to stop, and was saved: raised on every rank at the same step."""


class Saver:
    """Saves through a session. Rank 0's clock and rank 0's view of the stop file decide for all ranks.

    stop_file: whoever wants the training saved and ended creates it, in storage that rank 0 sees.
    """

    def __init__(self, session: Session, *, every_s: float, stop_file: Path) -> None:
        self.session = session
        self.every_s = every_s
        self.stop_file = stop_file
        self._saved_at = time.monotonic()

    def save(self, metrics: Metrics, checkpoint: Checkpoint) -> None:
        """Report and keep; every rank calls it."""
        self.session.report(metrics, checkpoint)
        self._saved_at = time.monotonic()

    def check(self, make: Callable[[], Checkpoint]) -> None:
        """Save what `make` returns if it is time to; every rank calls it, at the same steps.

        Raises: StoppedError, once it is saved, if a stop was asked for.
        """
        shard = self.session.shard
        wanted = torch.zeros(2)
        if shard.rank == 0:
            wanted[0] = time.monotonic() - self._saved_at >= self.every_s
            wanted[1] = self.stop_file.exists()
        is_due, is_stop = (shard.sum(wanted) > 0).tolist()
        if is_due or is_stop:
            checkpoint = make()
            self.save(checkpoint.metrics, checkpoint)
        if is_stop:
            raise StoppedError("stopped as asked, and saved; it goes on from here")


def checkpoint_of(
    training: Training, *, epochs_done: int, metrics: Metrics, architecture: gator.Architecture | None = None
) -> Checkpoint:
    """Return where the training stands: after an epoch, or within the one that follows epochs_done.

    metrics: what was last reported.    architecture: of the network as last reported; in fine-tuning, the network's.
    """
    network = training.network
    is_judged = training.stage != "gate" and epochs_done > 0 and not training.is_midway(epochs_done)
    return Checkpoint(
        stage=training.stage,
        epochs_done=epochs_done,
        world_size=training.shard.world_size,
        architecture=None if architecture is None else architecture.to_json(),
        built=network.built_architecture().to_json() if isinstance(network, gator.GatedModel) else None,
        metrics=metrics,
        score=metrics.get("top1", NOT_JUDGED) if is_judged else NOT_JUDGED,
        tensors=training.state_dict(),
    )
