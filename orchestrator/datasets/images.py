"""From grey images to what a network sees."""

from torch import Tensor
from torch.nn.functional import interpolate


def prepare(images_N1HW: Tensor, image_size: int, mean: float, std: float) -> Tensor:
    """Return grey images in [0, 1] as (N, 1, image_size, image_size) float32: resized and normalised."""
    if images_N1HW.shape[-1] != image_size:
        images_N1HW = interpolate(images_N1HW, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return (images_N1HW - mean) / std
