"""The training of the network that the trials start from."""

from orchestrator.models import networks as models
from orchestrator.models.saved import save_base
from orchestrator.storage.paths import BasePaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.context import Context
from orchestrator.training.epochs import Judged, Stopwatch, log_metrics, result_of, run_stage
from orchestrator.training.loop import Training


class PretrainingRecord:
    """The row of the last epoch. It is the checkpoints' and the log's; there is no metrics.parquet."""

    architecture = None

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.metrics: EpochMetrics = {} if checkpoint is None else checkpoint.metrics

    def add(self, training: Training, row: EpochMetrics, judged: Judged, laps: Stopwatch) -> None:
        """Log the row."""
        self.metrics = {**row, **laps.seconds}
        log_metrics(f"epoch {row['epoch']}/{training.config.epochs}", self.metrics)


def pretrain(context: Context, checkpoint: Checkpoint | None) -> EpochMetrics:
    """Train the base network, save its weights, and return the metrics of the last epoch, on the held-out images."""
    network = models.build(context.config.model).to(context.ranks.device)
    training, record = Training(network, "pretrain", context), PretrainingRecord(checkpoint)
    run_stage(training, checkpoint, record, lambda epoch: Judged(result_of(training)))
    if context.ranks.rank == 0:
        save_base(network, BasePaths(context.paths.root))
    return record.metrics
