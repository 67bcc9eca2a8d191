"""Data sets that are held in memory as tensors, and helpers to normalise and split them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from orchestrator.datasets.seeds import drawing
from orchestrator.errors import ConfigError


class InMemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels; an item is ((3, H, W) float32, () int64).

    Grey images are stored as one channel, expanded to three as a view, which saves a quarter of a gigabyte for Fashion-MNIST.
    max_shift: largest random shift of an item in pixels; 0 for none.    mirror: flip half of the items left to right.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, max_shift: int = 0, mirror: bool = False) -> None:
        self.images = images_NCHW
        self.labels = labels_N
        self.max_shift = max_shift
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the items of a batch; random shifts and flips of a loading.Batch derive from its seed."""
        with drawing(getattr(indices, "seed", None)):
            return [self[index] for index in indices]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.max_shift:
            image = _shifted(image, self.max_shift)
        if self.mirror and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image.expand(3, -1, -1), self.labels[index]


def _shifted(image_CHW: Tensor, max_shift: int) -> Tensor:
    _, height, width = image_CHW.shape
    padded = pad(image_CHW, [max_shift] * 4, mode="replicate")
    top, left = torch.randint(2 * max_shift + 1, (2,)).tolist()
    return padded[:, top : top + height, left : left + width]


def prepare(images_N1HW: Tensor, image_size: int, mean: float, std: float) -> Tensor:
    """Return grey images in [0, 1] as (N, 1, image_size, image_size) float32: resized and normalised."""
    if images_N1HW.shape[-1] != image_size:
        images_N1HW = interpolate(images_N1HW, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return (images_N1HW - mean) / std


def stratified(labels_N: Tensor, share: float) -> Tensor:
    """Return (N,) bool that is True for the first images of each class: `share` of them, at least one. Raises: ConfigError if all.

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
