"""Batch normalisation and gate in one: a mask of zeros and ones after an affine map is another affine map.

    z = mask (weight (x - mean) / std + bias) = scale (x - mean) + shift

With one mask for the whole batch, scale and shift are per channel and batch normalisation takes them as its own weight and bias.
With one mask per sample they are per sample and channel. On CPUs the (N, C) sums that the mask's gradient needs also hold those for
weight, bias and x, so gates add no pass over x, and the backward pass needs only x - mean instead of x. Elsewhere torch's own
kernels normalise, the mask is applied without a cast of its own, and of large values the backward pass computes the normalised
one again: it keeps what an ungated norm keeps, and the masks.

    tensor legend: N samples, C channels
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from gator.errors import GateError

RECOMPUTED_BYTES = 8 << 20
"""Size of a value from which on the normalised one is computed again instead of kept: below, two launches take longer than the memory
is worth."""
FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Exact classes: a subclass may compute something else, as SyncBatchNorm does."""


def is_foldable(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether a module is a batch normalisation that gated_batch_norm() can compute."""
    if type(norm) not in FOLDABLE:
        return False
    assert isinstance(norm, _BatchNorm)
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def gated_batch_norm(norm: _BatchNorm, x: Tensor, mask_NC: Tensor) -> Tensor:
    """Return norm(x) times the mask, (N, C) or (1, C); updates the running statistics as norm does, but not its number of batches."""
    assert norm.momentum is not None
    mask_NC = mask_NC.to(norm.weight.dtype)
    if len(mask_NC) == 1:
        weight, bias = norm.weight * mask_NC[0], norm.bias * mask_NC[0]
        return batch_norm(x, norm.running_mean, norm.running_var, weight, bias, norm.training, norm.momentum, norm.eps)
    if is_fusable(x, norm):
        result: Tensor = _GatedBatchNorm.apply(
            *(x, mask_NC, norm.weight, norm.bias, norm.running_mean, norm.running_var),
            *(norm.training, norm.momentum, norm.eps),
        )
        return result
    if not torch.compiler.is_compiling() and x.dim() > 2:
        masked: Tensor = _MaskedBatchNorm.apply(
            *(x, mask_NC, norm.weight, norm.bias, norm.running_mean, norm.running_var),
            *(norm.training, norm.momentum, norm.eps),
        )
        return masked
    output = batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )
    return output * _channels(mask_NC, x).to(output.dtype)


def is_fusable(x: Tensor, norm: _BatchNorm) -> bool:
    """Whether _GatedBatchNorm is faster: on CPUs, in full precision. A compiler fuses better by itself."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dim() > 2 and x.dtype == norm.weight.dtype


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward that refuses create_graph.

    With torch's once_differentiable, torch.autograd.grad() returns a part of the second derivative without an error.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients."""
        if torch.is_grad_enabled():
            raise GateError(
                "create_graph is True, but a gated network has first derivatives only; take second ones of the network without gates"
            )
        return backward(ctx, *gradients)

    return checked


class _GatedBatchNorm(torch.autograd.Function):
    """Per-sample masks, by plain passes in whatever layout x has.

    The statistics need two passes over x, about the mean: as exact as torch's single pass, which on CPUs takes five times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask_NC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Return scale (x - mean) + shift."""
        ctx.count = x.numel() // x.shape[1] if training else None
        mean_C = x.mean(_all_but_channels(x)) if training else running_mean
        centred = x - _channels(mean_C, x)
        if training:
            square_C = torch.linalg.vector_norm(centred, dim=_all_but_channels(x)).square()
            running_mean.lerp_(mean_C, momentum)
            running_var.lerp_(square_C / max(ctx.count - 1, 1), momentum)
            std_inverse_C = torch.rsqrt(square_C / ctx.count + eps)
        else:
            std_inverse_C = torch.rsqrt(running_var + eps)
        ctx.save_for_backward(centred, mask_NC, weight_C, bias_C, std_inverse_C)
        scale_NC = mask_NC * (weight_C * std_inverse_C)
        return (centred * _channels(scale_NC, x)).add_(_channels(mask_NC * bias_C, x))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, mask, weight and bias."""
        centred, mask_NC, weight_C, bias_C, std_inverse_C = ctx.saved_tensors
        positions = tuple(range(2, gradient.dim()))
        sum_NC = gradient.sum(positions)
        product_sum_NC = (gradient * centred).sum(positions) * std_inverse_C
        mask_gradient_NC = torch.addcmul(sum_NC * bias_C, product_sum_NC, weight_C)
        bias_gradient_C = (mask_NC * sum_NC).sum(0)
        weight_gradient_C = (mask_NC * product_sum_NC).sum(0)
        gain_C = weight_C * std_inverse_C
        x_gradient = gradient * _channels(mask_NC * gain_C, gradient)
        if ctx.count is not None:  # the statistics depend on x as well
            slope_C = gain_C * weight_gradient_C * std_inverse_C / -ctx.count
            x_gradient.addcmul_(centred, _channels(slope_C, gradient))
            x_gradient.add_(_channels(gain_C * bias_gradient_C / -ctx.count, gradient))
        return x_gradient, mask_gradient_NC, weight_gradient_C, bias_gradient_C, None, None, None, None, None


class _MaskedBatchNorm(torch.autograd.Function):
    """Per-sample masks, by torch's own kernels for x's device, layout and precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask_NC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Return the normalised value times the mask, in x's dtype."""
        output, mean_C, std_inverse_C, reserve, ctx.kernel = torch._batch_norm_impl_index(
            x, weight_C, bias_C, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.training, ctx.eps = training, eps
        statistics = (mean_C, std_inverse_C) if training else (running_mean, running_var)
        if output.nbytes >= RECOMPUTED_BYTES:
            ctx.save_for_backward(x, mask_NC, weight_C, bias_C, reserve, *statistics)
            return output.mul_(_channels(mask_NC, x))  # in place: a product of two dtypes would be of the wider one
        ctx.save_for_backward(x, mask_NC, weight_C, bias_C, reserve, *statistics, output)
        return torch.mul(output, _channels(mask_NC, x), out=torch.empty_like(output))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, mask, weight and bias."""
        x, mask_NC, weight_C, bias_C, reserve, mean_C, scale_C, *kept = ctx.saved_tensors
        running, saved = ((None, None), (mean_C, scale_C)) if ctx.training else ((mean_C, scale_C), (None, None))
        masked = torch.mul(gradient, _channels(mask_NC, x), out=torch.empty_like(gradient))
        wanted = ctx.needs_input_grad
        x_gradient, weight_gradient, bias_gradient = torch.ops.aten._batch_norm_impl_index_backward(
            *(ctx.kernel, x, masked, weight_C, *running, *saved, ctx.training, ctx.eps),
            *((wanted[0], wanted[2], wanted[3]), reserve),
        )
        if kept:
            (output,) = kept
        else:
            var_C, eps = (scale_C.pow(-2), 0.0) if ctx.training else (scale_C, ctx.eps)
            output, *_ = torch.native_batch_norm(x, weight_C, bias_C, mean_C, var_C, False, 0.0, eps)
        positions = tuple(range(2, x.dim()))
        mask_gradient_NC = (gradient * output).sum(positions, dtype=mask_NC.dtype)
        return x_gradient, mask_gradient_NC, weight_gradient, bias_gradient, None, None, None, None, None


class MaskedLayerNorm(torch.autograd.Function):
    """Layer normalisation over the open channels, those closed being 0, with a gradient of the mask.

    Keeps its input, the mask, and two numbers a row: what torch's own keeps, and the masks. The steps of forward():

        c = x m - mean m,  y = c r,  r = 1 / sqrt(sum c^2 / n + eps),  output = (y weight + bias) m
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        eps: float,
    ) -> Tensor:
        """Return the normalised value, in x's dtype.

        mask: in a shape that broadcasts to x's, channels last.
        """
        count = mask.sum(-1, keepdim=True).clamp_(min=1)
        centred = x * mask
        mean = centred.sum(-1, keepdim=True) / count
        centred.addcmul_(mean, mask, value=-1)
        square = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square()
        std_inverse = torch.rsqrt(square / count + eps)
        ctx.save_for_backward(x, mask, count, weight_C, bias_C, mean, std_inverse)
        ctx.eps = eps
        return torch.addcmul(bias_C * mask, centred.mul_(std_inverse), weight_C).to(x.dtype)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, mask, weight and bias.

        With g = gradient weight m, a = mean of g and b = mean of g y over the open channels: x m gets r (g - b y - a), of which
        x gets the open part. The mask gets the sum over the rows of gradient (y weight + bias) + (g - b y) y + x times the
        gradient of x m, and through n each channel gets b (1 - eps r^2) / 2 + a r mean.
        """
        x, mask, count, weight_C, bias_C, mean, std_inverse = ctx.saved_tensors
        gradient = gradient.to(mask.dtype)
        normalised = (x * mask).addcmul_(mean, mask, value=-1).mul_(std_inverse)
        product = gradient * normalised
        inner = gradient * (mask * weight_C)
        a = inner.sum(-1, keepdim=True) / count
        b = (product * weight_C).sum(-1, keepdim=True) / count
        inner.addcmul_(b, normalised, value=-1)
        per_mask = inner * normalised
        inner.sub_(a).mul_(std_inverse)
        x_gradient = (inner * mask).to(x.dtype)
        product_sum, gradient_sum = product.sum_to_size(mask.shape), gradient.sum_to_size(mask.shape)
        mask_gradient = per_mask.addcmul_(inner, x.to(mask.dtype)).sum_to_size(mask.shape)
        by_count = torch.addcmul(a * std_inverse * mean, b, std_inverse.square().mul_(-ctx.eps / 2).add_(0.5))
        mask_gradient += by_count.sum_to_size(*mask.shape[:-1], 1)
        mask_gradient.addcmul_(product_sum, weight_C).addcmul_(gradient_sum, bias_C)
        others = list(range(x.dim() - 1))
        return x_gradient, mask_gradient, product_sum.sum(others), (gradient_sum * mask).sum(others), None


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Return (C,) or (N, C) values in a shape that broadcasts to x."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))
