"""The training of the network that the trials start from."""

from functools import partial

from orchestrator.datasets import splits as datasets
from orchestrator.models import networks as models
from orchestrator.models.saved import save_base
from orchestrator.storage.paths import BasePaths, TrialPaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.epochs import Stopwatch, log_metrics, plain_training, resume, saver_of
from orchestrator.training.evaluation import accuracy_of, reestimate_batchnorm
from orchestrator.training.saver import Session, checkpoint_of
from orchestrator.trial.assignment import Assignment


class BaseTraining:
    """The training of the network that the trials start from."""

    def __init__(self, assignment: Assignment, session: Session) -> None:
        self.config = assignment.config
        self.is_elastic = assignment.is_elastic
        self.session = session
        self.ranks = session.ranks
        self.paths = BasePaths(assignment.folder)
        self.splits = datasets.load(self.config.data, self.config.seed)
        self.network = models.build(self.config.model).to(self.ranks.device)
        self.saver = saver_of(assignment.config, TrialPaths(assignment.folder), session)

    def run(self, checkpoint: Checkpoint | None) -> EpochMetrics:
        """Train, save the weights, and return the metrics of the last epoch, on the held-out images."""
        config = self.config.pretraining
        training = plain_training(
            self.network, "pretrain", self.config, config, self.splits, self.ranks, is_elastic=self.is_elastic
        )
        metrics = {} if checkpoint is None else checkpoint.metrics
        for epoch in range(resume(training, checkpoint), config.epochs):
            laps = Stopwatch()
            midway = partial(checkpoint_of, training, epochs_done=epoch, metrics=metrics)
            loss = training.run_epoch(epoch, partial(self.saver.check, midway))
            laps.end("train_s")
            reestimate_batchnorm(self.network, self.config, self.splits, self.ranks)
            accuracy = accuracy_of(self.network, self.splits.holdout, self.config, self.ranks)
            laps.end("eval_s")
            metrics = {"epoch": epoch + 1, "stage": "pretrain", "loss": loss, **accuracy, **laps.seconds}
            log_metrics(f"epoch {epoch + 1}/{config.epochs}", metrics)
            self.saver.save(metrics, checkpoint_of(training, epochs_done=epoch + 1, metrics=metrics))
        if self.ranks.rank == 0:
            save_base(self.network, self.paths)
        return metrics
