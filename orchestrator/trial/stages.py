"""The stages of one trial: gate -> prune -> fine-tune -> measure; and before all trials, the training of the network that they start from.

After every epoch, and within long ones, the trial is saved as a Checkpoint; a rerun skips what the checkpoint shows as complete.
"""

from torch import nn

import gator
from gator.costs.summary import widths_csv
from orchestrator.config.metrics import TEST
from orchestrator.latency.curve import Curve
from orchestrator.latency.sources import make_source, measure_latencies
from orchestrator.models.networks import build, build_traced, build_untrained
from orchestrator.models.saved import load_base, save_base
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import BasePaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.context import Context
from orchestrator.training.epochs import Judged, Stopwatch, log_metrics, result_of, run_stage
from orchestrator.training.evaluation import evaluate, reestimate_batchnorm
from orchestrator.training.loop import Distillation, Training
from orchestrator.training.ranks import broadcast_state
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.epoch_record import EpochRecord
from orchestrator.trial.gating_stage import GatingStage
from orchestrator.trial.plain_choices import choose


class TrialStages:
    """One trial on one rank: what its stages share."""

    def __init__(self, context: Context, assignment: Assignment) -> None:
        assert assignment.base_weights is not None
        config, device, input_shape = context.config, context.ranks.device, context.splits.input_shape
        self.context = context
        self.config = config
        self.base_weights = assignment.base_weights
        self.network, self.graph = build_traced(config.model, input_shape)
        load_base(self.network, self.base_weights)
        self.network.to(device)
        self.costs = TrialCosts(config, self.graph, device)
        curve = None if assignment.latency_curve is None else Curve.from_json(assignment.latency_curve.read_bytes())
        self.source = make_source(config, input_shape, self.costs.macs, curve, self.costs.timed_here())
        self.gating = GatingStage(context, self.network, self.costs, keeps_cut=assignment.keeps_cut)
        self.record = EpochRecord(context, self.costs, self.source)

    def run(self, checkpoint: Checkpoint | None) -> EpochMetrics:
        """Run the stages that the checkpoint does not show as complete, and return the final metrics."""
        if checkpoint is not None:
            self.record.recall(checkpoint)
        if checkpoint is None or checkpoint.stage == "gate":
            pruned, architecture = self._choose(checkpoint)
        else:
            architecture = gator.Architecture.from_json(checkpoint.architecture)
            pruned = gator.prune(self.network, self.graph, architecture)
        return self._measure(self._finetune(pruned, architecture, checkpoint), architecture)

    def _choose(self, checkpoint: Checkpoint | None) -> tuple[nn.Module, gator.Architecture]:
        """Return the network as pruned for fine-tuning, by learned gates or by a plain choice."""
        if self.config.has_gates:
            return self.gating.run(checkpoint, self.record)
        architecture = choose(self.config, self.network, self.costs.macs)
        pruned = gator.prune(self.network, self.graph, architecture)
        reestimate_batchnorm(pruned, self.context)
        return pruned, architecture

    def _finetune(
        self, pruned: nn.Module, architecture: gator.Architecture, checkpoint: Checkpoint | None
    ) -> nn.Module:
        """Train the plain pruned network, and return what it has become.

        The last epoch's weights, or their running mean, are the trial's: choosing would fit the validation split.
        """
        self.record.architecture = architecture
        training = Training(pruned, "finetune", self.context, distillation=self._distillation())
        run_stage(training, checkpoint, self.record, lambda epoch: Judged(result_of(training), architecture))
        return training.result

    def _distillation(self) -> Distillation | None:
        """Return the base network as a teacher, a copy of its own: gating has trained self.network further."""
        config = self.config.finetuning.distillation
        if config.weight == 0:
            return None
        teacher = build_untrained(self.config.model)
        load_base(teacher, self.base_weights)
        teacher.to(self.context.ranks.device).eval().requires_grad_(False)
        return Distillation(teacher=teacher, weight=config.weight, temperature=config.temperature)

    def _measure(self, pruned: nn.Module, architecture: gator.Architecture) -> EpochMetrics:
        """Save the network and measure what was saved: accuracy on the test split, latency with all repeats."""
        ranks, paths, laps = self.context.ranks, self.context.paths, Stopwatch()
        broadcast_state(pruned, ranks)
        if ranks.rank == 0:
            gator.save_pruned(pruned, architecture, paths.root)
            write_atomic(paths.widths, widths_csv(self.graph, architecture))
        accuracy = evaluate(pruned, self.context.splits.test, self.config, ranks)
        laps.end("eval_s")
        if ranks.rank == 0:
            latencies = measure_latencies(self.source, pruned, architecture, self.config.profile)
            laps.end("measure_s")
            values = {**accuracy, "accuracy_split": TEST, **latencies, **laps.seconds, "train_s": 0.0, "final": True}
            self.record.write({**self.record.metrics, **values})
        metrics = self.record.metrics
        done = Checkpoint(
            stage="done",
            epochs_done=0,
            world_size=ranks.world_size,
            architecture=architecture.to_json(),
            metrics=metrics,
        )
        self.context.saver.save(metrics, done)
        return metrics


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
    network = build(context.config.model).to(context.ranks.device)
    training, record = Training(network, "pretrain", context), PretrainingRecord(checkpoint)
    run_stage(training, checkpoint, record, lambda epoch: Judged(result_of(training)))
    if context.ranks.rank == 0:
        save_base(network, BasePaths(context.paths.root))
    return record.metrics
