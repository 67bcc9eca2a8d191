"""The epochs of a stage: each is trained, judged, recorded and saved."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from torch import nn

import gator
from orchestrator.config.metrics import used_as
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import NOT_JUDGED, Checkpoint
from orchestrator.training.evaluation import evaluate, reestimate_batchnorm
from orchestrator.training.loop import Training

logger = logging.getLogger(__name__)


class Stopwatch:
    """Measures the wall seconds of the parts of an epoch, one after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """Record the time since the last call under this name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


class Judged(NamedTuple):
    """A network as it is after an epoch."""

    network: nn.Module
    """With BatchNorm's statistics estimated again."""
    architecture: gator.Architecture | None = None
    """What it keeps; None before there are gates."""


class Record(Protocol):
    """What is kept of the epochs."""

    @property
    def metrics(self) -> EpochMetrics:
        """The row that was last reported, on rank 0; empty at the start."""

    @property
    def architecture(self) -> gator.Architecture | None:
        """That of the network as last reported; in fine-tuning that of the network."""

    def add(self, training: Training, row: EpochMetrics, judged: Judged, laps: Stopwatch) -> None:
        """Complete the row of an epoch and keep it; every rank calls it. row: epoch (of the stage), stage, loss and accuracy."""


def run_stage(
    training: Training, checkpoint: Checkpoint | None, record: Record, judge: Callable[[int], Judged]
) -> None:
    """Train the epochs of a stage that the checkpoint does not hold. judge: gets the epoch, from 0, that has just been trained."""
    context = training.context
    for epoch in range(_resume(training, checkpoint), training.config.epochs):
        laps = Stopwatch()
        midway = partial(_checkpoint, training, epoch, record)
        loss = training.run_epoch(epoch, partial(context.saver.check, midway))
        laps.end("train_s")
        judged = judge(epoch)
        accuracy = evaluate(judged.network, context.splits.validation, context.config, context.ranks)
        laps.end("eval_s")
        record.add(training, {"epoch": epoch + 1, "stage": training.stage, "loss": loss, **accuracy}, judged, laps)
        context.saver.save(record.metrics, _checkpoint(training, epoch + 1, record))
        context.saver.check_stop()


def result_of(training: Training) -> nn.Module:
    """Return what a training without gates has come to, with BatchNorm's statistics estimated again."""
    reestimate_batchnorm(training.result, training.context)
    return training.result


def _resume(training: Training, checkpoint: Checkpoint | None) -> int:
    """Bring the training to where the checkpoint was taken, if it is one of this stage; return the next epoch."""
    if checkpoint is None or checkpoint.stage != training.stage:
        return 0
    training.load_state_dict(checkpoint.tensors)
    loader = training.loader
    midway = f" and {loader.step} of {len(loader)} steps" if training.is_midway(checkpoint.epochs_done) else ""
    logger.info("training resumes after %d epochs%s of stage %r", checkpoint.epochs_done, midway, checkpoint.stage)
    return checkpoint.epochs_done


def _checkpoint(training: Training, epochs_done: int, record: Record) -> Checkpoint:
    """Return the checkpoint of a training: after an epoch, or within the one that follows epochs_done."""
    metrics, architecture = record.metrics, record.architecture
    is_judged = training.stage != "gate" and epochs_done > 0 and not training.is_midway(epochs_done)
    return Checkpoint(
        stage=training.stage,
        epochs_done=epochs_done,
        world_size=training.context.ranks.world_size,
        architecture=None if architecture is None else architecture.to_json(),
        built=training.gates.built,
        metrics=metrics,
        score=metrics.get("top1", NOT_JUDGED) if is_judged else NOT_JUDGED,
        tensors=training.state_dict(),
    )


def log_metrics(prefix: str, metrics: EpochMetrics) -> None:
    """Log how an epoch went: "epoch 3/7 gate loss 1.92 top1 41 latency_ms 0.82 ... train_s 2.1"."""
    values = " ".join(f"{name} {metrics[name]:.4g}" for name in used_as("log") if name in metrics)
    logger.info("%s %s %s", prefix, metrics["stage"], values)
