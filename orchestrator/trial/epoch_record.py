"""The row of each epoch of a trial, and the latency of its network, which is kept as long as the network stays the same."""

import time

import gator
from orchestrator.config.metrics import SPREAD_METRICS, VALIDATION
from orchestrator.latency.sources import LatencySource
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.records import EpochMetrics, read_metrics, write_metrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.context import Context
from orchestrator.training.epochs import Judged, Stopwatch, log_metrics
from orchestrator.training.loop import Training
from orchestrator.trial.costs import TrialCosts, size_metrics

LATENCY_COLUMNS = (*SPREAD_METRICS, "latency_source")


class EpochRecord:
    """What a trial has reported. Rank 0 has the rows; the other ranks have none and write nothing."""

    def __init__(self, context: Context, costs: TrialCosts, source: LatencySource) -> None:
        self.context = context
        self.costs = costs
        self.source = source
        self.rows: list[EpochMetrics] = []
        self.architecture: gator.Architecture | None = None
        self._latency: tuple[gator.Architecture, EpochMetrics] | None = None

    @property
    def metrics(self) -> EpochMetrics:
        """The last row, on rank 0; empty at the start."""
        return self.rows[-1] if self.rows else {}

    def recall(self, checkpoint: Checkpoint) -> None:
        """Restore what was known at the checkpoint: the architecture, the rows up to it, and its latency."""
        if checkpoint.architecture is not None:
            self.architecture = gator.Architecture.from_json(checkpoint.architecture)
        metrics = checkpoint.metrics
        if self.context.ranks.rank != 0 or not metrics:  # in the middle of the first epoch nothing was reported
            return
        rows = read_metrics(self.context.paths.metrics)
        self.rows = [row for row in rows if row["epoch"] <= metrics["epoch"] and not row["final"]]
        if self.architecture is not None and self.architecture.digest == metrics["architecture"]:
            self._latency = self.architecture, {name: metrics[name] for name in LATENCY_COLUMNS if name in metrics}

    def add(self, training: Training, row: EpochMetrics, judged: Judged, laps: Stopwatch) -> None:
        """Complete the row of an epoch and write it."""
        architecture, config = judged.architecture, self.context.config
        assert architecture is not None
        self.architecture = architecture
        if self.context.ranks.rank != 0:
            return
        latency = self._latency_now(judged)
        laps.end("measure_s")
        self.write(
            {
                **row,
                "accuracy_split": VALIDATION,
                "epoch": row["epoch"] + (config.gating_epochs if training.stage == "finetune" else 0),
                "gating_epochs": config.gating_epochs,
                "num_epochs": config.num_epochs,
                **latency,
                **size_metrics(self.costs.graph, architecture, self.costs.unpruned_macs),
                "open_channels": sum(architecture.widths.values()),
                "loss_weight": training.gates.weight_now,
                "target_ratio": config.gating.target_ratio,
                "architecture": architecture.digest,
                **laps.seconds,
                "final": False,
            }
        )

    def write(self, metrics: EpochMetrics) -> None:
        """Add the time to a row, and the row to metrics.parquet and the log."""
        wait_until_reachable(self.context.paths.config)
        self.rows.append({**metrics, "timestamp_ms": time.time_ns() // 1_000_000})
        write_metrics(self.context.paths.metrics, self.rows)
        head = f"{'final' if metrics['final'] else 'epoch'} {metrics['epoch']}/{self.context.config.num_epochs}"
        log_metrics(head, metrics)

    def _latency_now(self, judged: Judged) -> EpochMetrics:
        """Return an estimate of the latency at the first profile batch size, taken again when the architecture has changed."""
        network, architecture = judged
        assert architecture is not None
        if self._latency is None or self._latency[0] != architecture:
            batch_size = self.context.config.profile.batch_sizes[0]
            latency = self.source.estimate(network, architecture, batch_size=batch_size)
            values = (latency.median_ms, latency.p10_ms, latency.p90_ms, latency.source)
            self._latency = architecture, dict(zip(LATENCY_COLUMNS, values, strict=True))
        return self._latency[1]
