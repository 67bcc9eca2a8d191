"""A network with gates on its channels, for training; in eval mode it is the pruned network, number for number."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from gator.architecture import Architecture
from gator.baselines import relative_magnitudes
from gator.costs import CostModel
from gator.errors import ArchitectureError, GateError
from gator.gated_norm import gated_batch_norm, is_foldable
from gator.gates import ChannelGates, GateConfig
from gator.graph import ChannelGraph, GateSite, Step
from gator.pruning import prune
from gator.writing import Rewrite, write_forward


class GatedModel(nn.Module):
    """`model` with one gate per channel of every group of `graph`.

    It shares model's parameters and buffers; model itself stays ungated and sees the trained weights, so prune(model, ...)
    cuts what was trained. In training mode each sample draws its mask; in eval mode open channels pass and closed ones do not.

    forward takes what model takes, batch first, and returns what model returns.
    Raises: GateError if the graph has no group that can be cut, or was traced on another network.
    """

    body: "Body"

    def __init__(self, model: nn.Module, graph: ChannelGraph, config: GateConfig | None = None) -> None:
        super().__init__()
        if not graph.groups:
            reasons = "; ".join(dict.fromkeys(locked.reason for locked in graph.locked)) or "it has no channels"
            raise GateError(f"{graph.model} has no channel group that could be cut, expected at least one ({reasons})")
        if (mismatch := graph.mismatch(model)) is not None:
            raise GateError(mismatch)
        gates = ChannelGates(graph, config or GateConfig())
        if gates.config.magnitude_spread > 0:
            gates.spread_out(relative_magnitudes(model, graph))
        self._assemble(graph, gates, Body.whole(model, graph))

    @classmethod
    def assembled(cls, graph: ChannelGraph, gates: ChannelGates, body: "Body") -> Self:
        """Return a gated network made of gates for some of the graph's channels and a network that has only these."""
        gated = cls.__new__(cls)
        nn.Module.__init__(gated)
        gated._assemble(graph, gates, body)
        return gated

    def _assemble(self, graph: ChannelGraph, gates: ChannelGates, body: "Body") -> None:
        self.graph = graph
        self.gates = gates
        self.__dict__["body"] = body  # no submodule: its parameters are the network's
        self._group_sizes = torch.bincount(gates.group_C, minlength=len(graph.groups)).tolist()
        self._masks = _Masks()
        self.network = _twin(body.model, body.graph_with_gates(graph, gates), self._masks)
        self._gradient_cost: CostModel | None = None
        self._has_gradient_hook = False
        # DistributedDataParallel sends rank 0's buffers to all ranks, but each has its own place in the data.
        self._ddp_params_and_buffers_to_ignore = ["gates.noise_at"]
        device = next((p.device for p in body.model.parameters()), torch.device("cpu"))
        self.gates.to(device)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the network's output under this pass's masks."""
        if self.training:
            self.gates.settle()
        open_C = self.gates.open_C()
        mask_NC = self.gates.sample(inputs[0].shape[0]) if self.training else open_C[None]
        self._masks.fill(mask_NC, self.gates.alive_B(self.gates.count(open_C)), self._group_sizes)
        return self.network(*inputs, **kwargs)

    @property
    def mask_NC(self) -> Tensor:
        """The (N, C) mask of the latest forward pass; (1, C) bool in eval mode."""
        assert self._masks.mask_NC is not None, "no forward pass yet"
        return self._masks.mask_NC

    def seek(self, *, epoch: int, position: int, stride: int = 1) -> None:
        """Say which samples the next training batch holds, so that gate noise does not depend on the number of workers.

        epoch: any integer. position: place of this rank's first sample in the epoch's global order.
        stride: distance between this rank's samples in that order (the number of ranks under DistributedSampler).
        Without seek(), positions go on from batch to batch.
        """
        self.gates.seek(epoch, position, stride)

    def kept_widths(self) -> Tensor:
        """Return (G,) float64: open channels of each group, as eval mode and architecture() have them."""
        return self.gates.count(self.gates.open_C())

    def open_channels(self) -> int:
        """Return the number of open channels of all groups."""
        return int(self.gates.open_C().sum())

    def architecture(self) -> Architecture:
        """Return which channels are open now. Raises: GateError if a gate's logit is not finite."""
        self.gates.check_finite()
        return Architecture.from_keep(self.graph, self.keep_indices(self.gates.open_C()))

    def built_architecture(self) -> Architecture:
        """Return the channels that have not been cut out: all of them, until a re-cut."""
        return Architecture.from_keep(self.graph, self.keep_indices(torch.ones_like(self.gates.keep_C)))

    def prune(self) -> nn.Module:
        """Return what prune(model, graph, architecture()) returns for the trained weights, also after re-cuts."""
        self.gates.check_finite()
        return prune(self.body.model, self.body.graph, self.body.architecture(self.gates.open_C()))

    def keep_indices(self, channels_C: Tensor) -> dict[str, list[int]]:
        """Return a (C,) bool mask as kept channels by group name, numbered as in the graph."""
        all_channels = torch.zeros(self.graph.num_channels, dtype=torch.bool)
        all_channels[self.gates.origin_C[channels_C].cpu()] = True
        parts = all_channels.split([group.num_channels for group in self.graph.groups])
        return {
            group.name: part.nonzero().flatten().tolist() for group, part in zip(self.graph.groups, parts, strict=True)
        }

    @torch.no_grad()
    def load_architecture(self, architecture: Architecture) -> None:
        """Close what the architecture leaves out, and open again what it keeps.

        Raises: ArchitectureError if it does not fit, or keeps what a re-cut has removed.
        """
        keep = self.channels_of(architecture)
        self.gates.keep_C.copy_(keep)
        self.gates.logits_C.masked_fill_(keep & (self.gates.logits_C < 0), 0.0)

    def channels_of(self, architecture: Architecture) -> Tensor:
        """Return the (C,) bool mask of what an architecture keeps. Raises: ArchitectureError, as load_architecture()."""
        architecture.check_fits(self.graph)
        keep = torch.zeros(self.graph.num_channels, dtype=torch.bool, device=self.gates.keep_C.device)
        for name, kept in architecture.keep.items():
            keep[self.graph.offsets[name] + torch.tensor(kept, dtype=torch.int64, device=keep.device)] = True
        channels_C = keep[self.gates.origin_C]
        if int(keep.sum()) > int(channels_C.sum()):
            lost = int(keep.sum()) - int(channels_C.sum())
            raise ArchitectureError(
                f"the architecture keeps {lost} channels that a re-cut has removed from the network, expected a part of "
                "built_architecture(); load it into a GatedModel of the uncut network"
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
        """Divide the gates' gradient by W_g of this cost from now on; None leaves it as it is."""
        if cost is not None and not self._has_gradient_hook:
            self.gates.logits_C.register_hook(self._rescale_gradient)
            self._has_gradient_hook = True
        self._gradient_cost = cost

    def _rescale_gradient(self, gradient_C: Tensor) -> Tensor:
        if self._gradient_cost is None:
            return gradient_C
        weight_G = self._gradient_cost.relative_gradient(self.kept_widths())
        factor_G = torch.where(weight_G > 0, 1 / weight_G, 0)  # W_g = 0: all its neighbours are gone, nothing to learn
        return gradient_C * factor_G.to(gradient_C.dtype)[self.gates.group_C]


@dataclass(frozen=True, eq=False)
class Body:
    """The plain network under the gates, and which gate each of its channels has."""

    model: nn.Module
    graph: ChannelGraph
    """Of `model`: after a re-cut another one than that of the gates."""
    gate_of_channel: Tensor
    """(channels of `graph`,) int64: index of the channel's gate."""

    @classmethod
    def whole(cls, model: nn.Module, graph: ChannelGraph) -> Self:
        """Return the network that has every channel of the graph."""
        return cls(model, graph, torch.arange(graph.num_channels))

    def architecture(self, open_C: Tensor) -> Architecture:
        """Return which channels of `graph` have an open gate."""
        parts = open_C.cpu()[self.gate_of_channel].split([group.num_channels for group in self.graph.groups])
        keep = {g.name: part.nonzero().flatten().tolist() for g, part in zip(self.graph.groups, parts, strict=True)}
        return Architecture.from_keep(self.graph, keep)

    def graph_with_gates(self, gate_graph: ChannelGraph, gates: ChannelGates) -> ChannelGraph:
        """Return `graph` with its sites reading the masks of the gates, and the blocks of the gates' graph."""
        block_of = {
            block.name: gate_graph.groups[self._gate_group(gates, block.groups[0])].block for block in self.graph.blocks
        }
        numbers = torch.cat([self.gate_of_channel, torch.tensor([-1])])  # index -1 stays -1
        sites = tuple(
            replace(site, channels=numbers[site.channels], block=site.block and block_of[site.block])
            for site in self.graph.sites
        )
        return replace(self.graph, sites=sites, blocks=gate_graph.blocks)

    def _gate_group(self, gates: ChannelGates, name: str) -> int:
        return int(gates.group_C[self.gate_of_channel[self.graph.offsets[name]]])


class _Masks:
    """The masks of the current forward pass, read by every gated module. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self.mask_NC: Tensor | None = None
        self.alive_B: Tensor | None = None
        self.parts: dict[tuple[int, int], Tensor] = {}
        """Of mask_NC, by first channel and number of channels."""

    def fill(self, mask_NC: Tensor, alive_B: Tensor, group_sizes: list[int]) -> None:
        """Set this pass's masks. One split for all groups: its gradient is one concatenation, not a sum of paddings."""
        self.mask_NC, self.alive_B = mask_NC, alive_B
        begins = itertools.accumulate(group_sizes, initial=0)
        self.parts = dict(zip(zip(begins, group_sizes, strict=False), mask_NC.split(group_sizes, dim=1), strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Masks":
        memo[id(self)] = fresh = _Masks()
        return fresh


class _Site:
    """Multiplies a value by its part of the mask."""

    def __init__(self, site: GateSite, graph: ChannelGraph, masks: _Masks) -> None:
        self.masks, self.site = masks, site
        self.block = [block.name for block in graph.blocks].index(site.block) if site.block else None
        channels = site.channels
        self.is_gated = bool((channels >= 0).any())
        self.has_static = bool((channels < 0).any())
        begin = int(channels[0])
        is_range = torch.equal(channels, torch.arange(begin, begin + len(channels))) and not self.has_static
        self.range = (begin, len(channels)) if is_range else None
        self.channels = channels

    def __call__(self, value: Tensor) -> Tensor:
        if self.is_gated:
            return value * self.mask_for(value).to(value.dtype)
        assert self.block is not None
        return value * self.masks.alive_B[self.block].to(value.dtype)  # type: ignore[index]

    def mask_NC(self) -> Tensor:
        """Return this pass's mask of the value's channels, all zero when the branch that ends here is gone."""
        mask = self._select(self.masks.mask_NC)
        return mask if self.block is None else mask * self.masks.alive_B[self.block]  # type: ignore[index]

    def mask_for(self, value: Tensor) -> Tensor:
        """Return this pass's mask in a shape that broadcasts to the value's."""
        mask = self.mask_NC()
        if len(mask) > 1 and self.site.per_sample > 1:
            mask = mask.repeat_interleave(self.site.per_sample, dim=0)
        view = [1] * value.dim()
        view[self.site.batch_dim or 0], view[self.site.dim] = mask.shape
        if (self.site.batch_dim or 0) > self.site.dim % value.dim():
            mask = mask.T
        return mask.reshape(view)

    def _select(self, mask_NC: Tensor | None) -> Tensor:
        assert mask_NC is not None
        if self.range is not None:
            return self.masks.parts[self.range] if self.range in self.masks.parts else mask_NC.narrow(1, *self.range)
        if self.channels.device != mask_NC.device:
            self.channels = self.channels.to(mask_NC.device)
        if self.has_static:  # index -1 is the column of ones behind the channels
            mask_NC = torch.cat([mask_NC, mask_NC.new_ones(len(mask_NC), 1)], dim=1)
            return mask_NC[:, self.channels]
        return mask_NC.index_select(1, self.channels)


class _NormSite(_Site):
    """Layer normalisation over the open channels, gated again after its weight and bias.

    Closed channels count neither in the mean nor in the variance, as if they were not there; the gradient reaches the mask.
    """

    def normalise(self, value: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Return the normalised value, in its own dtype; half precision is computed in float32, as torch's is."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        mask = self.mask_for(value).to(dtype)
        num_open = mask.sum(dim=-1, keepdim=True).clamp(min=1)
        open_value = value.to(dtype) * mask
        centred = (open_value - open_value.sum(dim=-1, keepdim=True) / num_open) * mask
        variance = centred.square().sum(dim=-1, keepdim=True) / num_open
        result = centred * torch.rsqrt(variance + eps)
        result = result if weight is None else result * weight
        result = result if bias is None else (result + bias) * mask
        return result.to(value.dtype)


class _GatedOutput:
    """Mixed into the class of a module whose output is masked."""

    gate_site: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.gate_site(super().forward(*args, **kwargs))  # type: ignore[misc]


class _GatedBatchNorm:
    """Mixed into the class of a batch normalisation, which takes the mask in."""

    gate_site: "_Site"

    def forward(self, x: Tensor) -> Tensor:
        return gated_batch_norm(cast(_BatchNorm, self), x, self.gate_site.mask_NC())


def _twin(model: nn.Module, graph: ChannelGraph, masks: _Masks) -> nn.Module:
    """Return a module tree of new nodes over the very same parameters and buffers, with sites put in.

    The dictionaries of parameters and buffers are shared, not copied, so that .to(device) on one side reaches the other.
    """
    sites: dict[str, list[GateSite]] = {}
    for site in graph.sites:
        sites.setdefault(site.module, []).append(site)
    twins: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module, path: str) -> nn.Module:
        """Return the twin of a module; one for a module that has several names."""
        if id(module) not in twins:
            twins[id(module)] = twin = object.__new__(type(module))
            twin.__dict__.update(module.__dict__)
            twin.__dict__["_modules"] = {
                name: None if child is None else twin_of(child, f"{path}.{name}" if path else name)
                for name, child in module._modules.items()
            }
            _put_sites(twin, sites.get(path, []), graph, masks)
        return twins[id(module)]

    return twin_of(model, "")


def _put_sites(twin: nn.Module, sites: list[GateSite], graph: ChannelGraph, masks: _Masks) -> None:
    """Give a module a class that masks what it returns, or values inside its forward pass, which is written again for that."""
    inside = [site for site in sites if site.step is not None]
    if inside:
        _put_sites_inside(twin, inside, graph, masks)
    returned = next(
        (site for site in sites if site.step is None), None
    )  # when it is called several times all are alike
    if returned is not None:
        twin.__dict__["gate_site"] = site = _Site(returned, graph, masks)
        is_plain = (returned.dim, returned.batch_dim, returned.per_sample) == (1, 0, 1)
        is_folded = is_foldable(twin) and site.is_gated and is_plain
        mixin = _GatedBatchNorm if is_folded else _GatedOutput
        twin.__class__ = _gated_class(type(twin), mixin)  # type: ignore[arg-type]


@cache
def _gated_class(cls: type[nn.Module], mixin: type) -> type[nn.Module]:
    return type(f"Gated{cls.__name__.removeprefix('Gated')}", (mixin, cls), {})


def _put_sites_inside(twin: nn.Module, sites: list[GateSite], graph: ChannelGraph, masks: _Masks) -> None:
    replaced: dict[str, Rewrite] = {}
    masked: dict[str, str] = {}
    for number, site in enumerate(sites):
        assert site.step is not None
        name = f"gate_site_{number}"
        if site.normalises:
            twin.__dict__[name] = _NormSite(site, graph, masks).normalise
            replaced[site.step] = _normalised_by(name)
        else:
            twin.__dict__[name] = _Site(site, graph, masks)
            masked[site.step] = name
    plan = graph.plans[sites[0].module]
    forward = write_forward(plan, replaced=replaced, masked=masked)
    for name, constant in forward.buffers.items():
        twin.__dict__[name] = constant
    code = type(GraphModule(twin, forward.graph)).forward
    twin.__class__ = type(f"Gated{type(twin).__name__}", (type(twin),), {"forward": code})


def _normalised_by(attribute: str) -> Rewrite:
    def write(graph: Graph, step: Step, args: tuple[Any, ...]) -> Node:
        given = list(args[:5])
        value, _, weight, bias, eps = given + [None, None, 1e-5][len(given) - 2 :]
        return graph.call_module(attribute, (value, weight, bias, eps))

    return write
