"""Methods that gates are compared with, as steps of a training: Torch-Pruning's scores, and Group Fisher pruning without gates.

All of them close channels along a line of the MACs, from BEGIN_AT of the stage to the target at REACH_AT, as gates do under a
target. Torch-Pruning makes a smaller network of new parameters, so that momentum is lost on every cut: it cuts in bursts.

    tensor legend: N samples, C channels of all groups
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gator
from benchmarks.lab import Lab, count_macs
from gator.gating.loss import BEGIN_AT, REACH_AT
from orchestrator.config.trial import StageConfig, with_values
from orchestrator.datasets.loading import load_batches, random_batches
from orchestrator.training.loop import GateSteps, Training

NUM_BURSTS = 10
"""Torch-Pruning's cuts while it trains, at equal distances on the line."""
SMALL_STEPS = 400
"""Each burst is made in so small steps, shares of all channels, until the MACs are met: its own setting for CIFAR."""
TAYLOR_IMAGES, HESSIAN_IMAGES = 128, 16
"""Images of the gradients that Torch-Pruning takes before each small step."""
FISHER_MOMENTUM = 0.95
"""Of the running mean of the Fisher information, per step."""
OPEN_LOGIT = 50.0
"""Noise lies within 17.4: such a gate is open in every draw."""
TOLERANCE = 0.005
"""Share of the target by which Group Fisher may end below it."""
SCOPES: dict[str, dict[str, bool]] = {
    "isomorphic": {"global_pruning": True, "isomorphic": True},
    "local": {},
    "global": {"global_pruning": True},
}
"""Which channels Torch-Pruning ranks against each other: those of alike layers, of one layer, of all layers.

Its README warns that the last may prune single layers too far, and has the first against it. Here the Taylor score, ranked over all
layers, left one channel in the residual streams of the first and the last stage at 0.15 of the MACs: top-1 was 51.5 % on seed 0. Ranked
over alike layers, it was 87.5 %.
"""


def allowed_ratio(progress: float, target_ratio: float) -> float:
    """Return the share of the MACs that is left at this progress of the stage."""
    passed = min(max((progress - BEGIN_AT) / (REACH_AT - BEGIN_AT), 0.0), 1.0)
    return 1 - (1 - target_ratio) * passed


class GroupFisher(GateSteps):
    """Closes the channels of the least Fisher information per MAC, without noise and without learned gates.

    Source: Group Fisher pruning, Liu et al., ICML 2021, which divides by memory and closes a channel every 25 steps.
    """

    def __init__(self, gated: gator.GatedModel, cost: gator.CostModel, target_ratio: float) -> None:
        self.gated, self.cost, self.target_ratio = gated, cost, target_ratio
        self.fisher_C = torch.zeros_like(gated.gates.logits_C)
        with torch.no_grad():
            gated.gates.logits_C.fill_(OPEN_LOGIT)

    def param_groups(self, network: nn.Module, config: StageConfig) -> list[dict[str, Any]]:
        """Return the weights alone."""
        return super().param_groups(self.gated.network, config)

    def loss(self, task_loss: Tensor) -> Tensor:
        """Watch the gradient of the masks; the loss is the task's."""
        self.gated.mask_NC.register_hook(self._watch)
        return task_loss

    def _watch(self, gradient_NC: Tensor) -> None:
        square_C = (len(gradient_NC) * gradient_NC).square().mean(dim=0)  # the loss is a mean over the samples
        self.fisher_C.lerp_(square_C, 1 - FISHER_MOMENTUM)

    @torch.no_grad()
    def begin_step(self, progress: float, samples_per_rank: float) -> None:
        """Close channels until the cost is on the line; those too large for the target are passed over."""
        gates, allowed = self.gated.gates, allowed_ratio(progress, self.target_ratio) * self.cost.full
        floor = self.target_ratio * self.cost.full * (1 - TOLERANCE)
        weight_C = self.cost.relative_gradient(self.gated.kept_widths())[gates.group_C]
        order = (self.fisher_C / weight_C.clamp(min=1e-12)).masked_fill(~gates.keep_C, torch.inf).argsort()
        for channel in order[: int(gates.keep_C.sum())].tolist():
            if float(self.cost.of(self.gated.kept_widths())) <= allowed:
                return
            before_C = gates.keep_C.clone()
            gates.close(torch.arange(len(order)) == channel)
            if float(self.cost.of(self.gated.kept_widths())) < floor:
                gates.keep_C.copy_(before_C)


class Bursts(GateSteps):
    """Cuts the network itself while it trains, in NUM_BURSTS bursts."""

    def __init__(self, network: nn.Module, cut: Callable[..., nn.Module], target_ratio: float) -> None:
        """cut: brings the network to a share of the MACs and returns it; the last time, is_last, to the nearest one."""
        self.network, self.cut, self.target_ratio = network, cut, target_ratio
        self.num_done = 0

    def begin_epoch(self, training: Training, epoch: int) -> None:
        """Note the training, whose optimizer is to get the new parameters."""
        self.training = training

    def begin_step(self, progress: float, samples_per_rank: float) -> None:
        """Cut when a burst is due."""
        due = int(NUM_BURSTS * (1 - allowed_ratio(progress, 0.0)) + 1e-9)
        if due > self.num_done:
            self.num_done = due
            self.network = self.cut(1 - (1 - self.target_ratio) * due / NUM_BURSTS, is_last=due == NUM_BURSTS)
            self.training.replace_network(self.network)
            self.training.optimizer.param_groups[0]["params"] = list(self.network.parameters())
            self.training.optimizer.state.clear()


def cut_to(
    lab: Lab, network: nn.Module, pruner: Any, ratio: float, gradients: Callable[[], None], *, is_last: bool
) -> nn.Module:
    """Let the pruner step until the network is at the ratio or below; return it in training mode, without gradients.

    is_last: return the network before the last step if it is nearer to the ratio; the pruner cannot go on from it. A step may take a
    channel of a residual stream with all its layers: one was seen to take 0.034 of the MACs.
    """
    target = ratio * lab.macs.full
    before, macs_before = network, float("inf")
    while (macs := count_macs(network, lab.splits.input_shape)) > target:
        if is_last:
            before, macs_before = copy.deepcopy(network), macs
        network.train()
        gradients()
        pruner.step()
    if macs_before - target < target - macs:
        network = before
    network.train()
    network.zero_grad()
    return network


def make_pruner(
    lab: Lab, network: nn.Module, kind: Literal["group_norm", "taylor", "hessian"], scope: str, reg: float = 0.0
) -> Any:
    """Return Torch-Pruning's pruner of the network: down to nothing, in SMALL_STEPS steps."""
    import torch_pruning  # of the extra "bench"

    importance = {
        "group_norm": partial(torch_pruning.importance.GroupMagnitudeImportance, p=2, normalizer="max"),  # as for CIFAR
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "hessian": torch_pruning.importance.GroupHessianImportance,
    }[kind]()
    classifier = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    pruner_class = torch_pruning.pruner.GroupNormPruner if kind == "group_norm" else torch_pruning.pruner.BasePruner
    return pruner_class(
        network,
        torch.zeros(1, *lab.splits.input_shape),
        importance=importance,
        pruning_ratio=1.0,
        iterative_steps=SMALL_STEPS,
        ignored_layers=[classifier],
        **SCOPES[scope],
        **({"reg": reg} if kind == "group_norm" else {}),
    )


def group_norm(lab: Lab, ratio: float, reg: float, scope: str) -> nn.Module:
    """Train with the regulariser in place of weight decay, and cut by the norms of the groups, as Torch-Pruning's benchmark does."""
    network = copy.deepcopy(lab.base)
    pruner = make_pruner(lab, network, "group_norm", scope, reg)
    config = with_values(lab.config, {"gating.weight_decay": 0.0})
    lab.train(network, "gate", config, after_backward=lambda: pruner.regularize(network))
    return cut_to(lab, network, pruner, ratio, lambda: None, is_last=True)


def in_bursts(kind: Literal["taylor", "hessian"], lab: Lab, ratio: float, scope: str) -> nn.Module:
    """Cut while training by the Taylor or the Hessian score."""
    network = copy.deepcopy(lab.base)
    pruner = make_pruner(lab, network, kind, scope)
    cut = partial(cut_to, lab, network, pruner, gradients=partial(_GRADIENTS[kind], network, _batches(lab)))
    steps = Bursts(network, cut, ratio)
    lab.train(network, "gate", lab.config, gates=steps)
    return steps.network


def group_fisher(lab: Lab, ratio: float) -> nn.Module:
    """Cut by Group Fisher, closing channels while training."""
    network = copy.deepcopy(lab.base)
    gated = gator.GatedModel(network, lab.graph, gator.GateConfig(curvature=0.0, seed=lab.config.seed))
    lab.train(gated, "gate", lab.config, gates=GroupFisher(gated, lab.macs, ratio))
    return gated.prune()


def _batches(lab: Lab) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of TAYLOR_IMAGES training images without end."""
    seed = lab.config.seed
    while True:
        seed += 1_000_003
        parts = random_batches(lab.splits.train, num_batches=50, batch_size=TAYLOR_IMAGES, seed=seed)
        yield from load_batches(lab.splits.train, parts, device=torch.device("cpu"), num_loader_workers=0)


def _taylor_gradients(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    network.zero_grad()
    images, labels = next(batches)
    cross_entropy(network(images), labels).backward()


def _hessian_gradients(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Leave the mean of the squared gradients of single samples as each parameter's gradient.

    Its accumulate_grad() does so in Torch-Pruning; in 1.6.1 it looks up names in a dictionary of parameters, and keeps the last only.
    """
    images, labels = (part[:HESSIAN_IMAGES] for part in next(batches))
    parameters = list(network.parameters())
    losses = cross_entropy(network(images), labels, reduction="none")
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    for loss in losses:
        for square, gradient in zip(squares, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            square += gradient.square() / len(losses)
    for parameter, square in zip(parameters, squares, strict=True):
        parameter.grad = square


_GRADIENTS = {"taylor": _taylor_gradients, "hessian": _hessian_gradients}
