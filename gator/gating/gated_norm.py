"""Batch normalisation and gate in one: a mask of zeros and ones after an affine map is another affine map.

    z = mask (weight (x - mean) / std + bias) = scale (x - mean) + shift

With one mask for the whole batch, scale and shift are per channel and batch normalisation takes them as its own weight and bias.
With one mask per sample they are per sample and channel. The (N, C) sums that the mask's gradient needs also hold those for weight,
bias and x, so gates add no pass over x, and the backward pass needs only x - mean instead of x.

    tensor legend: N samples, C channels
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Exact classes: a subclass may compute something else, as SyncBatchNorm does."""


def is_foldable(norm: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether a module is a batch normalisation that gated_batch_norm() can compute."""
    if type(norm) not in FOLDABLE:
        return False
    assert isinstance(norm, _BatchNorm)
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def gated_batch_norm(norm: _BatchNorm, x: Tensor, mask_NC: Tensor) -> Tensor:
    """Return norm(x) times the mask, (N, C) or (1, C); updates the running statistics as norm does."""
    assert norm.momentum is not None
    mask_NC = mask_NC.to(norm.weight.dtype)
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if len(mask_NC) == 1:
        weight, bias = norm.weight * mask_NC[0], norm.bias * mask_NC[0]
        return batch_norm(x, norm.running_mean, norm.running_var, weight, bias, norm.training, norm.momentum, norm.eps)
    if is_fusable(x, norm):
        result: Tensor = _GatedBatchNorm.apply(
            *(x, mask_NC, norm.weight, norm.bias, norm.running_mean, norm.running_var),
            *(norm.training, norm.momentum, norm.eps),
        )
        return result
    output = batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )
    return output * _channels(mask_NC, x).to(output.dtype)


def is_fusable(x: Tensor, norm: _BatchNorm) -> bool:
    """Whether _GatedBatchNorm is faster: on CPUs, in full precision. A compiler fuses better by itself."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dim() > 2 and x.dtype == norm.weight.dtype


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


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Return (C,) or (N, C) values in a shape that broadcasts to x."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))
