"""Base of the data sets that decode images when they are needed, and their crops: files in folders, rows of Parquet shards.

Loader processes decode, crop and flip, and return uint8; finish() normalises and mixes whole batches on the device.
All random draws for a batch derive from its seed, so its pixels depend neither on the number of loader processes nor on
earlier batches.
"""

import io
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.seeds import drawing
from orchestrator.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
CROPPED_SHARE = 0.875
"""Share of the shorter side that the centre crop keeps: 224 of 256 pixels."""
SIZE_STEP = 32
"""Step in pixels by which images grow over the epochs: large, so that cuDNN tunes convolutions for few sizes."""
REDUCTIONS = (8, 4, 2)
"""Factors by which a JPEG decoder can reduce the sides of an image."""
Size = tuple[int, int]  # height, width
Crop = Callable[[Tensor, Size], Tensor]


class EncodedImages(Dataset[tuple[Tensor, Tensor]]):
    """Encoded images and their labels; an item is ((3, H, W) uint8, () int64), and finish() makes a batch float32.

    augment: whether images are cropped, flipped and mixed at random, as `data` says; otherwise the centre is cropped.
    """

    def __init__(self, labels_N: Tensor, data: DataConfig, *, augment: bool, num_classes: int) -> None:
        self.labels = labels_N
        self.data = data
        self.augment = augment
        self.num_classes = num_classes
        self._mix = _mix(data, num_classes) if augment else None

    @abstractmethod
    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the encoded images, (bytes,) uint8 each. Raises: DataError."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the location of an image, for messages."""

    @abstractmethod
    def size(self, index: int, encoded: Tensor) -> Size:
        """Return the height and width of an image, without decoding it."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the items of a batch; torch's DataLoader calls this method.

        indices: in training a Batch, whose seed and epoch are used; elsewhere any list.
        """
        crop = self._crop(getattr(indices, "epoch", None))
        encoded = self.read(indices)
        with drawing(getattr(indices, "seed", None)):
            return [
                (self._shown(index, data, crop), self.labels[index])
                for index, data in zip(indices, encoded, strict=True)
            ]

    def finish(self, images: Tensor, labels: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """Return the images normalised and, in training, mixed; see orchestrator.datasets.loading.Finishing."""
        images = normalised(images)
        if seed is None or self._mix is None:
            return images, labels
        with drawing(seed):
            mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
            return mixed

    def _crop(self, epoch: int | None) -> Crop:
        if not self.augment:
            return CentreCrop(self.data.image_size)
        return RandomCrop(size_in(self.data, epoch), is_varied=self.data.trivial_augment)

    def _shown(self, index: int, encoded: Tensor, crop: Crop) -> Tensor:
        try:
            return crop(encoded, self.size(index, encoded))
        except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # what Pillow and torchvision raise
            raise DataError(f"{self.name(index)} cannot be decoded ({error}); repair or remove it") from error


class RandomCrop:
    """Crops a random part of random size, and flips every second one: the usual augmentation for ImageNet.

    size: height and width of the result.    is_varied: one more random change, as in TrivialAugment.
    """

    def __init__(self, size: int, *, is_varied: bool) -> None:
        self.size = size
        self._draw = v2.RandomResizedCrop(size)
        self._vary = v2.TrivialAugmentWide() if is_varied else None

    def __call__(self, encoded: Tensor, size: Size) -> Tensor:
        """Return (3, size, size) uint8."""
        box = self._draw.make_params([torch.empty(3, *size, device="meta")])  # before decoding
        image = decode(encoded, size, _reduction(min(box["height"], box["width"]), self.size))
        top, height = _scaled(box["top"], box["height"], image.shape[1] / size[0])
        left, width = _scaled(box["left"], box["width"], image.shape[2] / size[1])
        image = functional.resized_crop(image, top, left, height, width, [self.size, self.size])
        if torch.rand(()) < 0.5:
            image = functional.horizontal_flip(image)
        return image if self._vary is None else self._vary(image)


class CentreCrop:
    """Resizes the shorter side to size / CROPPED_SHARE and crops the centre: (3, size, size) uint8."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, encoded: Tensor, size: Size) -> Tensor:
        """Return (3, size, size) uint8."""
        shorter = round(self.size / CROPPED_SHARE)
        image = decode(encoded, size, _reduction(min(size), shorter))
        return functional.center_crop(functional.resize(image, [shorter]), [self.size, self.size])


def decode(encoded: Tensor, size: Size, reduction: int = 1) -> Tensor:
    """Return (3, H, W) uint8, in RGB; with a reduction the sides are shorter by about this factor.

    torchvision's decoder is the fastest for whole JPEGs. Pillow is faster if a JPEG can be reduced while it is decoded,
    and reads all other formats.
    """
    if reduction == 1 and encoded[:2].tolist() == [0xFF, 0xD8]:
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except RuntimeError:  # a kind of JPEG that it does not support, such as CMYK; Pillow detects damage as well
            pass
    with Image.open(io.BytesIO(encoded.numpy().data)) as image:
        if reduction > 1:
            image.draft("RGB", (size[1] // reduction, size[0] // reduction))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def header_size(encoded: Tensor) -> Size:
    """Return the height and width that an image's header states."""
    with Image.open(io.BytesIO(encoded.numpy().data)) as image:
        return image.height, image.width


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images, (..., 3, H, W), as float32, normalised with ImageNet's mean and standard deviation."""
    mean, factor = _mean_and_factor(images.device)
    return images.float().sub_(mean).mul_(factor)  # twice as fast as subtracting from uint8


@cache
def _mean_and_factor(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (3, 1, 1) each, once a device: to copy them in every step, the host would wait for the device."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return mean, 1 / std


def size_in(data: DataConfig, epoch: int | None) -> int:
    """Return the size of the training images in an epoch of a stage; it grows from data.start_size, if that is set.

    >>> data = DataConfig(name="parquet", image_size=224, global_batch_size=1, augment=True, start_size=128, full_size_epoch=6)
    >>> [size_in(data, epoch) for epoch in range(8)]
    [128, 160, 160, 192, 192, 224, 224, 224]
    """
    if data.start_size is None or epoch is None or epoch >= data.full_size_epoch:
        return data.image_size
    missing = (data.image_size - data.start_size) * (1 - epoch / data.full_size_epoch)
    return max(data.start_size, data.image_size - int(missing // SIZE_STEP) * SIZE_STEP)


def _reduction(side: int, wanted: int) -> int:
    """Return the largest reduction with which a side is still at least as long as wanted."""
    return next((reduction for reduction in REDUCTIONS if side >= reduction * wanted), 1)


def _scaled(start: int, length: int, factor: float) -> tuple[int, int]:
    """Return the interval in an image that was decoded with a reduction; it stays within the image."""
    return int(start * factor), max(1, int(length * factor))


def _mix(data: DataConfig, num_classes: int) -> nn.Module | None:
    kinds = [(v2.MixUp, data.mixup), (v2.CutMix, data.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(chosen) if chosen else None
