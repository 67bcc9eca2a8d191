"""From grey images to what a network sees, and to splits."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from orchestrator.errors import ConfigError


def prepare(images_N1HW: Tensor, image_size: int, mean: float, std: float) -> Tensor:
    """Return grey images in [0, 1] as (N, 1, image_size, image_size) float32: resized and normalised."""
    if images_N1HW.shape[-1] != image_size:
        images_N1HW = interpolate(images_N1HW, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return (images_N1HW - mean) / std


def stratified(labels_N: Tensor, share: float) -> Tensor:
    """Return (N,) bool with the first images of each class True: `share` of them, at least one, and never all.

    >>> stratified(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), 0.25).tolist()
    [True, True, False, False, False, False, False, False]
    """
    held = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():
        members = (labels_N == label).nonzero().flatten()
        held[members[: max(1, round(share * len(members)))]] = True
    if held.all():
        raise ConfigError(
            f"data.num_train: found {len(labels_N)}, expected enough images to hold out one of each class"
        )
    return held
