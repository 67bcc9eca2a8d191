"""Gates: one learned logit per channel, a hard 0/1 mask per sample, a straight-through gradient.

    u ~ Uniform(0, 1),  y = sigmoid((w + ln u - ln(1 - u)) / T),  forward 1 if y > 0.5 else 0,  backward as if it were y

Source: Gator, arXiv 2205.15404. Its research code draws a mask at every hook. Here one mask per group and forward pass is
drawn, in one call for all groups, from a counter: (seed, epoch, position of the sample in the epoch, original channel). So the
number of workers, the size of micro-batches and re-cutting do not change it.

    tensor legend: N samples, C channels of all groups, G groups, B blocks
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gator.errors import GateError
from gator.graph.graph import ChannelGraph

LOWEST_START = 0.1
"""Lowest logit at the start, unless that of init_keep_prob is lower: keep probability 0.525."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How gates start and sample. Raises: GateError for a value out of range."""

    init_keep_prob: float = 0.995
    """Keep probability at the start, in (0.5, 1): of every channel or, with a magnitude_spread, of one of mean size in its group."""
    magnitude_spread: float = 0.0
    """Initial logit offset per unit of relative weight magnitude of the channel in its group: small channels start closer to closing.
    0 starts all gates alike, as in the paper."""
    curvature: float = 1.0
    """K: share of the second-order term in the gradient of an open gate; see SecondOrder. 1 is what is derived, 0 the paper's."""
    temperature: float = 1.0
    """T above: smaller is harder; the gradient grows as 1 / T."""
    seed: int = 0
    """Seed of the gate noise."""
    sampling: Literal["per_sample", "per_batch"] = "per_sample"
    """per_sample draws a mask for each image. per_batch draws one for all images of a forward pass on one worker, at the position of
    the first: batch normalisation takes it into its weight and bias, so gates need no pass over any activation, but the gates'
    gradient is noisier, and depends on the size of micro-batches and the number of workers."""

    def __post_init__(self) -> None:
        if not 0.5 < self.init_keep_prob < 1:
            raise GateError(
                f"init_keep_prob is {self.init_keep_prob}, expected a number between 0.5 and 1, both excluded"
            )
        if not 0 <= self.magnitude_spread < math.inf:
            raise GateError(f"magnitude_spread is {self.magnitude_spread}, expected a finite number >= 0")
        if not 0 <= self.curvature < math.inf:
            raise GateError(f"curvature is {self.curvature}, expected a finite number >= 0")
        if not self.temperature > 0:
            raise GateError(f"temperature is {self.temperature}, expected a number above 0")
        if self.sampling not in ("per_sample", "per_batch"):
            raise GateError(f"sampling is {self.sampling!r}, expected per_sample or per_batch")

    @property
    def init_logit(self) -> float:
        """logit(init_keep_prob): 5.2933048 for 0.995."""
        return math.log(self.init_keep_prob / (1 - self.init_keep_prob))


class ChannelGates(nn.Module):
    """The gates of all groups of a graph, side by side in graph order.

    A channel whose logit falls below 0 (keep probability under one half) closes for good, at the next training forward pass.
    A group outside any removable block never closes its last channel. C counts the channels that still have a gate: all at
    first, fewer after a re-cut; origin_C has their original numbers.
    """

    keep_C: Tensor
    closable_C: Tensor
    group_C: Tensor
    origin_C: Tensor
    protected_G: Tensor
    inner_BG: Tensor
    noise_at: Tensor

    def __init__(self, graph: ChannelGraph, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        count, names = graph.num_channels, [group.name for group in graph.groups]
        self.logits_C = nn.Parameter(torch.full((count,), config.init_logit))
        self.register_buffer("keep_C", torch.ones(count, dtype=torch.bool))
        self.register_buffer("closable_C", torch.ones(count, dtype=torch.bool))
        self.register_buffer("group_C", graph.group_of_channel(), persistent=False)
        self.register_buffer("origin_C", torch.arange(count), persistent=False)
        protected = torch.tensor([group.block is None for group in graph.groups])
        self.register_buffer("protected_G", protected, persistent=False)
        inner = torch.tensor([[name in block.groups for name in names] for block in graph.blocks], dtype=torch.bool)
        self.register_buffer("inner_BG", inner.view(len(graph.blocks), len(names)), persistent=False)
        self.register_buffer("noise_at", torch.tensor([0, 0, 1]), persistent=False)  # epoch, position, stride

    def seek(self, epoch: int, position: int, stride: int = 1) -> None:
        """Set the samples of the next training batch: `position` is the place of the first in the epoch's order."""
        for place, number in zip(self.noise_at, (epoch, position, stride), strict=True):
            place.fill_(
                number
            )  # a tensor of the host would be copied, for which the host waits until the device is idle

    def smaller(self, channels_C: Tensor) -> "ChannelGates":
        """Return gates for some of the channels, (C,) bool. Groups, blocks and noise keep their numbers."""
        gates = copy.deepcopy(self)
        index = channels_C.nonzero().flatten()
        gates.logits_C = nn.Parameter(self.logits_C.detach()[index])
        for name in ("keep_C", "closable_C", "group_C", "origin_C"):
            setattr(gates, name, getattr(self, name)[index])
        return gates

    @torch.no_grad()
    def spread_out(self, relative_magnitude_C: Tensor) -> None:
        """Start small channels nearer to closing: magnitude_spread times a channel's size, over the mean of its group, minus 1.

        relative_magnitude_C: (C,) as relative_magnitudes() returns them. No gate starts closed.
        """
        start, spread = self.config.init_logit, self.config.magnitude_spread
        logits_C = start + spread * (relative_magnitude_C.to(self.logits_C) - 1)
        self.logits_C.copy_(logits_C.clamp(min=min(start, LOWEST_START)))

    @torch.no_grad()
    def settle(self) -> None:
        """Close for good the channels below 0 that may close; set those that may not back to 0.

        Changes nothing a second time, until logits change.
        """
        below_C = self.logits_C < 0
        self.close(below_C & self.closable_C)
        self.logits_C.masked_fill_(below_C & self.keep_C, 0.0)

    @torch.no_grad()
    def close(self, closing_C: Tensor, last_C: Tensor | None = None) -> None:
        """Close channels for good, except the most probable one of a group that must keep one: last_of_its_group(), if known."""
        self.keep_C &= ~closing_C | (self.last_of_its_group() if last_C is None else last_C)

    def sample(self, num_samples: int) -> Tensor:
        """Return a (N, C) mask of exact zeros and ones with a straight-through gradient, and advance the noise.

        (1, C) when sampling per batch.
        """
        epoch, position, stride = self.noise_at.unbind()
        num_masks = num_samples if self.config.sampling == "per_sample" else 1
        positions = position + stride * torch.arange(num_masks, device=self.noise_at.device)
        noise = logistic_noise(self.config.seed, epoch, positions, self.origin_C).to(self.logits_C.dtype)
        self.noise_at[1] += num_samples * stride
        # A clone, because backward needs the mask of this pass and closing changes keep_C in place.
        return HardSigmoid.apply((self.logits_C + noise) / self.config.temperature) * self.keep_C.clone()

    def check_finite(self) -> None:
        """Raise GateError if a logit is NaN or infinite, since then it is unknown which channels are open."""
        num_lost = int((~self.logits_C.isfinite()).sum())
        if num_lost:
            raise GateError(
                f"the logits of {num_lost} of {len(self.logits_C)} gates are NaN or infinite, expected finite numbers; the training has "
                "diverged: return to an earlier checkpoint, or lower the learning rate"
            )

    def open_C(self, last_C: Tensor | None = None) -> Tensor:
        """Return (C,) bool: the channels that pass in eval mode. Channels of a removed block are all closed."""
        last_C = self.last_of_its_group() if last_C is None else last_C
        open_now = self.keep_C & ((self.logits_C >= 0) | ~self.closable_C | last_C)
        if not len(self.inner_BG):
            return open_now
        return open_now & ~self.gone_G(self.count(open_now))[self.group_C]

    def count(self, channels_C: Tensor) -> Tensor:
        """Return (G,) float64: how many channels of each group are set in a (C,) mask."""
        counts = torch.zeros(len(self.protected_G), dtype=torch.float64, device=channels_C.device)
        return counts.index_add(0, self.group_C, channels_C.to(torch.float64))

    def alive_B(self, widths_G: Tensor) -> Tensor:
        """Return (..., B) bool: the blocks all of whose inner groups have a channel left. widths_G: (..., G)."""
        return ~(self.inner_BG & (widths_G == 0).unsqueeze(-2)).any(dim=-1)

    def gone_G(self, widths_G: Tensor) -> Tensor:
        """Return (..., G) bool: the groups of removed blocks. widths_G: (..., G)."""
        return (self.inner_BG & ~self.alive_B(widths_G).unsqueeze(-1)).any(dim=-2)

    def last_of_its_group(self) -> Tensor:
        """Return (C,) bool: the most probable kept channel of each protected group, the last of equals."""
        logits = self.logits_C.detach().masked_fill(~self.keep_C, -torch.inf)
        best_G = logits.new_full((len(self.protected_G),), -torch.inf).scatter_reduce(0, self.group_C, logits, "amax")
        is_best_C = self.keep_C & (logits == best_G[self.group_C])
        place_C = torch.arange(len(logits), device=logits.device)
        none_G = torch.full_like(best_G, -1, dtype=torch.int64)
        last_G = none_G.scatter_reduce(0, self.group_C, place_C.masked_fill(~is_best_C, -1), "amax")
        return (place_C == last_G[self.group_C]) & self.protected_G[self.group_C]


class HardSigmoid(torch.autograd.Function):
    """Forward 1 where sigmoid(x) > 0.5, else 0; backward the derivative of sigmoid(x), y(1 - y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return exact zeros and ones."""
        ctx.save_for_backward(torch.sigmoid(x))
        return (x > 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return gradient * y(1 - y)."""
        (y,) = ctx.saved_tensors
        return gradient * y * (1 - y)


class SecondOrder(torch.autograd.Function):
    """Returns a mask unchanged; backward adds what the straight-through gradient leaves out of the change of the loss on closing.

    Closing a channel of a sample changes its loss by f(0) - f(1) = -f'(1) + f''/2 to second order. The straight-through gradient
    of an open draw is f'(1), whose mean is nearly 0 at a trained network. f'' is estimated by the square of the sample's own
    gradient, the empirical Fisher information of the mask; so an open draw's gradient g becomes g - K/2 N g^2, where g is of
    a mean over N samples; g - K/2 N g^2 / S, where it is of S times that mean.
    Source of the estimate: Group Fisher pruning, Liu et al., ICML 2021; there it is a score without gates.
    """

    @staticmethod
    def forward(ctx: Any, mask_NC: Tensor, factor: float) -> Tensor:
        """Return the mask. factor: K/2 times the samples whose mean loss a step minimises, on this rank, over the loss's scale."""
        ctx.save_for_backward(mask_NC)
        ctx.factor = factor
        return mask_NC.view_as(mask_NC)

    @staticmethod
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor, None]:
        """Return gradient - factor * mask * gradient^2."""
        (mask_NC,) = ctx.saved_tensors
        return torch.addcmul(gradient_NC, gradient_NC.square(), mask_NC, value=-ctx.factor), None


def logistic_noise(seed: int, epoch: Tensor, positions: Tensor, channels: Tensor) -> Tensor:
    """Return (N, C) float32 draws of ln u - ln(1 - u), a pure function of its arguments.

    seed: any integer; epoch: () int64; positions: (N,) int64 places in the epoch; channels: (C,) int64 original channel numbers.
    u has 24 random bits, so a draw lies within +-16.7. Same numbers on every device.
    """
    key = _mix(_mix(epoch + _signed(seed * 0x9E3779B97F4A7C15)) + positions)
    bits = _mix(key[:, None] ^ _mix(channels + _signed(0xD1B54A32D192ED03)))
    u = (((bits >> 40) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24
    return torch.logit(u, eps=2.0**-24)  # the largest u rounds to 1


def _mix(x: Tensor) -> Tensor:
    """Return int64 with every bit depending on every bit of x. splitmix64's finaliser (Steele et al., OOPSLA 2014).

    Shifts of int64 are arithmetic, hence the masks; products wrap.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(number: int) -> int:
    """Return the number modulo 2**64 as a signed 64-bit integer."""
    number &= 0xFFFFFFFFFFFFFFFF
    return number - (1 << 64) if number >= 1 << 63 else number
