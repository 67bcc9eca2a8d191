"""The stage under gates: they are trained, what they closed is pruned, and the pruned network is checked."""

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gator
from gator.gating.check import check_pruning
from orchestrator.config.trial import StageConfig
from orchestrator.datasets.loading import load_batches
from orchestrator.errors import ConfigError, TrialError
from orchestrator.models import start_from
from orchestrator.storage.paths import TrialPaths
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.context import Context
from orchestrator.training.epochs import Judged, Record, run_stage
from orchestrator.training.evaluation import reestimate_batchnorm
from orchestrator.training.loaders import num_samples
from orchestrator.training.loop import GateSteps, Training
from orchestrator.trial.costs import TrialCosts

logger = logging.getLogger(__name__)
TARGET_TOLERANCE = 0.01
"""Relative distance to a target within which it counts as met."""


class GatedSteps(GateSteps):
    """The gates of a GatedModel in the steps of its training."""

    def __init__(self, gated: gator.GatedModel, costs: TrialCosts) -> None:
        self.gated = gated
        self.config = config = costs.config.gating
        self.cost = costs.pressure()
        self.gate_loss = gator.GateLoss(
            self.cost,
            config.loss_weight,
            target_ratio=config.target_ratio,
            target=config.target_ms,
            target_cost=costs.target(),
        )
        self.parts = {"gate_loss": self.gate_loss}

    @property
    def weight_now(self) -> float:  # type: ignore[override]
        """The pressure in force."""
        return self.gate_loss.weight_now

    @property
    def built(self) -> dict[str, Any]:  # type: ignore[override]
        """Architecture.to_json() of the network that is left after re-cuts."""
        return self.gated.built_architecture().to_json()

    def param_groups(self, network: nn.Module, config: StageConfig) -> list[dict[str, Any]]:
        """Return the groups of the network's weights and of its gates."""
        return self.gated.param_groups(config.lr, self.config.gate_lr_scale, self.cost, config.weight_decay)

    def begin_epoch(self, training: Training, epoch: int) -> None:
        """Remove the closed channels from the network that is trained, where gating.recut_every says so."""
        every = self.config.recut_every
        if every is not None and epoch > 0 and epoch % every == 0:
            self.gated = gator.recut(self.gated, training.optimizer)
            training.replace_network(self.gated)

    def begin_step(self, progress: float, samples_per_rank: float) -> None:
        """Let the target's control act."""
        self.gated.samples_per_step = samples_per_rank
        self.gate_loss.begin_step(self.gated, progress)

    def seek(self, *, epoch: int, position: int, stride: int) -> None:
        """Draw the gates' noise for these images, however many workers share them."""
        self.gated.seek(epoch=epoch, position=position, stride=stride)

    def loss(self, task_loss: Tensor) -> Tensor:
        """Return the task's loss and the gates'."""
        loss: Tensor = task_loss + self.gate_loss(self.gated)
        return loss


class GatingStage:
    """The gating stage of a trial on one rank."""

    def __init__(self, context: Context, network: nn.Module, costs: TrialCosts, *, keeps_cut: bool) -> None:
        self.context = context
        self.keeps_cut = keeps_cut
        self.config = context.config.gating
        self.network = network
        self.costs = costs

    def run(self, checkpoint: Checkpoint | None, record: Record) -> tuple[nn.Module, gator.Architecture]:
        """Train the gates and return the network as pruned for fine-tuning; after each epoch the network as pruned then is judged."""
        steps = GatedSteps(self._gated(checkpoint), self.costs)
        cut: Judged | None = None

        def judge(epoch: int) -> Judged:
            nonlocal cut
            cut = self._cut(steps.gated, is_last=epoch + 1 == self.config.epochs)
            return cut

        run_stage(Training(steps.gated, "gate", self.context, gates=steps), checkpoint, record, judge)
        step = self.costs.alignment()
        if step != 1:
            steps.gated.load_architecture(self._aligned(steps.gated, step))
        if step != 1 or cut is None:  # no epoch was left to train
            cut = self._cut(steps.gated, is_last=True)
        network, architecture = cut
        assert architecture is not None
        if self.context.ranks.rank == 0:
            self._report_missed_target(architecture)
            start_from.save_gates(steps.gated, self.context.paths)
            if self.keeps_cut:
                start_from.save_cut(network, architecture, steps.gated, self.context.paths.cut)
        return network, architecture

    @cached_property
    def _target(self) -> float | None:
        """Where the target's cost is to end, as a share of the full cost."""
        value = self.costs.target_value()
        return None if value is None else value / self.costs.target().full

    def _gated(self, checkpoint: Checkpoint | None) -> gator.GatedModel:
        """Return the network under its gates: new ones, those of gating.start_from, or as built when the checkpoint was taken."""
        config = self.config
        gate_config = gator.GateConfig(
            init_keep_prob=config.init_keep_prob,
            magnitude_spread=config.magnitude_spread,
            curvature=config.curvature,
            seed=self.context.config.seed,
            sampling=config.sampling,
        )
        gated = gator.GatedModel(self.network, self.costs.graph, gate_config)
        if config.start_from is not None:
            start_from.start(gated, self.network, self.context.config.model, TrialPaths(Path(config.start_from)))
            self._refuse_passed_target(gated.architecture())
        if checkpoint is not None and checkpoint.built is not None:
            gated = gator.recut(gated, architecture=gator.Architecture.from_json(checkpoint.built))
        return gated

    def _refuse_passed_target(self, architecture: gator.Architecture) -> None:
        """Raise ConfigError if the network that the stage starts from has fewer channels left than its target asks for."""
        cost, target = self.costs.target(), self.costs.target_value()
        if target is not None and cost(architecture) < target * (1 - TARGET_TOLERANCE):
            raise ConfigError(
                f"gating.start_from: {self.config.start_from} is at {cost(architecture) / cost.full:.4g} of the full cost "
                f"already, below the target {target / cost.full:.4g}, and closed channels do not open again; "
                "give a trial with more left, or a lower target"
            )

    def _cut(self, gated: gator.GatedModel, *, is_last: bool) -> Judged:
        """Return a physical copy of what is open, with its own BatchNorm statistics. is_last: check it, it is to be kept."""
        architecture = self._agreed_architecture(gated)
        pruned = gated.prune()
        if is_last and self.context.ranks.rank == 0:
            try:
                check_pruning(gated, pruned, self.costs.graph, architecture, self._some_images())
            except gator.PruneError as error:
                raise TrialError(str(error)) from error
        reestimate_batchnorm(pruned, self.context)
        return Judged(pruned, architecture)

    def _agreed_architecture(self, gated: gator.GatedModel) -> gator.Architecture:
        """Return what is open now; raises TrialError if the ranks, whose gates see the same gradients, do not agree."""
        architecture, ranks = gated.architecture(), self.context.ranks
        logits = gated.gates.logits_C.detach().cpu().numpy().tobytes().hex()  # open or not, and how close to it
        if not ranks.all_agree(json.dumps(architecture.to_json(), sort_keys=True) + logits):
            raise TrialError(
                f"the gates of the {ranks.world_size} workers differ, expected the same after every step; "
                "their gradients were not shared, please report it"
            )
        return architecture

    def _some_images(self) -> Tensor:
        validation = self.context.splits.validation
        indices = list(range(min(8, num_samples(validation))))
        images, _ = next(load_batches(validation, [indices], device=self.context.ranks.device))
        return images

    def _aligned(self, gated: gator.GatedModel, step: int | dict[str, int]) -> gator.Architecture:
        """Return an architecture near the open channels, in steps; the open ones where no such one is within the target."""
        try:
            return gator.aligned(gated, self.costs.target(), step, self._target)
        except gator.GateError as error:
            logger.warning("widths are not aligned to the steps of pruning.round_to: %s", error)
            return gated.architecture()

    def _report_missed_target(self, architecture: gator.Architecture) -> None:
        """Log at which cost the gates have ended if that is not their target, and what the cheapest further channel would save."""
        cost, target = self.costs.target(), self.costs.target_value()
        if target is None or abs(cost(architecture) / target - 1) <= TARGET_TOLERANCE:
            return
        logger.warning(
            "gating ended at %.4g of the full cost (target %.4g); the cheapest channel left would save %.2g",
            cost(architecture) / cost.full,
            target / cost.full,
            _cheapest_channel(cost, architecture) / cost.full,
        )


def _cheapest_channel(cost: gator.CostModel, architecture: gator.Architecture) -> float:
    """Return the least that one open channel takes of the cost, of all groups that have more than one."""
    widths = torch.tensor(list(architecture.widths.values()), dtype=torch.float64)
    now = float(cost.of(widths))
    fewer = [
        widths - torch.eye(len(widths), dtype=torch.float64)[place]
        for place in (widths > 1).nonzero().flatten().tolist()
    ]
    return min((now - float(cost.of(one)) for one in fewer), default=now)
