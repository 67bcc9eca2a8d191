"""A network with gates on its channels, for training; in eval mode its outputs are exactly those of the pruned network."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from gator.costs.base import CostModel
from gator.errors import ArchitectureError, GateError
from gator.gating.gates import ChannelGates, GateConfig
from gator.gating.kept import Kept
from gator.gating.sites import Constants, GatedBatchNorm, Masks, gated_twin
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph
from gator.pruning.baselines import relative_magnitudes
from gator.pruning.prune import prune


class GatedModel(nn.Module):
    """`model` with one gate per channel of every group of `graph`.

    It shares model's parameters and buffers; model itself stays ungated and holds the trained weights, so prune(model, ...)
    prunes them. It starts in training mode, whatever model's mode is: each sample draws its mask; in eval mode open channels pass and
    closed ones do not.

    forward takes what model takes, batch first, and returns what model returns.
    Raises: GateError if the graph has no group that can be pruned, or was traced on another network; in a training pass under float16
    autocast, if loss_scale is not set.
    """

    body: "GatedBody"
    samples_per_step: float | None = None
    """Samples of an optimizer step on one rank, of whose mean loss `curvature` takes the squared gradients. None: those of the forward
    pass. To be set when a step has several micro-batches, or ranks unequal shares: the samples of all ranks over their number."""
    loss_scale: float | None = None
    """What the mean loss is multiplied by before backward(), other than by the share of a micro-batch: scaler.get_scale() of a
    GradScaler, in each step. None: 1."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, config: GateConfig | None = None) -> None:
        super().__init__()
        if not graph.groups:
            reasons = "; ".join(dict.fromkeys(locked.reason for locked in graph.locked)) or graph.why_empty
            raise GateError(f"{graph.model} has no channel group that can be pruned, expected at least one ({reasons})")
        if (mismatch := graph.mismatch(model)) is not None:
            raise GateError(mismatch)
        gates = ChannelGates(graph, config or GateConfig())
        if gates.config.magnitude_spread > 0:
            gates.spread_out(relative_magnitudes(model, graph))
        self._assemble(graph, gates, GatedBody.whole(model, graph))
        self.train()

    @classmethod
    def assembled(cls, graph: ChannelGraph, gates: ChannelGates, body: "GatedBody") -> Self:
        """Return a gated network made of gates for some of the graph's channels and a network that has only these."""
        gated = cls.__new__(cls)
        nn.Module.__init__(gated)
        gated._assemble(graph, gates, body)
        return gated

    def _assemble(self, graph: ChannelGraph, gates: ChannelGates, body: "GatedBody") -> None:
        self.graph = graph
        self.gates = gates
        self.__dict__["body"] = body  # no submodule: its parameters are the network's
        self._group_sizes = torch.bincount(gates.group_C, minlength=len(graph.groups)).tolist()
        self._masks = Masks()
        self.network = gated_twin(body.model, body.graph_with_gates(graph, gates), self._masks)
        self._widths_G, self._weight_G = Kept(), Kept()
        self._gradient_cost: CostModel | None = None
        self._settled_at: tuple[int, int] | None = None
        norms: list[Any] = [module for module in self.network.modules() if isinstance(module, GatedBatchNorm)]
        self._batch_norms = [norm for norm in norms if norm.num_batches_tracked is not None]
        # DistributedDataParallel sends rank 0's buffers to all ranks, but each has its own place in the data.
        self._ddp_params_and_buffers_to_ignore = ["gates.noise_at"]
        device = next((p.device for p in body.model.parameters()), torch.device("cpu"))
        self.gates.to(device)
        for module in self.network.modules():
            if isinstance(module, Constants):
                module.to(device)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the network's output under this pass's masks."""
        if self.training:
            if torch.compiler.is_compiling() or self._settled_at != self._logits_now():
                self.gates.settle()
            self._settled_at = None
            if counters := [norm.num_batches_tracked for norm in self._batch_norms if norm.training]:
                torch._foreach_add_(counters, 1)
        open_C = self.gates.open_C()
        first = next((x for x in (*inputs, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None:
            raise GateError("no input is a tensor, expected at least one, whose first dimension counts the samples")
        mask_NC = self.gates.sample(len(first)) if self.training else open_C[None]
        factor = self._curvature_factor(first) if self.training else 0.0
        self._fill(mask_NC, open_C, factor)
        return self.network(*inputs, **kwargs)

    def _curvature_factor(self, first: Tensor) -> float:
        """Return what SecondOrder multiplies squared gradients by."""
        curvature, device = self.gates.config.curvature, first.device.type
        if not curvature or not torch.is_grad_enabled():
            return 0.0
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if self.loss_scale is None and is_cast and torch.get_autocast_dtype(device) == torch.float16:
            raise GateError(
                "loss_scale is None under float16 autocast, where losses are scaled: the gates' gradient is not proportional to the "
                "loss; set gated.loss_scale = scaler.get_scale() before each forward pass, or 1.0 if nothing scales the loss"
            )
        return curvature / 2 * (self.samples_per_step or len(first)) / (self.loss_scale or 1.0)

    def under(self, mask_NC: Tensor, *inputs: Any, **kwargs: Any) -> Any:
        """Return the network's output under given masks, (N, C) or (1, C); the removed blocks are those of the gates."""
        self._fill(mask_NC, self.gates.open_C())
        return self.network(*inputs, **kwargs)

    def _fill(self, mask_NC: Tensor, open_C: Tensor, factor: float = 0.0) -> None:
        widths_G = self.gates.count(open_C)
        self._masks.fill(mask_NC, self.gates.alive_B(widths_G), self._group_sizes, factor)
        self._widths_G.get(lambda: widths_G, *self._sources_of_widths())

    def begin_step(self) -> None:
        """Note that gates were settled for the forward pass that follows, unless their logits change before."""
        self._settled_at = self._logits_now()

    def _logits_now(self) -> tuple[int, int]:
        return id(self.gates.logits_C), self.gates.logits_C._version

    @property
    def mask_NC(self) -> Tensor:
        """The (N, C) mask of the latest forward pass; (1, C) bool in eval mode."""
        assert self._masks.drawn_NC is not None, "no forward pass yet"
        return self._masks.drawn_NC

    def seek(self, *, epoch: int, position: int, stride: int = 1) -> None:
        """Set the samples of the next training batch, so that gate noise does not depend on the number of workers.

        epoch: any integer. position: place of this rank's first sample in the epoch's global order.
        stride: distance between this rank's samples in that order (the number of ranks under DistributedSampler).
        Without seek(), positions continue from batch to batch.
        """
        self.gates.seek(epoch, position, stride)

    def kept_widths(self) -> Tensor:
        """Return (G,) float64: open channels of each group, as eval mode and architecture() have them."""
        return self._widths_G.get(lambda: self.gates.count(self.gates.open_C()), *self._sources_of_widths())

    def _sources_of_widths(self) -> tuple[Tensor | None, ...]:
        gates = self.gates
        return gates.logits_C, gates.keep_C, gates.closable_C, self._masks.drawn_NC

    def group_weights(self, cost: CostModel) -> Tensor:
        """Return (G,) float64: W_g of this cost at the kept widths; computed once a step for the loss and the gradient."""
        widths_G = self.kept_widths()
        return self._weight_G.get(lambda: cost.relative_gradient(widths_G), widths_G, cost)

    def open_channels(self) -> int:
        """Return the number of open channels of all groups."""
        return int(self.gates.open_C().sum())

    def architecture(self) -> Architecture:
        """Return which channels are open now. Raises: GateError if a gate's logit is not finite."""
        self.gates.check_finite()
        return Architecture.from_keep(self.graph, self.keep_indices(self.gates.open_C()))

    def built_architecture(self) -> Architecture:
        """Return the channels that the network still has: all of them, until a re-cut."""
        return Architecture.from_keep(self.graph, self.keep_indices(torch.ones_like(self.gates.keep_C)))

    def prune(self) -> nn.Module:
        """Return what prune(model, graph, architecture()) returns for the trained weights, also after re-cuts."""
        self.gates.check_finite()
        return prune(self.body.model, self.body.graph, self.body.architecture(self.gates.open_C()))

    def keep_indices(self, channels_C: Tensor) -> dict[str, list[int]]:
        """Return a (C,) bool mask as kept channels by group name, numbered as in the graph."""
        all_channels = torch.zeros(self.graph.num_channels, dtype=torch.bool)
        all_channels[self.gates.origin_C[channels_C].cpu()] = True
        return self.graph.keep_of(all_channels)

    @torch.no_grad()
    def load_architecture(self, architecture: Architecture) -> None:
        """Close the channels that the architecture removes, and open those that it keeps.

        Raises: ArchitectureError if it does not fit, or keeps channels that a re-cut has removed.
        """
        keep = self.channels_of(architecture)
        self.gates.keep_C.copy_(keep)
        self.gates.logits_C.masked_fill_(keep & (self.gates.logits_C < 0), 0.0)

    def channels_of(self, architecture: Architecture) -> Tensor:
        """Return the (C,) bool mask of the channels that an architecture keeps. Raises: ArchitectureError, as load_architecture()."""
        architecture.check_fits(self.graph)
        keep = self.graph.mask_of(architecture.keep).to(self.gates.keep_C.device)
        channels_C = keep[self.gates.origin_C]
        if int(keep.sum()) > int(channels_C.sum()):
            lost = int(keep.sum()) - int(channels_C.sum())
            raise ArchitectureError(
                f"the architecture keeps {lost} channels that a re-cut has removed from the network, expected a part of "
                "built_architecture(); load it into a GatedModel of the unpruned network"
            )
        return channels_C

    def param_groups(
        self, lr: float, gate_lr_scale: float = 0.2, cost: CostModel | None = None, weight_decay: float = 1e-4
    ) -> list[dict[str, Any]]:
        """Return parameter groups for SGD: the network's weights, then the gates.

        The paper divides each group's learning rate by W_g = dC/dn_g / C(full). With `cost` given, the gates' gradient is
        divided by W_g instead, which is the same for SGD and keeps one learning rate for all gates: lr * gate_lr_scale. Their
        weight decay is divided by gate_lr_scale, so that it takes lr * weight_decay off a logit per step, as off any weight.
        """
        if not gate_lr_scale > 0:
            raise GateError(f"gate_lr_scale is {gate_lr_scale}, expected a number above 0")
        self.divide_gradient_by(cost)
        weights = [p for p in self.network.parameters() if p.requires_grad]
        return [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": [self.gates.logits_C], "lr": lr * gate_lr_scale, "weight_decay": weight_decay / gate_lr_scale},
        ]

    @property
    def gradient_cost(self) -> CostModel | None:
        """The cost by whose derivative the gates' gradient is divided; None for a plain gradient."""
        return self._gradient_cost

    def divide_gradient_by(self, cost: CostModel | None) -> None:
        """Divide the gates' gradient by W_g of this cost from now on; None stops that.

        Raises: GateError if the cost is of another network.
        """
        if cost is not None:
            self.check_is_cost_of_this(cost)
        logits_C: Any = self.gates.logits_C
        if cost is not None and logits_C.requires_grad and not getattr(logits_C, "is_rescaled", False):
            logits_C.register_hook(self._rescale_gradient)
            logits_C.is_rescaled = True  # on the parameter: a copy of it has neither the hook nor this
        self._gradient_cost = cost

    def check_is_cost_of_this(self, cost: CostModel) -> None:
        """Raise GateError if a cost is of another network."""
        if cost.graph is not self.graph and cost.graph.fingerprint != self.graph.fingerprint:
            raise GateError(
                f"the cost is of a {cost.graph.model} with fingerprint {cost.graph.fingerprint}, the gates are of a {self.graph.model} "
                f"with fingerprint {self.graph.fingerprint}; make the cost from the graph of the gated network"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose gates need a hook of their own."""
        super().__setstate__(state)
        self.divide_gradient_by(self._gradient_cost)

    def _rescale_gradient(self, gradient_C: Tensor) -> Tensor:
        if self._gradient_cost is None:
            return gradient_C
        weight_G = self.group_weights(self._gradient_cost)
        factor_G = torch.where(
            weight_G > 0, 1 / weight_G, 0
        )  # W_g = 0: all its neighbours are removed, so there is nothing to learn
        return gradient_C * factor_G.to(gradient_C.dtype)[self.gates.group_C]


NO_GATE = -1
"""In place of a gate's index: the channel can be pruned only since a re-cut has removed what had locked it, so it stays."""


@dataclass(frozen=True, eq=False)
class GatedBody:
    """The plain network under the gates, and which gate each of its channels has."""

    model: nn.Module
    graph: ChannelGraph
    """Of `model`: after a re-cut not the graph of the gates."""
    gate_of_channel: Tensor
    """(channels of `graph`,) int64: index of the channel's gate, or NO_GATE."""

    @classmethod
    def whole(cls, model: nn.Module, graph: ChannelGraph) -> Self:
        """Return the network that has every channel of the graph."""
        return cls(model, graph, torch.arange(graph.num_channels))

    def architecture(self, open_C: Tensor) -> Architecture:
        """Return which channels of `graph` have an open gate, or none."""
        is_open = torch.cat([open_C.cpu(), torch.tensor([True])])  # at index NO_GATE, the last
        return Architecture.from_keep(self.graph, self.graph.keep_of(is_open[self.gate_of_channel]))

    def gated_blocks(self, gate_graph: ChannelGraph, gates: ChannelGates) -> dict[str, str | None]:
        """Return the blocks of `graph` that have gates, with the names of those in the gates' graph."""
        found = {}
        for block in self.graph.blocks:
            parts = [self.gate_of_channel[self.graph.offsets[name] :][:1] for name in block.groups]
            gate = int(torch.cat(parts).max())
            if gate != NO_GATE:
                found[block.name] = gate_graph.groups[int(gates.group_C[gate])].block
        return found

    def graph_with_gates(self, gate_graph: ChannelGraph, gates: ChannelGates) -> ChannelGraph:
        """Return `graph` with its sites reading the masks of the gates, and the blocks of the gates' graph."""
        block_of = self.gated_blocks(gate_graph, gates)
        numbers = torch.cat([self.gate_of_channel, torch.tensor([-1])])  # index -1 stays -1
        sites = (
            replace(
                site, channels=numbers[site.channels], block=None if site.block is None else block_of.get(site.block)
            )
            for site in self.graph.sites
        )
        with_gates = tuple(site for site in sites if site.block is not None or bool((site.channels >= 0).any()))
        return replace(self.graph, sites=with_gates, blocks=gate_graph.blocks)
