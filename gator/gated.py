"""A network with gates on its channels, for training; in eval mode it is the pruned network, number for number."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gator.architecture import Architecture
from gator.costs import CostModel
from gator.errors import GateError
from gator.gates import ChannelGates, GateConfig
from gator.graph import ChannelGraph, GateSite


class GatedModel(nn.Module):
    """`model` with one gate per channel of every group of `graph`.

    It shares model's parameters and buffers; model itself stays ungated and sees the trained weights, so prune(model, ...)
    cuts what was trained. In training mode each sample draws its mask; in eval mode open channels pass and closed ones do not.

    forward takes what model takes, batch first, and returns what model returns.
    Raises: GateError if the graph has no group that can be cut.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, config: GateConfig | None = None) -> None:
        super().__init__()
        if not graph.groups:
            reasons = "; ".join(dict.fromkeys(locked.reason for locked in graph.locked)) or "it has no channels"
            raise GateError(f"{graph.model} has no channel group that could be cut, expected at least one ({reasons})")
        self.graph = graph
        self.gates = ChannelGates(graph, config or GateConfig())
        self._masks = _Masks()
        self.network = _twin(model, {site.module: _Site(site, graph, self._masks) for site in graph.sites})
        self._gradient_cost: CostModel | None = None
        # DistributedDataParallel sends rank 0's buffers to all ranks, but each has its own place in the data.
        self._ddp_params_and_buffers_to_ignore = ["gates.noise_at"]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.gates.to(device)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the network's output under this pass's masks."""
        if self.training:
            self.gates.settle()
        open_C = self.gates.open_C()
        self._masks.alive_B = self.gates.alive_B(self.gates.count(open_C))
        self._masks.mask_NC = self.gates.sample(inputs[0].shape[0]) if self.training else open_C[None]
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
        """Return which channels are open now."""
        return Architecture.from_keep(self.graph, self.keep_indices(self.gates.open_C()))

    def keep_indices(self, channels_C: Tensor) -> dict[str, list[int]]:
        """Return a (C,) bool mask as kept channels by group name."""
        parts = channels_C.cpu().split([group.num_channels for group in self.graph.groups])
        return {
            group.name: part.nonzero().flatten().tolist() for group, part in zip(self.graph.groups, parts, strict=True)
        }

    @torch.no_grad()
    def load_architecture(self, architecture: Architecture) -> None:
        """Close what the architecture leaves out, and open again what it keeps. Raises: ArchitectureError if it does not fit."""
        architecture.check_fits(self.graph)
        keep = torch.zeros_like(self.gates.keep_C)
        for name, kept in architecture.keep.items():
            keep[self.graph.offsets[name] + torch.tensor(kept, dtype=torch.int64, device=keep.device)] = True
        self.gates.keep_C.copy_(keep)
        self.gates.logits_C.masked_fill_(keep & (self.gates.logits_C < 0), 0.0)

    def param_groups(
        self, lr: float, gate_lr_scale: float = 0.2, cost: CostModel | None = None, weight_decay: float = 1e-4
    ) -> list[dict[str, Any]]:
        """Return parameter groups for SGD: the network's weights, then the gates.

        The paper divides each group's learning rate by W_g = dC/dn_g / C(full). With `cost` given, the gates' gradient is
        divided by W_g instead, which is the same for SGD and keeps one learning rate for all gates: lr * gate_lr_scale. Their
        weight decay is divided by gate_lr_scale, so that it takes lr * weight_decay off a logit per step, as off any weight.
        """
        if cost is not None and self._gradient_cost is None:
            self.gates.logits_C.register_hook(self._rescale_gradient)
        self._gradient_cost = cost
        weights = [p for p in self.network.parameters() if p.requires_grad]
        return [
            {"params": weights, "lr": lr, "weight_decay": weight_decay},
            {"params": [self.gates.logits_C], "lr": lr * gate_lr_scale, "weight_decay": weight_decay / gate_lr_scale},
        ]

    def _rescale_gradient(self, gradient_C: Tensor) -> Tensor:
        assert self._gradient_cost is not None
        weight_G = self._gradient_cost.relative_gradient(self.kept_widths())
        factor_G = torch.where(weight_G > 0, 1 / weight_G, 0)  # W_g = 0: all its neighbours are gone, nothing to learn
        return gradient_C * factor_G.to(gradient_C.dtype)[self.gates.group_C]


class _Masks:
    """The masks of the current forward pass, read by every gated module. Copies and pickles of it start empty."""

    def __init__(self) -> None:
        self.mask_NC: Tensor | None = None
        self.alive_B: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Masks":
        memo[id(self)] = fresh = _Masks()
        return fresh


class _Site:
    """Multiplies a module's output by its part of the mask."""

    def __init__(self, site: GateSite, graph: ChannelGraph, masks: _Masks) -> None:
        self.masks, self.dim = masks, site.dim
        self.block = [block.name for block in graph.blocks].index(site.block) if site.block else None
        channels = site.channels
        self.is_gated = bool((channels >= 0).any())
        self.has_static = bool((channels < 0).any())
        begin = int(channels[0])
        is_range = torch.equal(channels, torch.arange(begin, begin + len(channels))) and not self.has_static
        self.range = (begin, len(channels)) if is_range else None
        self.channels = channels

    def __call__(self, output: Tensor) -> Tensor:
        if self.is_gated:
            mask = self._select(self.masks.mask_NC)
            view = [1] * output.dim()
            view[0], view[self.dim] = mask.shape
            output = output * mask.view(view).to(output.dtype)
        if self.block is not None:
            output = output * self.masks.alive_B[self.block].to(output.dtype)  # type: ignore[index]
        return output

    def _select(self, mask_NC: Tensor | None) -> Tensor:
        assert mask_NC is not None
        if self.range is not None:
            return mask_NC.narrow(1, *self.range)
        if self.channels.device != mask_NC.device:
            self.channels = self.channels.to(mask_NC.device)
        if self.has_static:  # index -1 is the column of ones behind the channels
            mask_NC = torch.cat([mask_NC, mask_NC.new_ones(len(mask_NC), 1)], dim=1)
            return mask_NC[:, self.channels]
        return mask_NC.index_select(1, self.channels)


class _GatedOutput:
    """Mixed into the class of a module whose output is masked."""

    gate_site: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.gate_site(super().forward(*args, **kwargs))  # type: ignore[misc]


@cache
def _gated_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Gated{cls.__name__}", (_GatedOutput, cls), {})


def _twin(model: nn.Module, sites: dict[str, _Site]) -> nn.Module:
    """Return a module tree of new nodes over the very same parameters and buffers, with sites put in.

    The dictionaries of parameters and buffers are shared, not copied, so that .to(device) on one side reaches the other.
    """
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
            if path in sites:
                twin.__class__ = _gated_class(type(module))  # type: ignore[arg-type]
                twin.__dict__["gate_site"] = sites[path]
        return twins[id(module)]

    return twin_of(model, "")
