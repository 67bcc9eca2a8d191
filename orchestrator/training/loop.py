"""One epoch of training, on this process's share of the data. Plain PyTorch, no Ray.

Everything random derives from (seed, stage, epoch, step, rank) and everything scheduled from the step: an epoch that is
resumed after a restart is the same epoch, and a checkpoint holds neither generators nor schedules.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel

from orchestrator.config.trial import CONFIG_FIELDS, FinetuningConfig, Stage, StageConfig
from orchestrator.datasets.seeds import seed_everything
from orchestrator.errors import TrialError
from orchestrator.training.context import Context
from orchestrator.training.execution import Execution
from orchestrator.training.loaders import make_loader

# Reading a loss waits for the accelerator. Once in so many steps costs nothing and still ends a lost run early. Nothing is
# saved between two checks, so that the global generators have to be seeded at checks only.
STEPS_BETWEEN_CHECKS = 20


class LossNotFiniteError(TrialError):
    """The loss or a weight became NaN or infinite: raised on every rank at the same step. It would happen again in the same epoch."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher in addition to the labels. Source: Hinton, Vinyals and Dean, arXiv 1503.02531."""

    teacher: nn.Module
    """In eval mode, on the device of the network that learns."""
    weight: float
    """Share of the loss that comes from the teacher, in [0, 1]."""
    temperature: float
    """Above 0."""

    def loss(self, teacher_NK: Tensor, logits_NK: Tensor) -> Tensor:
        """Return temperature squared times KL(teacher || student) of their logits at that temperature, a mean over the images.

        The square keeps the size of the gradient when the temperature changes.
        """
        target_NK = log_softmax(teacher_NK.float() / self.temperature, dim=1)
        student_NK = log_softmax(logits_NK / self.temperature, dim=1)
        return self.temperature**2 * kl_div(student_NK, target_NK, reduction="batchmean", log_target=True)


class GateSteps:
    """What gates do around the steps of a training. This class itself is for networks without gates: it does nothing."""

    weight_now = 0.0
    """The pressure in force."""
    built: dict[str, Any] | None = None
    """Architecture.to_json() of the network under the gates."""
    parts: Mapping[str, nn.Module] = {}
    """What a checkpoint holds besides the network, by its name there."""

    def param_groups(self, network: nn.Module, config: StageConfig) -> list[dict[str, Any]]:
        """Return what SGD trains, each group with its own "lr"."""
        return [{"params": list(network.parameters()), "lr": config.lr, "weight_decay": config.weight_decay}]

    def begin_epoch(self, training: "Training", epoch: int) -> None:
        """Prepare for a whole epoch."""

    def begin_step(self, progress: float, samples_per_rank: float) -> None:
        """Prepare for a step of the optimizer. progress: of the stage, 0 in its first step and 1 in its last."""

    def seek(self, *, epoch: int, position: int, stride: int) -> None:
        """Note which images of the epoch's order come next: every stride-th, from the position on."""

    def loss(self, task_loss: Tensor) -> Tensor:
        """Return the loss of the latest forward pass with the gates' part added."""
        return task_loss


class MovingAverage(AveragedModel):
    """The exponential moving average of a network's weights, with the network's buffers.

    torch's own update copies its count to the device, for which the host waits, and buffers one by one.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Include the weights after a step; the first ones are taken as they are."""
        share = 1 - self.decay if self.n_averaged else 1.0  # the count is on the CPU
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), share)
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
        self.n_averaged += 1


class Training:
    """A network in one stage of its training, whose config says how long and at which learning rates.

    network: its parameters are trained in place.    gates: of a network under gates.
    distillation: what the network learns from in addition to the labels.
    """

    def __init__(
        self,
        network: nn.Module,
        stage: Stage,
        context: Context,
        *,
        gates: GateSteps | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        config: StageConfig = getattr(context.config, CONFIG_FIELDS[stage])
        ema_decay = config.ema_decay if isinstance(config, FinetuningConfig) else 0.0
        self.context, self.ranks = context, context.ranks
        self.stage: Stage = stage
        self.config = config
        self.gates = gates or GateSteps()
        self.distillation = distillation
        self.loader = make_loader(stage, context)
        self.execution = Execution.on(self.ranks.device, context.config.training)
        self.execution.lay_out(network)  # before it is copied
        self._teacher = None if distillation is None else self.execution.frozen(distillation.teacher)
        self.averaged = MovingAverage(network, ema_decay) if ema_decay else None
        self.optimizer = torch.optim.SGD(self.gates.param_groups(network, config), momentum=config.momentum)
        self.replace_network(network)
        self._mean_losses = torch.zeros(len(self.loader), device=self.ranks.device)
        self._global_batch_size = self.loader.batches.global_batch_size
        self._full_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def replace_network(self, network: nn.Module) -> None:
        """Train this network from now on, whose parameters the optimizer already holds."""
        self.execution.lay_out(network)
        self.network = network
        self._distributed = self.ranks.distribute(network)
        self._forward = self.execution.compiled(self._distributed)

    @property
    def result(self) -> nn.Module:
        """The network to judge and to keep. BatchNorm's statistics of an averaged one have to be estimated first."""
        return self.network if self.averaged is None else self.averaged.module

    def run_epoch(self, epoch: int, at_check: Callable[[], None] | None = None) -> float:
        """Train for one epoch (counted from 0), or for the rest of it, and return the mean loss over all ranks and steps.

        at_check: called on every rank once in STEPS_BETWEEN_CHECKS steps, with all steps so far in state_dict().
        Raises: LossNotFiniteError, on every rank; the weights are lost then.
        """
        ranks, num_steps = self.ranks, len(self.loader)
        is_midway = self.is_midway(epoch)
        if not is_midway:
            self.gates.begin_epoch(self, epoch)
        self.loader.seek(epoch)
        self._distributed.train()
        losses = self._mean_losses.clone() if is_midway else torch.zeros(num_steps, device=ranks.device)
        for step, (images, labels) in enumerate(self.loader, start=self.loader.step):
            if step % STEPS_BETWEEN_CHECKS == 0:
                seed_everything(self.context.config.seed, self.stage, epoch, ranks.rank, step)
            self._set_learning_rates(epoch + (step + 0.5) / num_steps)  # mid-step: no step is wasted at a rate of 0
            losses[step] = self._step(images, labels, epoch, step)
            if (step + 1) % STEPS_BETWEEN_CHECKS == 0 or step + 1 == num_steps:
                sums, size = ranks.sum(torch.cat([losses, self._size_of_weights()])).split([num_steps, 1])
                self._mean_losses = sums / ranks.world_size
                self._check_finite(step, epoch, size)
                if at_check is not None and step + 1 < num_steps:
                    at_check()
        return float(self._mean_losses.mean())

    def _step(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Tensor:
        """Take one step of the optimizer with this rank's batch, micro-batch by micro-batch, and return its loss, detached."""
        total = torch.zeros((), device=self.ranks.device)
        parts = self.execution.micro_batches(images, labels)
        self.gates.begin_step(self._progress(epoch, step), self._global_batch_size / self.ranks.world_size)
        begin = 0
        for index, (part, part_labels) in enumerate(parts):
            first = step * self._global_batch_size + begin * self.ranks.world_size + self.ranks.rank
            self.gates.seek(epoch=epoch, position=first, stride=self.ranks.world_size)
            with self._gradients_shared(is_last=index + 1 == len(parts)):
                # a mean over the ranks, whose shares may differ by an image, is to be one over the images
                share = len(part) * self.ranks.world_size / self._global_batch_size
                loss = self._loss(part, part_labels) * share
                loss.backward()
            total += loss.detach()
            begin += len(part)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)
        return total

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a forward pass: of the labels, of the teacher, of the gates."""
        with self.execution.autocast():
            logits = self._forward(images).float()
            loss = cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            if self.distillation is not None:
                assert self._teacher is not None
                with torch.no_grad():
                    teacher_NK = self._teacher(images)
                loss = torch.lerp(loss, self.distillation.loss(teacher_NK, logits), self.distillation.weight)
        return self.gates.loss(loss)

    def _gradients_shared(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass: with several micro-batches the ranks add up their gradients once."""
        if is_last or not isinstance(self._distributed, DistributedDataParallel):
            return nullcontext()
        return self._distributed.no_sync()

    def is_midway(self, epoch: int) -> bool:
        """Return whether the training is in the middle of this epoch."""
        return self.loader.epoch == epoch and 0 < self.loader.step < len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, as tensors and plain containers: right after an epoch, or at_check."""
        return {**{name: part.state_dict() for name, part in self._parts().items()}, "mean_losses": self._mean_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a training of the same shape."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._mean_losses = state["mean_losses"]

    def _parts(self) -> dict[str, Any]:
        parts = {"network": self.network, "optimizer": self.optimizer, "loader": self.loader, **self.gates.parts}
        return parts if self.averaged is None else {**parts, "averaged": self.averaged}

    def _set_learning_rates(self, epochs_done: float) -> None:
        factor = lr_factor(self.config, epochs_done)
        for group, full_lr in zip(self.optimizer.param_groups, self._full_lrs, strict=True):
            group["lr"] = full_lr * factor

    def _progress(self, epoch: int, step: int) -> float:
        """Return the progress of the stage: 0 in its first step, 1 in its last."""
        last_step = self.config.epochs * len(self.loader) - 1
        return (epoch * len(self.loader) + step) / last_step if last_step else 1.0

    def _size_of_weights(self) -> Tensor:
        """Return (1,) the norm of all that is trained: not finite if any of it is not."""
        return get_total_norm([param.detach() for param in self.network.parameters()]).to(self._mean_losses).view(1)

    def _check_finite(self, last_step: int, epoch: int, size: Tensor) -> None:
        """Raise LossNotFiniteError if a loss so far is not finite, or what the last step has made of the weights."""
        means = self._mean_losses[: last_step + 1]
        lost = (~means.isfinite()).nonzero().flatten()
        if not len(lost) and bool(size.isfinite()):
            return
        step = int(lost[0]) if len(lost) else last_step
        what = f"the loss is {float(means[step])} in" if len(lost) else "weights are not finite after"
        raise LossNotFiniteError(
            f"{what} epoch {epoch + 1}, step {step + 1} of {len(self.loader)}, of "
            f"stage {self.stage!r}, expected finite numbers; lower {CONFIG_FIELDS[self.stage]}.lr "
            f"(now {self.config.lr}) or warm it up; the last checkpoint is kept"
        )


def lr_factor(config: StageConfig, epochs_done: float) -> float:
    """Return what the schedule multiplies every learning rate by, after so many (fractional) epochs of the stage.

    >>> lr_factor(StageConfig(epochs=4, lr=0.1, schedule="cosine", warmup_epochs=0.0), 2.0)
    0.5
    """
    if epochs_done < config.warmup_epochs:
        return epochs_done / config.warmup_epochs
    if config.schedule == "constant":
        return 1.0
    done = (epochs_done - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return round(0.5 * (1 + math.cos(math.pi * done)), 12)
