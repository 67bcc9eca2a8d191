"""Re-estimating the statistics of batch normalisation after a network has changed."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gator.errors import PruneError


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of every batch normalisation by their mean over `batches`, and leave the model in eval mode.

    batches: images (N, C, H, W), one tensor a batch, on the model's device. Everything else runs in eval mode: gates and dropout do not
    sample.
    Statistics gathered under sampled masks are wrong for the pruned network (seen on digits: 31.4 % top-1 before, 94.4 % after).

    Raises: PruneError if there is no batch, or one is not a tensor. Then, and when the model fails, the statistics are what they were.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    number = 0
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    try:
        for number, images in enumerate(batches, start=1):
            if not isinstance(images, Tensor):
                raise PruneError(
                    f"batch {number} is a {type(images).__name__}, expected a tensor of images; give (images for images, _ in loader)"
                )
            for norm in norms:
                norm.momentum = (
                    1 / number
                )  # the mean so far; None would read num_batches_tracked from the device in each norm
            model(images)
        if norms and not number:
            raise PruneError("there is no batch, expected at least one; a generator that was read before has none left")
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
