"""The stages of one trial: gate -> prune -> fine-tune -> measure.

After every epoch, and within long ones, the trial is saved as a Checkpoint, and what that says is complete is skipped on a rerun.
"""

import json
import logging
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import gator
from gator.costs.summary import widths_csv
from gator.gating.check import check_pruning
from orchestrator.config.metrics import SPREAD_METRICS
from orchestrator.datasets import splits as datasets
from orchestrator.errors import ConfigError, TrialError
from orchestrator.latency.curve import Curve
from orchestrator.latency.sources import make_source, measure_latencies
from orchestrator.models import networks as models_networks
from orchestrator.models import saved as models_saved
from orchestrator.models.networks import build_traced
from orchestrator.storage.files import wait_until_reachable, write_atomic
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import EpochMetrics, read_metrics, write_metrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.epochs import Stopwatch, log_metrics, plain_training, resume, saver_of
from orchestrator.training.evaluation import accuracy_of, calibration_batches, reestimate_batchnorm
from orchestrator.training.execution import Execution
from orchestrator.training.loaders import make_loader
from orchestrator.training.loop import Distillation, Training
from orchestrator.training.ranks import broadcast_state
from orchestrator.training.saver import Session, checkpoint_of
from orchestrator.trial import start_from as chain
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.plain_choices import choose, data_of

"""Of an epoch's row; without a spread where the latency is predicted, not timed."""
logger = logging.getLogger(__name__)
TARGET_TOLERANCE = 0.01
"""Relative distance to a target within which it counts as met."""


class TrialStages:
    """One trial on one rank: what its stages share."""

    def __init__(self, assignment: Assignment, session: Session) -> None:
        assert assignment.base_weights is not None
        self.config = assignment.config
        self.is_elastic = assignment.is_elastic
        self.session = session
        self.ranks = session.ranks
        self.paths = TrialPaths(assignment.folder)
        self.splits = datasets.load(data_of(self.config), self.config.seed)
        self.network, self.graph = build_traced(self.config.model, self.splits.input_shape)
        self.base_weights = assignment.base_weights
        self.keeps_cut = assignment.keeps_cut
        models_saved.load_base(self.network, self.base_weights)
        self.network.to(self.ranks.device)
        self.costs = TrialCosts(self.config, self.graph, self.ranks.device)
        curve = None if assignment.latency_curve is None else Curve.from_json(assignment.latency_curve.read_bytes())
        self.clock = make_source(
            self.config, self.splits.input_shape, self.costs.macs, self.ranks.device, curve, self.costs.timed_here()
        )
        self.saver = saver_of(assignment.config, TrialPaths(assignment.folder), session)
        self.rows: list[EpochMetrics] = []
        self.reported: gator.Architecture | None = None
        self.last_latency: tuple[gator.Architecture, EpochMetrics] | None = None

    def run(self, checkpoint: Checkpoint | None) -> EpochMetrics:
        """Run the stages that the checkpoint does not show as complete, and return the final metrics."""
        if checkpoint is not None:
            self._recall(checkpoint)
        if checkpoint is None or checkpoint.stage == "gate":
            pruned, architecture = self._choose(checkpoint)
        else:
            architecture = gator.Architecture.from_json(checkpoint.architecture)
            pruned = gator.prune(self.network, self.graph, architecture)
        return self._measure(self._finetune(pruned, architecture, checkpoint), architecture)

    def _choose(self, checkpoint: Checkpoint | None) -> tuple[nn.Module, gator.Architecture]:
        """Return the network as cut for fine-tuning, by learned gates or by a plain choice."""
        if self.config.pruning.choice == "gates":
            return self._prune(self._gate(checkpoint))
        architecture = choose(self.config, self.network, self.costs.macs)
        pruned = gator.prune(self.network, self.graph, architecture)
        reestimate_batchnorm(pruned, self.config, self.splits, self.ranks)
        return pruned, architecture

    def _gate(self, checkpoint: Checkpoint | None) -> gator.GatedModel:
        """Train the network under its gates; after each epoch report the network as pruned now."""
        config = self.config.gating
        gate_config = gator.GateConfig(
            init_keep_prob=config.init_keep_prob,
            magnitude_spread=config.magnitude_spread,
            seed=self.config.seed,
            sampling=config.sampling,
        )
        gated = gator.GatedModel(self.network, self.graph, gate_config)
        if config.start_from is not None:
            chain.start(gated, self.network, self.config.model, TrialPaths(Path(config.start_from)))
            self._refuse_passed_target(gated.architecture())
        if checkpoint is not None and checkpoint.built is not None:
            gated = gator.recut(gated, architecture=gator.Architecture.from_json(checkpoint.built))
        cost = self.costs.pressure()
        param_groups = gated.param_groups(config.lr, config.gate_lr_scale, cost, config.weight_decay)
        training = Training(
            gated,
            param_groups,
            make_loader(
                self.splits.train,
                self.config.data,
                stage="gate",
                seed=self.config.seed,
                ranks=self.ranks,
                is_elastic=self.is_elastic,
            ),
            stage="gate",
            config=config,
            seed=self.config.seed,
            ranks=self.ranks,
            gate_loss=gator.GateLoss(
                cost,
                config.loss_weight,
                target_ratio=config.target_ratio,
                target=config.target_ms,
                target_cost=self.costs.target(),
            ),
            execution=Execution.on(self.ranks.device, self.config.training),
        )
        for epoch in range(resume(training, checkpoint), config.epochs):
            laps = Stopwatch()
            is_recut_due = config.recut_every is not None and epoch > 0 and epoch % config.recut_every == 0
            if is_recut_due and not training.is_midway(epoch):
                gated = gator.recut(gated, training.optimizer)
                training.go_on_with(gated)
            loss = self._run_epoch(training, epoch, self.reported)
            laps.end("train_s")
            architecture = self._agreed_architecture(gated)
            self._end_epoch(training, epoch, loss, self._cut(gated), architecture, laps)
        return gated

    def _refuse_passed_target(self, architecture: gator.Architecture) -> None:
        """Raise ConfigError if what the stage starts from has fewer channels left than its target asks for."""
        cost, target = self.costs.target(), self.costs.target_value()
        if target is not None and cost(architecture) < target * (1 - TARGET_TOLERANCE):
            raise ConfigError(
                f"gating.start_from: {self.config.gating.start_from} is at {cost(architecture) / cost.full:.4g} of the full cost "
                f"already, below the target {target / cost.full:.4g}, and closed channels do not open again; "
                "give a trial with more left, or a lower target"
            )

    def _prune(self, gated: gator.GatedModel) -> tuple[nn.Module, gator.Architecture]:
        """Cut what the gates closed, and check that the cut network is the gated one and costs what was counted."""
        architecture = self._agreed_architecture(gated)
        step = self.costs.alignment()
        if step != 1:
            gated.load_architecture(self._aligned(gated, step))
            architecture = self._agreed_architecture(gated)
        if self.ranks.rank == 0:
            self._tell_missed_target(architecture)
            try:
                check_pruning(gated, architecture, self.costs.macs, self._some_images())
            except gator.PruneError as error:
                raise TrialError(str(error)) from error
            chain.save_gates(gated, self.paths)
        pruned = self._cut(gated)
        if self.ranks.rank == 0 and self.keeps_cut:
            chain.save_cut(pruned, architecture, gated, self.paths.cut)
        return pruned, architecture

    def _aligned(self, gated: gator.GatedModel, step: int | dict[str, int]) -> gator.Architecture:
        """Return an architecture near the open channels, in steps; as it is where no such one lies within the target."""
        cost, target = self.costs.target(), self.costs.target_value()
        limit = None if target is None else target / cost.full
        try:
            return gator.aligned(gated, cost, step, limit)
        except gator.GateError as error:
            logger.warning("widths stay as they are, not in the steps of pruning.align: %s", error)
            return gated.architecture()

    def _tell_missed_target(self, architecture: gator.Architecture) -> None:
        """Log where the gates have come to if that is not their target, and what the cheapest step from there would be."""
        cost, target = self.costs.target(), self.costs.target_value()
        if target is None or abs(cost(architecture) / target - 1) <= TARGET_TOLERANCE:
            return
        logger.warning(
            "gating ended at %.4g of the full cost, the nearest to its target %.4g that its gates have come to; the cheapest open "
            "channel is %.2g of it",
            cost(architecture) / cost.full,
            target / cost.full,
            _cheapest_channel(cost, architecture) / cost.full,
        )

    def _finetune(
        self, pruned: nn.Module, architecture: gator.Architecture, checkpoint: Checkpoint | None
    ) -> nn.Module:
        """Train the plain pruned network, and return what it has become.

        The last epoch's weights, or their running mean, are the trial's: choosing would fit the holdout.
        """
        config = self.config.finetuning
        training = plain_training(
            pruned,
            "finetune",
            self.config,
            config,
            self.splits,
            self.ranks,
            is_elastic=self.is_elastic,
            distillation=self._distillation(),
            ema_decay=config.ema_decay,
        )
        for epoch in range(resume(training, checkpoint), config.epochs):
            laps = Stopwatch()
            loss = self._run_epoch(training, epoch, architecture)
            laps.end("train_s")
            reestimate_batchnorm(training.result, self.config, self.splits, self.ranks)
            self._end_epoch(training, epoch, loss, training.result, architecture, laps)
        return training.result

    def _distillation(self) -> Distillation | None:
        """Return the base network as a teacher, a copy of its own: gating has trained self.network further."""
        config = self.config.finetuning.distillation
        if config.weight == 0:
            return None
        teacher = models_networks.build(self.config.model.model_copy(update={"weights": None}))
        models_saved.load_base(teacher, self.base_weights)
        teacher.to(self.ranks.device).eval().requires_grad_(False)
        return Distillation(teacher=teacher, weight=config.weight, temperature=config.temperature)

    def _measure(self, pruned: nn.Module, architecture: gator.Architecture) -> EpochMetrics:
        """Save the network and measure what was saved: accuracy on the val split, latency with all repeats."""
        laps = Stopwatch()
        broadcast_state(pruned, self.ranks)
        if self.ranks.rank == 0:
            gator.save_pruned(pruned, architecture, self.paths.root)
            write_atomic(self.paths.widths, widths_csv(self.graph, architecture))
        accuracy = accuracy_of(pruned, self.splits.val, self.config, self.ranks)
        laps.end("eval_s")
        metrics: EpochMetrics = {}
        if self.ranks.rank == 0:
            latencies = measure_latencies(self.clock, pruned, architecture, self.config.profile)
            laps.end("measure_s")
            metrics = {**self.rows[-1], **accuracy, **latencies, **laps.seconds, "train_s": 0.0, "final": True}
            self._write_row(metrics)
        done = Checkpoint(
            stage="done",
            epochs_done=0,
            world_size=self.ranks.world_size,
            architecture=architecture.to_json(),
            metrics=metrics,
        )
        self.saver.save(metrics, done)
        return metrics

    def _run_epoch(self, training: Training, epoch: int, architecture: gator.Architecture | None) -> float:
        """Train for an epoch, saved on the way when it is time to, and return the mean loss. architecture: as checkpoint_of's."""
        metrics = self.rows[-1] if self.rows else {}
        midway = partial(checkpoint_of, training, epochs_done=epoch, metrics=metrics, architecture=architecture)
        return training.run_epoch(epoch, partial(self.saver.check, midway))

    def _end_epoch(
        self,
        training: Training,
        epoch: int,
        loss: float,
        pruned: nn.Module,
        architecture: gator.Architecture,
        laps: Stopwatch,
    ) -> None:
        """Evaluate the network as pruned now, report, and save the trial."""
        accuracy = accuracy_of(pruned, self.splits.holdout, self.config, self.ranks)
        laps.end("eval_s")
        metrics: EpochMetrics = {}
        if self.ranks.rank == 0:
            latency = self._latency_now(pruned, architecture)
            laps.end("measure_s")
            metrics = {
                "epoch": epoch + 1 + (self.config.gating_epochs if training.stage == "finetune" else 0),
                "stage": training.stage,
                "gating_epochs": self.config.gating_epochs,
                "num_epochs": self.config.num_epochs,
                "loss": loss,
                **accuracy,
                **latency,
                **self.costs.size(architecture),
                "open_channels": sum(architecture.widths.values()),
                "loss_weight": 0.0 if training.gate_loss is None else float(training.gate_loss.weight_now),
                "target_ratio": self.config.gating.target_ratio,
                "architecture": architecture.digest,
                **laps.seconds,
                "final": False,
            }
            self._write_row(metrics)
        self.reported = architecture
        self.saver.save(
            metrics, checkpoint_of(training, epochs_done=epoch + 1, metrics=metrics, architecture=architecture)
        )

    def _recall(self, checkpoint: Checkpoint) -> None:
        """Take over what was known at the checkpoint: the architecture, the rows up to it, and its latency."""
        if checkpoint.architecture is not None:
            self.reported = gator.Architecture.from_json(checkpoint.architecture)
        metrics = checkpoint.metrics
        if self.ranks.rank != 0 or not metrics:  # in the middle of the first epoch nothing was reported
            return
        self.rows = [
            row for row in read_metrics(self.paths.metrics) if row["epoch"] <= metrics["epoch"] and not row["final"]
        ]
        if self.reported is not None and self.reported.digest == metrics["architecture"]:
            self.last_latency = self.reported, {name: metrics[name] for name in SPREAD_METRICS if name in metrics}

    def _write_row(self, metrics: EpochMetrics) -> None:
        """Add the time to the metrics, and the metrics to metrics.parquet and the log."""
        wait_until_reachable(self.paths.config)
        metrics["timestamp_ms"] = time.time_ns() // 1_000_000
        self.rows.append(metrics)
        write_metrics(self.paths.metrics, self.rows)
        head = f"{'final' if metrics['final'] else 'epoch'} {metrics['epoch']}/{self.config.num_epochs}"
        log_metrics(head, metrics)

    def _agreed_architecture(self, gated: gator.GatedModel) -> gator.Architecture:
        """Return what is open now; raises TrialError if the ranks, whose gates see the same gradients, do not agree."""
        architecture = gated.architecture()
        logits = gated.gates.logits_C.detach().cpu().numpy().tobytes().hex()  # open or not, and how close to it
        if not self.ranks.all_agree(json.dumps(architecture.to_json(), sort_keys=True) + logits):
            raise TrialError(
                f"the gates of the {self.ranks.world_size} workers differ, expected the same after every step; "
                "their gradients were not shared, please report it"
            )
        return architecture

    def _cut(self, gated: gator.GatedModel) -> nn.Module:
        """Return the network as pruned now, a physical copy with its own BatchNorm statistics."""
        pruned = gated.prune()
        reestimate_batchnorm(pruned, self.config, self.splits, self.ranks)
        return pruned

    def _latency_now(self, pruned: nn.Module, architecture: gator.Architecture) -> EpochMetrics:
        """Return an estimate of the latency at the first profile batch size, made anew when the architecture changed."""
        if self.last_latency is None or self.last_latency[0] != architecture:
            latency = self.clock.estimate(pruned, architecture, batch_size=self.config.profile.batch_sizes[0])
            values = (latency.median_ms, latency.p10_ms, latency.p90_ms)
            self.last_latency = architecture, dict(zip(SPREAD_METRICS, values, strict=True))
        return self.last_latency[1]

    def _some_images(self) -> Tensor:
        """Return a few training images, the same ones on every rank."""
        batches = calibration_batches(
            self.splits.train, num_batches=1, batch_size=8, seed=self.config.seed, device=self.ranks.device
        )
        return next(batches)


def _cheapest_channel(cost: gator.CostModel, architecture: gator.Architecture) -> float:
    """Return the least that one open channel takes of the cost, of all groups that have more than one."""
    widths = torch.tensor(list(architecture.widths.values()), dtype=torch.float64)
    now = float(cost.of(widths))
    fewer = [
        widths - torch.eye(len(widths), dtype=torch.float64)[place]
        for place in (widths > 1).nonzero().flatten().tolist()
    ]
    return min((now - float(cost.of(one)) for one in fewer), default=now)
