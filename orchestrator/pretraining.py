"""The training of the network that the trials start from."""

from functools import partial

from torch import nn

from gator.weights import save_weights
from orchestrator import datasets, models
from orchestrator.assignment import Assignment
from orchestrator.checkpoint import Checkpoint
from orchestrator.epochs import Laps, accuracy_of, log_metrics, plain_training, reestimate_batchnorm, resume, saver_of
from orchestrator.paths import BasePaths
from orchestrator.saver import Metrics, Session, checkpoint_of


class BaseTraining:
    """The training of the network that the trials start from."""

    def __init__(self, assignment: Assignment, session: Session) -> None:
        self.config = assignment.config
        self.is_elastic = assignment.is_elastic
        self.session = session
        self.shard = session.shard
        self.paths = BasePaths(assignment.folder)
        self.splits = datasets.load(self.config.data, self.config.seed)
        self.network = models.build(self.config.model).to(self.shard.device)
        self.saver = saver_of(assignment, session)

    def run(self, checkpoint: Checkpoint | None) -> Metrics:
        """Train, save the weights, and return the metrics of the last epoch, on the held-out images."""
        config = self.config.pretraining
        training = plain_training(
            self.network, "pretrain", self.config, config, self.splits, self.shard, is_elastic=self.is_elastic
        )
        metrics = {} if checkpoint is None else checkpoint.metrics
        for epoch in range(resume(training, checkpoint), config.epochs):
            laps = Laps()
            midway = partial(checkpoint_of, training, epochs_done=epoch, metrics=metrics)
            loss = training.run_epoch(epoch, partial(self.saver.check, midway))
            laps.end("train_s")
            reestimate_batchnorm(self.network, self.config, self.splits, self.shard)
            accuracy = accuracy_of(self.network, self.splits.holdout, self.config, self.shard)
            laps.end("eval_s")
            metrics = {"epoch": epoch + 1, "stage": "pretrain", "loss": loss, **accuracy, **laps.seconds}
            log_metrics(f"epoch {epoch + 1}/{config.epochs}", metrics)
            self.saver.save(metrics, checkpoint_of(training, epochs_done=epoch + 1, metrics=metrics))
        if self.shard.rank == 0:
            save_base(self.network, self.paths)
        return metrics


def save_base(network: nn.Module, paths: BasePaths) -> None:
    """Write the state dict of a base network."""
    save_weights(paths.weights, network.state_dict())
