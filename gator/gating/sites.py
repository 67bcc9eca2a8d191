"""Gate sites: where the masks of the gates are multiplied into the forward pass of a network."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm

from gator.gating.gated_norm import MaskedLayerNorm, gated_batch_norm, is_foldable
from gator.gating.gates import SecondOrder
from gator.graph.graph import ChannelGraph, GateSite
from gator.graph.plans import Step
from gator.pruning.modules import class_of_its_own, rebind, replace_forward
from gator.pruning.writing import Rewrite, write_forward
from gator.tracing.writes import out_of_place

aten = torch.ops.aten


class Masks:
    """The masks of the current forward pass, read by every gated module. Copies start empty."""

    def __init__(self) -> None:
        self.drawn_NC: Tensor | None = None
        """As the gates drew it, for the gate loss."""
        self.mask_NC: Tensor | None = None
        """As the network reads it: the same numbers, with the gradient of SecondOrder."""
        self.alive_B: Tensor | None = None
        self.parts: dict[tuple[int, int], Tensor] = {}
        """Of mask_NC, by first channel and number of channels."""

    def fill(self, drawn_NC: Tensor, alive_B: Tensor, group_sizes: list[int], factor: float = 0.0) -> None:
        """Set this pass's masks, with the gradient of SecondOrder if a factor is given.

        One split for all groups: its gradient is one concatenation, not a sum of paddings.
        """
        self.drawn_NC, self.alive_B = drawn_NC, alive_B
        self.mask_NC = mask_NC = SecondOrder.apply(drawn_NC, factor) if factor else drawn_NC
        begins = itertools.accumulate(group_sizes, initial=0)
        self.parts = dict(zip(zip(begins, group_sizes, strict=False), mask_NC.split(group_sizes, dim=1), strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Masks":
        memo[id(self)] = fresh = Masks()
        return fresh


class _Site:
    """Multiplies a value by its part of the mask."""

    def __init__(self, site: GateSite, graph: ChannelGraph, masks: Masks) -> None:
        self.masks, self.site = masks, site
        self.block = [block.name for block in graph.blocks].index(site.block) if site.block is not None else None
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
        """Return this pass's mask of the value's channels, all zero when the branch that ends here is removed."""
        mask = self._select(self.masks.mask_NC)
        return mask if self.block is None else mask * self.masks.alive_B[self.block]  # type: ignore[index]

    def mask_for(self, value: Tensor) -> Tensor:
        """Return this pass's mask in a shape that broadcasts to the value's."""
        mask = self.mask_NC()
        if len(mask) > 1 and (self.site.in_a_row, self.site.num_rows) != (1, 1):
            mask = mask.repeat_interleave(self.site.in_a_row, dim=0).repeat(self.site.num_rows, 1)
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
        if self.has_static:  # index -1 is the column of ones after the channels
            mask_NC = torch.cat([mask_NC, mask_NC.new_ones(len(mask_NC), 1)], dim=1)
            return mask_NC[:, self.channels]
        return mask_NC.index_select(1, self.channels)


class _OpenSite(_Site):
    """An op that does not see closed channels: they do not count in a mean, and nothing is divided by them. Its result is masked, too.

    The gradient reaches the mask.
    """

    def layer_norm(
        self,
        value: Tensor,
        shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        _: Any = None,
    ) -> Tensor:
        """Return the normalised value, in its own dtype; half precision is computed in float32, as torch's is."""
        # A compiler recomputes and fuses by itself.
        if weight is not None and bias is not None and not torch.compiler.is_compiling():
            mask = self.mask_for(value).to(torch.promote_types(value.dtype, torch.float32))
            masked: Tensor = MaskedLayerNorm.apply(value, mask, weight, bias, eps)
            return masked
        mask, open_value = self._open(value)
        centred = (open_value - _mean(open_value, mask)) * mask
        result = centred * torch.rsqrt(_mean(centred.square(), mask) + eps)
        result = result if weight is None else result * weight
        result = result if bias is None else (result + bias) * mask
        return result.to(value.dtype)

    def group_norm(
        self,
        value: Tensor,
        _groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        _cudnn: bool = True,
    ) -> Tensor:
        """Return the value normalised over all channels and positions together, in its own dtype."""
        mask, open_value = self._open(value)
        dims = list(range(1, value.dim()))
        count = (mask.sum(dims, keepdim=True) * value[0, 0].numel()).clamp(min=1)
        centred = (open_value - open_value.sum(dims, keepdim=True) / count) * mask
        result = centred * torch.rsqrt(centred.square().sum(dims, keepdim=True) / count + eps)
        along = [-1, *[1] * (value.dim() - 2)]
        scale, shift = (None if tensor is None else tensor.view(along) for tensor in (weight, bias))
        result = result if scale is None else result * scale
        result = result if shift is None else (result + shift) * mask
        return result.to(value.dtype)

    def softmax(self, value: Tensor, dim: int, _dtype: Any = None) -> Tensor:
        """Return the softmax over the open channels, 0 in closed ones."""
        exponential, total, _ = self._exponential(value, dim)
        return (exponential / total).to(value.dtype)

    def log_softmax(self, value: Tensor, dim: int, _dtype: Any = None) -> Tensor:
        """Return the logarithm of the softmax over the open channels, 0 in closed ones."""
        _, total, top = self._exponential(value, dim)
        return (value - top - total.log()).to(value.dtype) * self.mask_for(value).to(value.dtype)

    def _exponential(self, value: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masked exponential of the value over that of the largest open entry, its sum, and that entry."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        mask, lowest = self.mask_for(value).to(dtype), torch.finfo(dtype).min
        top = torch.where(mask > 0, value, lowest).amax(dim, keepdim=True).detach()
        exponential = (value - top).clamp(max=0).exp() * mask  # a closed entry may be larger
        total = exponential.sum(dim, keepdim=True)
        return exponential, torch.where(total > 0, total, 1.0), top

    def rms_norm(self, value: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        """Return the value over its root mean square, in its own dtype."""
        mask, open_value = self._open(value)
        eps = torch.finfo(value.dtype).eps if eps is None else eps
        result = open_value * torch.rsqrt(_mean(open_value.square(), mask) + eps)
        return (result if weight is None else result * weight).to(value.dtype)

    def mean(self, value: Tensor, dims: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the mean over the open channels."""
        value = value if dtype is None else value.to(dtype)
        mask = self.mask_for(value).to(value.dtype).expand_as(value)
        return (value * mask).sum(dims, keepdim) / mask.sum(dims, keepdim).clamp(min=1)

    def extreme(self, op: Callable[..., Any], fill: float, value: Tensor, *args: Any) -> Any:
        """Return the op over the open channels; of no channel, as in a branch that is removed, it is 0."""
        is_open = self.mask_for(value) > 0
        closed = torch.where(is_open.any(self.site.dim, keepdim=True), fill, 0.0).to(value.dtype)
        return op(torch.where(is_open, value, closed), *args)

    def quotient(self, value: Tensor, divisor: Tensor, **rounding: Any) -> Tensor:
        """Return the quotient, 0 in closed channels."""
        mask = self.mask_for(max(value, divisor, key=torch.Tensor.dim))
        return aten.div(value, torch.where(mask > 0, divisor, 1.0), **rounding) * mask.to(value.dtype)

    def guarded(self, op: Callable[..., Tensor], value: Tensor, *args: Any) -> Tensor:
        """Return the value of an op that may have no finite value or slope at 0; it is 0 in closed channels."""
        mask = self.mask_for(value)
        return op(torch.where(mask > 0, value, 1.0), *args) * mask.to(value.dtype)

    def function(self, op: Any) -> Callable[..., Any]:
        """Return what replaces an op: no closure, because a copy of the network has masks of its own."""
        own: dict[Any, Callable[..., Any]] = {
            aten.layer_norm.default: self.layer_norm,
            aten.rms_norm.default: self.rms_norm,
            aten.group_norm.default: self.group_norm,
            aten.softmax.int: self.softmax,
            aten.log_softmax.int: self.log_softmax,
            aten.mean.dim: self.mean,
        }
        if op in own:
            return own[op]
        if op in _EXTREMES:
            return partial(self.extreme, op, _EXTREMES[op])
        return self.quotient if op._schema.name.startswith("aten::div") else partial(self.guarded, out_of_place(op))

    def _open(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask and the masked value, for a normalisation."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        mask = self.mask_for(value).to(dtype)
        return mask, value.to(dtype) * mask


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of a masked value over the open channels in its last dimension."""
    return value.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


_EXTREMES = {
    **dict.fromkeys((aten.amax.default, aten.max.dim), -math.inf),
    **dict.fromkeys((aten.amin.default, aten.min.dim), math.inf),
}


class _GatedOutput:
    """Mixed into the class of a module whose output is masked."""

    gate_site: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = self.__dict__.get("ungated_forward") or super().forward  # type: ignore[misc]
        return self.gate_site(forward(*args, **kwargs))


class GatedBatchNorm:
    """Mixed into the class of a batch normalisation, which applies the mask itself."""

    gate_site: "_Site"

    def forward(self, x: Tensor) -> Tensor:
        return gated_batch_norm(cast(_BatchNorm, self), x, self.gate_site.mask_NC())


def gated_twin(model: nn.Module, graph: ChannelGraph, masks: Masks) -> nn.Module:
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
            twins[id(module)] = twin = object.__new__(class_of_its_own(module))
            twin.__dict__.update(module.__dict__)
            twin.__dict__["_compiled_call_impl"] = None
            twin.__dict__["_modules"] = {
                name: None if child is None else twin_of(child, f"{path}.{name}" if path else name)
                for name, child in module._modules.items()
            }
            order.append((twin, path))
        return twins[id(module)]

    order: list[tuple[nn.Module, str]] = []
    whole = twin_of(model, "")
    for twin, path in order:
        rebind(twin, twins)
        _put_sites(twin, sites.get(path, []), graph, masks)
        if isinstance(twin, nn.TransformerEncoderLayer):
            twin.activation_relu_or_gelu = 0  # its fused kernel passes by what it is made of, and the gates there
    return whole


def _put_sites(twin: nn.Module, sites: list[GateSite], graph: ChannelGraph, masks: Masks) -> None:
    """Give a module a class that masks its output, or values inside its forward pass, which is regenerated for that."""
    inside = [site for site in sites if site.step is not None]
    if inside:
        _put_sites_inside(twin, inside, graph, masks)
    # The sites of a module that is called several times are alike.
    returned = next((site for site in sites if site.step is None), None)
    if returned is not None:
        twin.__dict__["gate_site"] = site = _Site(returned, graph, masks)
        if "forward" in twin.__dict__:  # it is found before that of the class
            twin.__dict__["ungated_forward"] = twin.__dict__.pop("forward")
        is_plain = (returned.dim, returned.batch_dim, returned.in_a_row, returned.num_rows) == (1, 0, 1, 1)
        is_folded = is_foldable(twin) and site.is_gated and is_plain
        mixin = GatedBatchNorm if is_folded else _GatedOutput
        twin.__class__ = _gated_class(type(twin), mixin)  # type: ignore[arg-type]


@cache
def _gated_class(cls: type[nn.Module], mixin: type) -> type[nn.Module]:
    return type(f"Gated{cls.__name__.removeprefix('Gated')}", (mixin, cls), {})


def _put_sites_inside(twin: nn.Module, sites: list[GateSite], graph: ChannelGraph, masks: Masks) -> None:
    replaced: dict[str, Rewrite] = {}
    masked: dict[str, str] = {}
    plan = graph.plans[sites[0].module]
    functions = {step.name: step.function for step in plan.steps}
    for number, site in enumerate(sites):
        assert site.step is not None
        name = f"gate_site_{number}"
        if site.normalises:
            twin.__dict__[name] = _OpenSite(site, graph, masks).function(functions[site.step])
            replaced[site.step] = _called(name)
        else:
            twin.__dict__[name] = _Site(site, graph, masks)
            masked[site.step] = name
    forward = write_forward(plan, replaced=replaced, masked=masked, owner="gate_constants.")
    if forward.buffers:
        twin.add_module("gate_constants", Constants(forward.buffers))
    replace_forward(twin, forward, "Gated")


class Constants(nn.Module):
    """Tensors that a forward pass with sites reads. The twin shares its dictionary of buffers, so they have a module of their own."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


def _called(attribute: str) -> Rewrite:
    def write(graph: Graph, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        return graph.call_module(attribute, args, kwargs)

    return write
