"""What the stages share around an epoch: where it begins, how its network is judged, and what is said of it."""

import logging
import time
from typing import Any

from torch import nn

from orchestrator.config.metrics import used_as
from orchestrator.config.trial import Stage, StageConfig, TrialConfig
from orchestrator.datasets import splits as datasets
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.execution import Execution
from orchestrator.training.loaders import make_loader
from orchestrator.training.loop import Training
from orchestrator.training.ranks import Ranks
from orchestrator.training.saver import Saver, Session

logger = logging.getLogger(__name__)


class Stopwatch:
    """Wall seconds of the parts of an epoch, one after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """Say what the time since the last call was spent on."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def plain_training(
    network: nn.Module,
    stage: Stage,
    config: TrialConfig,
    stage_config: StageConfig,
    splits: datasets.DataSplits,
    ranks: Ranks,
    *,
    is_elastic: bool,
    **options: Any,
) -> Training:
    """Return the training of a network without gates; is_elastic: make_loader's, options: Training's."""
    group = {"params": list(network.parameters()), "lr": stage_config.lr, "weight_decay": stage_config.weight_decay}
    loader = make_loader(splits.train, config.data, stage=stage, seed=config.seed, ranks=ranks, is_elastic=is_elastic)
    return Training(
        network,
        [group],
        loader,
        stage=stage,
        config=stage_config,
        seed=config.seed,
        ranks=ranks,
        execution=Execution.on(ranks.device, config.training),
        **options,
    )


def saver_of(config: TrialConfig, paths: TrialPaths, session: Session) -> Saver:
    """Return what saves a training, as often as its config says."""
    every_s = config.training.checkpoint_every_s
    return Saver(session, every_s=every_s, stop_file=paths.stop, marker=paths.config)


def resume(training: Training, checkpoint: Checkpoint | None) -> int:
    """Put the training where the checkpoint left it, if it is one of this stage; return the epoch to go on with."""
    if checkpoint is None or checkpoint.stage != training.stage:
        return 0
    training.load_state_dict(checkpoint.tensors)
    loader = training.loader
    midway = f" and {loader.step} of {len(loader)} steps" if training.is_midway(checkpoint.epochs_done) else ""
    logger.info("goes on after %d epochs%s of stage %r", checkpoint.epochs_done, midway, checkpoint.stage)
    return checkpoint.epochs_done


def log_metrics(prefix: str, metrics: EpochMetrics) -> None:
    """Log how an epoch went: "epoch 3/7 gate loss 1.92 top1 41 latency_ms 0.82 ... train_s 2.1"."""
    values = " ".join(f"{name} {metrics[name]:.4g}" for name in used_as("log") if name in metrics)
    logger.info("%s %s %s", prefix, metrics["stage"], values)
