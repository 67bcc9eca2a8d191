"""What each worker of a trial runs, by stages: gate -> prune -> fine-tune -> measure; for the base network: pretrain.

All ranks run the same code and meet in the collectives; rank 0 alone writes files, reads clocks and speaks. After every
epoch, and within long ones, the trial is saved as a Checkpoint, and what that says is complete is skipped on a rerun: a trial that is done
answers with its final metrics at once. The stages reach Ray through a Session only, so that they also run without it.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint as RayCheckpoint
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gator
from orchestrator import chain, datasets, models
from orchestrator.assignment import Assignment
from orchestrator.baselines import choose, data_of
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import StageConfig, TrialConfig
from orchestrator.errors import (
    ClusterError,
    ConfigError,
    DamagedCheckpointError,
    LatencyTableError,
    OrchestratorError,
    TrialError,
    UserError,
)
from orchestrator.execution import Execution
from orchestrator.latency_files import read_table
from orchestrator.loop import (
    Distillation,
    LossNotFiniteError,
    Shard,
    Stage,
    Training,
    broadcast_state,
    calibration_batches,
    evaluate,
    make_loader,
    seed_everything,
)
from orchestrator.masking import MaskingFormatter
from orchestrator.measure import Curve, build_traced, make_clock, measure_latencies
from orchestrator.paths import BasePaths, TrialPaths, wait_until_reachable, write_atomic
from orchestrator.records import read_metrics, write_metrics
from orchestrator.saver import Metrics, Saver, Session, StoppedError, checkpoint_of
from orchestrator.widths import widths_csv

logger = logging.getLogger(__name__)

# float32, and layers of other widths add in another order: relative to the largest logit.
PRUNING_TOLERANCE = 1e-3


class RaySession:
    """The session of a Ray Train worker."""

    def __init__(self) -> None:
        self.shard = Shard.current(ray.train.torch.get_device())

    def restore(self) -> Checkpoint | None:
        """Read the checkpoint that Ray Train kept."""
        kept = ray.train.get_checkpoint()
        if kept is None:
            return None
        with kept.as_directory() as folder:
            return Checkpoint.load(Path(folder), self.shard.device)

    def report(self, metrics: Metrics, checkpoint: Checkpoint) -> None:
        """Report to Ray Train, which copies rank 0's folder into the run's storage; a barrier between the ranks."""
        if self.shard.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder))
            ray.train.report(metrics, checkpoint=RayCheckpoint.from_directory(folder))


def train_loop_per_worker(assignment: dict[str, Any]) -> Metrics:
    """Run an Assignment's stages on this Ray Train worker and return its last metrics (rank 0's count).

    An error that all ranks meet alike would be met again by a new group of workers. Ray Train retries what is raised,
    so it is returned instead: {"error": message, "is_user_error": bool}. So is {"stopped": True}, as somebody asked.
    """
    try:
        return run_assignment(Assignment.from_dict(assignment), RaySession())
    except StoppedError:
        return {"stopped": True}
    except (LossNotFiniteError, gator.GateError, ConfigError, ClusterError, LatencyTableError) as error:
        return {"error": f"{assignment['name']}: {error}", "is_user_error": isinstance(error, UserError)}


def run_assignment(assignment: Assignment, session: Session) -> Metrics:
    """Run what the session's checkpoint does not show as complete, and return the last metrics."""
    seed_everything(assignment.config.seed, "start", 0, session.shard.rank)
    _check_folder_is_shared(assignment, session.shard)
    TrialPaths(assignment.folder).refuse_links()
    with _log_file(TrialPaths(assignment.folder).log, session.shard):
        checkpoint = _restore(session)
        if checkpoint is not None and checkpoint.stage == "done":
            return checkpoint.metrics
        _check_world_size(checkpoint, session.shard)
        try:
            stages = (
                BaseTraining(assignment, session) if assignment.base_weights is None else Trial(assignment, session)
            )
            return stages.run(checkpoint)
        except OrchestratorError as error:
            level = logging.INFO if isinstance(error, StoppedError) else logging.ERROR
            logger.log(level, "%s", error)  # also for the log file, which outlives this process
            raise


def _restore(session: Session) -> Checkpoint | None:
    """Return the last checkpoint; None, on every rank, at the start or if it is damaged for any of them."""
    checkpoint, damage = None, None
    try:
        checkpoint = session.restore()
    except DamagedCheckpointError as error:
        damage = error
    if session.shard.sum(torch.tensor(int(damage is not None))) == 0:
        return checkpoint
    logger.warning("trains from the start, the last checkpoint is damaged: %s", damage or "so says another worker")
    return None


class BaseTraining:
    """The training of the network that the trials start from."""

    def __init__(self, assignment: Assignment, session: Session) -> None:
        self.config = assignment.config
        self.session = session
        self.shard = session.shard
        self.paths = BasePaths(assignment.folder)
        self.splits = datasets.load(self.config.data, self.config.seed)
        self.network = models.build(self.config.model).to(self.shard.device)
        self.saver = _saver(assignment, session)

    def run(self, checkpoint: Checkpoint | None) -> Metrics:
        """Train, save the weights, and return the metrics of the last epoch, on the held-out images."""
        config = self.config.pretraining
        training = _plain_training(self.network, "pretrain", self.config, config, self.splits, self.shard)
        metrics = {} if checkpoint is None else checkpoint.metrics
        for epoch in range(_resume(training, checkpoint), config.epochs):
            laps = _Laps()
            midway = partial(checkpoint_of, training, epochs_done=epoch, metrics=metrics)
            loss = training.run_epoch(epoch, partial(self.saver.check, midway))
            laps.end("train_s")
            _reestimate_batchnorm(self.network, self.config, self.splits, self.shard)
            accuracy = _accuracy(self.network, self.splits.holdout, self.config, self.shard)
            laps.end("eval_s")
            metrics = {"epoch": epoch + 1, "stage": "pretrain", "loss": loss, **accuracy, **laps.seconds}
            _log_metrics(f"epoch {epoch + 1}/{config.epochs}", metrics)
            self.saver.save(metrics, checkpoint_of(training, epochs_done=epoch + 1, metrics=metrics))
        if self.shard.rank == 0:
            save_base(self.network, self.paths)
        return metrics


class Trial:
    """One trial on one rank: what its stages share."""

    def __init__(self, assignment: Assignment, session: Session) -> None:
        assert assignment.base_weights is not None
        self.config = assignment.config
        self.session = session
        self.shard = session.shard
        self.paths = TrialPaths(assignment.folder)
        self.splits = datasets.load(data_of(self.config), self.config.seed)
        self.network, self.graph = build_traced(self.config.model, self.splits.input_shape)
        self.base_weights = assignment.base_weights
        self.network.load_state_dict(load_file(self.base_weights))
        self.network.to(self.shard.device)
        self.macs, self.params = gator.MacsCost(self.graph), gator.ParamsCost(self.graph)
        self.unpruned_macs = self._unpruned_macs()
        curve = None if assignment.latency_curve is None else Curve.from_json(assignment.latency_curve.read_bytes())
        self.clock = make_clock(self.config, self.splits.input_shape, self.macs, self.shard.device, curve)
        self.saver = _saver(assignment, session)
        self.rows: list[Metrics] = []
        self.reported: gator.Architecture | None = None
        self.last_latency: tuple[gator.Architecture, float] | None = None

    def run(self, checkpoint: Checkpoint | None) -> Metrics:
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
        architecture = choose(self.config, self.network, self.macs)
        pruned = gator.prune(self.network, self.graph, architecture)
        _reestimate_batchnorm(pruned, self.config, self.splits, self.shard)
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
        if checkpoint is not None and checkpoint.built is not None:
            gated = gator.recut(gated, architecture=gator.Architecture.from_json(checkpoint.built))
        cost = self._cost()
        param_groups = gated.param_groups(config.lr, config.gate_lr_scale, cost, config.weight_decay)
        training = Training(
            gated,
            param_groups,
            make_loader(self.splits.train, self.config.data, stage="gate", seed=self.config.seed, shard=self.shard),
            stage="gate",
            config=config,
            seed=self.config.seed,
            shard=self.shard,
            gate_loss=gator.GateLoss(
                cost,
                config.loss_weight,
                target_ratio=config.target_ratio,
                target=config.target_ms,
                target_cost=self._target_cost(),
            ),
            execution=Execution.on(self.shard.device, self.config.training),
        )
        for epoch in range(_resume(training, checkpoint), config.epochs):
            laps = _Laps()
            is_recut_due = config.recut_every is not None and epoch > 0 and epoch % config.recut_every == 0
            if is_recut_due and not training.is_midway(epoch):
                gated = gator.recut(gated, training.optimizer)
                training.go_on_with(gated)
            loss = self._run_epoch(training, epoch, self.reported)
            laps.end("train_s")
            architecture = self._agreed_architecture(gated)
            self._end_epoch(training, epoch, loss, self._cut(gated), architecture, laps)
        return gated

    def _prune(self, gated: gator.GatedModel) -> tuple[nn.Module, gator.Architecture]:
        """Cut what the gates closed, and check that the cut network is the gated one and costs what was counted."""
        architecture = self._agreed_architecture(gated)
        step = self._alignment()
        if step != 1:
            cost = self._target_cost()
            target, ratio = self.config.gating.target_ms, self.config.gating.target_ratio
            limit = ratio if target is None else target / cost.full
            gated.load_architecture(gator.aligned(gated, cost, step, limit))
            architecture = self._agreed_architecture(gated)
        if self.shard.rank == 0:
            self._check_pruning(gated, architecture)
            chain.save_gates(gated, self.paths)
        return self._cut(gated), architecture

    def _finetune(
        self, pruned: nn.Module, architecture: gator.Architecture, checkpoint: Checkpoint | None
    ) -> nn.Module:
        """Train the plain pruned network, and return what it has become.

        The last epoch's weights, or their running mean, are the trial's: choosing would fit the holdout.
        """
        config = self.config.finetuning
        training = _plain_training(
            pruned,
            "finetune",
            self.config,
            config,
            self.splits,
            self.shard,
            distillation=self._distillation(),
            ema_decay=config.ema_decay,
        )
        for epoch in range(_resume(training, checkpoint), config.epochs):
            laps = _Laps()
            loss = self._run_epoch(training, epoch, architecture)
            laps.end("train_s")
            _reestimate_batchnorm(training.result, self.config, self.splits, self.shard)
            self._end_epoch(training, epoch, loss, training.result, architecture, laps)
        return training.result

    def _distillation(self) -> Distillation | None:
        """Return the base network as a teacher, a copy of its own: gating has trained self.network further."""
        config = self.config.finetuning.distillation
        if config.weight == 0:
            return None
        teacher = models.build(self.config.model.model_copy(update={"weights": None}))
        teacher.load_state_dict(load_file(self.base_weights))
        teacher.to(self.shard.device).eval().requires_grad_(False)
        return Distillation(teacher=teacher, weight=config.weight, temperature=config.temperature)

    def _measure(self, pruned: nn.Module, architecture: gator.Architecture) -> Metrics:
        """Save the network and measure what was saved: accuracy on the val split, latency with all repeats."""
        laps = _Laps()
        broadcast_state(pruned, self.shard)
        if self.shard.rank == 0:
            gator.save_pruned(pruned, architecture, self.paths.root)
            write_atomic(self.paths.widths, widths_csv(self.graph, architecture))
        accuracy = _accuracy(pruned, self.splits.val, self.config, self.shard)
        laps.end("eval_s")
        metrics: Metrics = {}
        if self.shard.rank == 0:
            latencies = measure_latencies(self.clock, pruned, architecture, self.config.profile)
            laps.end("measure_s")
            metrics = {**self.rows[-1], **accuracy, **latencies, **laps.seconds, "train_s": 0.0, "final": True}
            self._write_row(metrics)
        done = Checkpoint(
            stage="done",
            epochs_done=0,
            world_size=self.shard.world_size,
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
        laps: "_Laps",
    ) -> None:
        """Evaluate the network as pruned now, report, and save the trial."""
        accuracy = _accuracy(pruned, self.splits.holdout, self.config, self.shard)
        laps.end("eval_s")
        metrics: Metrics = {}
        if self.shard.rank == 0:
            latency_ms = self._latency_now(pruned, architecture)
            laps.end("measure_s")
            metrics = {
                "epoch": epoch + 1 + (self.config.gating_epochs if training.stage == "finetune" else 0),
                "stage": training.stage,
                "loss": loss,
                **accuracy,
                "latency_ms": latency_ms,
                **self._size(architecture),
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
        if self.shard.rank != 0 or not metrics:  # in the middle of the first epoch nothing was reported
            return
        self.rows = [
            row for row in read_metrics(self.paths.metrics) if row["epoch"] <= metrics["epoch"] and not row["final"]
        ]
        if self.reported is not None and self.reported.digest == metrics["architecture"]:
            self.last_latency = self.reported, metrics["latency_ms"]

    def _write_row(self, metrics: Metrics) -> None:
        """Add the time to the metrics, and the metrics to metrics.parquet and the log."""
        wait_until_reachable(self.paths.config)
        metrics["timestamp_ms"] = time.time_ns() // 1_000_000
        self.rows.append(metrics)
        write_metrics(self.paths.metrics, self.rows)
        head = f"{'final' if metrics['final'] else 'epoch'} {metrics['epoch']}/{self.config.num_epochs}"
        _log_metrics(head, metrics)

    def _agreed_architecture(self, gated: gator.GatedModel) -> gator.Architecture:
        """Return what is open now; raises TrialError if the ranks, whose gates see the same gradients, do not agree."""
        architecture = gated.architecture()
        logits = gated.gates.logits_C.detach().cpu().numpy().tobytes().hex()  # open or not, and how close to it
        if not self.shard.all_agree(json.dumps(architecture.to_json(), sort_keys=True) + logits):
            raise TrialError(
                f"the gates of the {self.shard.world_size} workers differ, expected the same after every step; "
                "their gradients were not shared, please report it"
            )
        return architecture

    def _cut(self, gated: gator.GatedModel) -> nn.Module:
        """Return the network as pruned now, a physical copy with its own BatchNorm statistics."""
        pruned = gated.prune()
        _reestimate_batchnorm(pruned, self.config, self.splits, self.shard)
        return pruned

    def _check_pruning(self, gated: gator.GatedModel, architecture: gator.Architecture) -> None:
        """Raise TrialError unless the pruned network answers like the gated one and runs the counted multiply-adds."""
        images = next(
            calibration_batches(
                self.splits.train, num_batches=1, batch_size=8, seed=self.config.seed, device=self.shard.device
            )
        )
        pruned = gated.prune().eval()
        gated.eval()
        # TensorFloat-32 would round the two networks' convolutions differently, to three digits.
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            expected = gated(images)
            difference = float((pruned(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            with FlopCounterMode(display=False) as counter:
                pruned(images[:1])
        if not difference <= PRUNING_TOLERANCE:
            raise TrialError(
                f"the logits of the pruned network and the gated one differ by {difference:.2g} of the largest, "
                f"expected at most {PRUNING_TOLERANCE:g}; gator cuts this network wrongly, please report it"
            )
        counted, priced = counter.get_total_flops() // 2, round(self.macs(architecture))
        if counted != priced:
            raise TrialError(
                f"the pruned network runs {counted} multiply-adds, MacsCost says {priced}; "
                "gator's graph misses a layer, please report it"
            )

    def _latency_now(self, pruned: nn.Module, architecture: gator.Architecture) -> float:
        """Return an estimate of the latency at the first profile batch size, made anew when the architecture changed."""
        if self.last_latency is None or self.last_latency[0] != architecture:
            batch_size = self.config.profile.batch_sizes[0]
            self.last_latency = architecture, self.clock.estimate(pruned, architecture, batch_size=batch_size)
        return self.last_latency[1]

    def _size(self, architecture: gator.Architecture) -> Metrics:
        macs = self.macs(architecture)
        return {
            "macs": round(macs),
            "macs_ratio": float(macs / self.unpruned_macs),
            "params": round(self.params(architecture)),
        }

    def _unpruned_macs(self) -> float:
        """Return what macs_ratio is a share of: the whole network's multiply-adds at data.image_size."""
        if self.config.pruning.choice != "smaller_image":
            return self.macs.full
        size = self.config.data.image_size
        return build_traced(self.config.model, (3, size, size))[1].full_macs

    def _alignment(self) -> int | dict[str, int]:
        """Return what widths are to be multiples of; with auto each group's own step where a latency table tells it."""
        align = self.config.pruning.align
        if align != "auto":
            return align
        if self.config.profile.latency_table is not None:
            return self._latency_cost().hardware_steps()
        return gator.hardware_step(self.shard.device)

    def _cost(self) -> gator.CostModel:
        """Return the mixture that gating.cost asks for; with a target in milliseconds the latency itself."""
        weights = self.config.gating.cost
        if self.config.gating.target_ms is not None:
            return self._latency_cost()
        parts: dict[gator.CostModel, float] = {
            self.macs: weights.macs,
            self.params: weights.params,
            gator.MemoryCost(self.graph): weights.memory,
        }
        if weights.latency > 0:
            parts[self._latency_cost()] = weights.latency
        return gator.MixedCost({part: weight for part, weight in parts.items() if weight > 0})

    def _target_cost(self) -> gator.CostModel:
        """Return what the target is a target of."""
        return self.macs if self.config.gating.target_of == "macs" else self._cost()

    def _latency_cost(self) -> gator.LatencyCost:
        """Return the cost of profile.latency_table. Raises: LatencyTableError if the table is not one for this network."""
        profile = self.config.profile
        assert profile.latency_table is not None
        table = read_table(Path(profile.latency_table))
        if table.conditions.batch_size != profile.batch_sizes[0]:
            raise LatencyTableError(
                f"{profile.latency_table} holds for batch size {table.conditions.batch_size}, profile.batch_sizes begins "
                f"with {profile.batch_sizes[0]}; measure a table for that size, or put the table's first"
            )
        try:
            cost = gator.LatencyCost(self.graph, table)
        except gator.LatencyError as error:
            raise LatencyTableError(f"{profile.latency_table}: {error}") from error
        logger.info("%s: %.4g ms unpruned, %s", table.conditions.device, cost.full, cost.calibration)
        return cost


class _Laps:
    """Wall seconds of the parts of an epoch, one after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """Say what the time since the last call was spent on."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def save_base(network: nn.Module, paths: BasePaths) -> None:
    """Write the state dict of a base network."""
    write_atomic(
        paths.weights, save({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    )


def _plain_training(
    network: nn.Module,
    stage: Stage,
    config: TrialConfig,
    stage_config: StageConfig,
    splits: datasets.DataSplits,
    shard: Shard,
    **options: Any,
) -> Training:
    """Return the training of a network without gates; options are passed on to Training."""
    group = {"params": list(network.parameters()), "lr": stage_config.lr, "weight_decay": stage_config.weight_decay}
    loader = make_loader(splits.train, config.data, stage=stage, seed=config.seed, shard=shard)
    return Training(
        network,
        [group],
        loader,
        stage=stage,
        config=stage_config,
        seed=config.seed,
        shard=shard,
        execution=Execution.on(shard.device, config.training),
        **options,
    )


def _saver(assignment: Assignment, session: Session) -> Saver:
    every_s = assignment.config.training.checkpoint_every_s
    return Saver(session, every_s=every_s, stop_file=TrialPaths(assignment.folder).stop)


def _resume(training: Training, checkpoint: Checkpoint | None) -> int:
    """Put the training where the checkpoint left it, if it is one of this stage; return the epoch to go on with."""
    if checkpoint is None or checkpoint.stage != training.stage:
        return 0
    training.load_state_dict(checkpoint.tensors)
    loader = training.loader
    midway = f" and {loader.step} of {len(loader)} steps" if training.is_midway(checkpoint.epochs_done) else ""
    logger.info("goes on after %d epochs%s of stage %r", checkpoint.epochs_done, midway, checkpoint.stage)
    return checkpoint.epochs_done


def _reestimate_batchnorm(network: nn.Module, config: TrialConfig, splits: datasets.DataSplits, shard: Shard) -> None:
    """Replace BatchNorm's statistics by those of the current weights, the same on every rank.

    Leaves the network in eval mode. The running statistics lag behind weights that move fast, differ between ranks, and
    under gates belong to sampled masks.
    """
    evaluation = config.evaluation
    batches = calibration_batches(
        splits.train,
        num_batches=evaluation.bn_batches,
        batch_size=evaluation.batch_size,
        seed=config.seed,
        device=shard.device,
    )
    gator.reestimate_batchnorm(network, batches)


def _accuracy(network: nn.Module, split: datasets.ImageDataset, config: TrialConfig, shard: Shard) -> Metrics:
    accuracy = evaluate(
        network,
        split,
        batch_size=config.evaluation.batch_size,
        shard=shard,
        num_loader_workers=config.data.num_loader_workers,
    )
    return vars(accuracy)


def _log_metrics(prefix: str, metrics: Metrics) -> None:
    """Log how an epoch went: "epoch 3/7 gate loss 1.92 top1 41 latency_ms 0.82 ... train_s 2.1"."""
    shown = ("loss", "top1", "latency_ms", "macs_ratio", "open_channels", "train_s", "eval_s", "measure_s")
    values = " ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
    logger.info("%s %s %s", prefix, metrics["stage"], values)


def _check_world_size(checkpoint: Checkpoint | None, shard: Shard) -> None:
    """Raise ClusterError, on every rank, if another number of workers trained the checkpoint.

    The split of each global batch and BatchNorm's batches would change in the middle of a stage.
    """
    if checkpoint is not None and checkpoint.world_size != shard.world_size:
        raise ClusterError(
            f"the checkpoint was trained by {checkpoint.world_size} workers, now there are {shard.world_size}; set the "
            f"cluster's workers_per_trial back to {checkpoint.world_size}, the checkpoint is kept"
        )


def _check_folder_is_shared(assignment: Assignment, shard: Shard) -> None:
    """Raise ClusterError, on every rank, unless every rank sees the config.json that the driver wrote.

    Ray would find out when a worker restarts elsewhere, and then by a FileNotFoundError.
    """
    config = TrialPaths(assignment.folder).config
    num_seeing = int(shard.sum(torch.tensor(int(config.is_file()))))
    if num_seeing < shard.world_size:
        raise ClusterError(
            f"{config} was written by the driver, but only {num_seeing} of {shard.world_size} workers see it; "
            "the cluster's storage must be a folder that every node mounts"
        )


@contextmanager
def _log_file(path: Path, shard: Shard) -> Iterator[None]:
    """Send what rank 0 logs to the file as well, behind what earlier attempts left there."""
    if shard.rank != 0:
        yield
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("orchestrator")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
