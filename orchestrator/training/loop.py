"""One epoch of training and an exact evaluation, on this process's share of the data. Plain PyTorch, no Ray.

Everything random derives from (seed, stage, epoch, step, rank) and everything scheduled from the step: an epoch that is
gone on with after a restart is the same epoch, and a checkpoint holds neither generators nor schedules.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gator
from orchestrator.config.trial import CONFIG_FIELDS, Stage, StageConfig
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.seeds import seed_everything
from orchestrator.errors import TrialError
from orchestrator.training.execution import Execution
from orchestrator.training.ranks import Ranks

# Reading a loss waits for the accelerator. Once in so many steps costs nothing and still ends a lost run early. Between two
# checks nothing is saved, so that the global generators have to be seeded at checks only.
STEPS_BETWEEN_CHECKS = 20


class LossNotFiniteError(TrialError):
    """The loss or a weight became NaN or infinite: raised on every rank at the same step. The same epoch would meet it again."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher beside the labels. Source: Hinton, Vinyals and Dean, arXiv 1503.02531."""

    teacher: nn.Module
    """In eval mode, on the device of the network that learns."""
    weight: float
    """Share of the loss that comes from the teacher, in [0, 1]."""
    temperature: float
    """Above 0."""

    def loss(self, images: Tensor, logits_NK: Tensor) -> Tensor:
        """Return temperature squared times KL(teacher || student) at that temperature, a mean over the images.

        The square keeps the size of the gradient when the temperature changes.
        """
        with torch.no_grad():
            target_NK = log_softmax(self.teacher(images) / self.temperature, dim=1)
        student_NK = log_softmax(logits_NK / self.temperature, dim=1)
        return self.temperature**2 * kl_div(student_NK, target_NK, reduction="batchmean", log_target=True)


class Training:
    """A network in one stage of its training.

    network: a plain classifier or, with gate_loss, a GatedModel. Its parameters are trained in place.
    param_groups: for SGD, each with its own "lr", which the schedule multiplies.
    distillation: what the network learns from beside the labels.
    ema_decay: above 0, `result` has the running mean of the weights.
    """

    def __init__(
        self,
        network: nn.Module,
        param_groups: list[dict[str, Any]],
        loader: TrainLoader,
        *,
        stage: Stage,
        config: StageConfig,
        seed: int,
        ranks: Ranks,
        gate_loss: gator.GateLoss | None = None,
        distillation: Distillation | None = None,
        ema_decay: float = 0.0,
        execution: Execution | None = None,
    ) -> None:
        self.execution = execution or Execution(device=ranks.device)
        self.execution.lay_out(network)
        self.network = network
        self.loader = loader
        self.stage: Stage = stage
        self.config = config
        self.seed = seed
        self.ranks = ranks
        self.gate_loss = gate_loss
        self.distillation = distillation
        self.averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None
        self.optimizer = torch.optim.SGD(param_groups, momentum=config.momentum)
        self._distributed = ranks.distribute(network)
        self._forward = self.execution.compiled(self._distributed)
        self._mean_losses = torch.zeros(len(loader), device=ranks.device)
        self._global_batch_size = loader.batches.global_batch_size
        self._full_lrs = [group["lr"] for group in self.optimizer.param_groups]

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
        self.loader.seek(epoch)
        self._distributed.train()
        losses = self._mean_losses.clone() if is_midway else torch.zeros(num_steps, device=ranks.device)
        for step, (images, labels) in enumerate(self.loader, start=self.loader.step):
            if step % STEPS_BETWEEN_CHECKS == 0:
                seed_everything(self.seed, self.stage, epoch, ranks.rank, step)
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
        if self.gate_loss is not None:
            self.gate_loss.begin_step(self.network, self._progress(epoch, step))  # type: ignore[arg-type]  # a GatedModel then
        begin = 0
        for index, (part, part_labels) in enumerate(parts):
            if self.gate_loss is not None:
                first = step * self._global_batch_size + begin * self.ranks.world_size + self.ranks.rank
                self.network.seek(  # type: ignore[operator]  # a GatedModel, as there is a gate_loss
                    epoch=epoch, position=first, stride=self.ranks.world_size
                )
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
                loss = torch.lerp(loss, self.distillation.loss(images, logits), self.distillation.weight)
        if self.gate_loss is not None:
            loss = loss + self.gate_loss(self.network)
        return loss

    def _gradients_shared(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass: with several micro-batches the ranks add up their gradients once."""
        if is_last or not isinstance(self._distributed, DistributedDataParallel):
            return nullcontext()
        return self._distributed.no_sync()

    def is_midway(self, epoch: int) -> bool:
        """Return whether the training stands in the middle of this epoch."""
        return self.loader.epoch == epoch and 0 < self.loader.step < len(self.loader)

    def go_on_with(self, network: nn.Module) -> None:
        """Train this network from now on, whose parameters the optimizer already holds."""
        self.execution.lay_out(network)
        self.network = network
        self._distributed = self.ranks.distribute(network)
        self._forward = self.execution.compiled(self._distributed)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on, as tensors and plain containers: right after an epoch, or at_check."""
        state: dict[str, Any] = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "mean_losses": self._mean_losses,
        }
        if self.gate_loss is not None:
            state["gate_loss"] = self.gate_loss.state_dict()
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a training of the same shape."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self._mean_losses = state["mean_losses"]
        if self.gate_loss is not None:
            self.gate_loss.load_state_dict(state["gate_loss"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])

    def _set_learning_rates(self, epochs_done: float) -> None:
        factor = lr_factor(self.config, epochs_done)
        for group, full_lr in zip(self.optimizer.param_groups, self._full_lrs, strict=True):
            group["lr"] = full_lr * factor

    def _progress(self, epoch: int, step: int) -> float:
        """Return where the stage stands: 0 in its first step, 1 in its last."""
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
