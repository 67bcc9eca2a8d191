"""Data sets by name. Each is a module with `num_classes` and `load(data) -> (train, val)` of images and labels in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from orchestrator.config import DataConfig
from orchestrator.datasets import digits, fashion_mnist, synthetic
from orchestrator.errors import ConfigError, did_you_mean

ImageDataset = Dataset[tuple[Tensor, ...]]
SETS = {"digits": digits, "fashion_mnist": fashion_mnist, "synthetic": synthetic}


@dataclass(frozen=True)
class DataSplits:
    """What a trial trains on, what it is judged by while it runs, and what is touched once, at the end."""

    train: ImageDataset
    holdout: ImageDataset
    val: ImageDataset
    num_classes: int
    input_shape: tuple[int, int, int]
    """(3, H, W); images are float32 of this shape, labels int64."""


def load(data: DataConfig, seed: int) -> DataSplits:
    """Return the splits; the same seed holds out the same images.

    Raises: ConfigError for an unknown name; DataError if the files are absent or damaged.
    """
    check(data)
    source = SETS[data.name]
    (images, labels), (val_images, val_labels) = source.load(data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: data.num_train]
    num_holdout = max(1, round(data.holdout * len(order)))
    if num_holdout >= len(order):
        raise ConfigError(f"data.holdout: {data.holdout} of {len(order)} images leaves none to train on")
    held, kept = order[:num_holdout], order[num_holdout:]
    train: ImageDataset = (
        _Augmented(images[kept], labels[kept]) if data.augment else TensorDataset(images[kept], labels[kept])
    )
    return DataSplits(
        train=train,
        holdout=TensorDataset(images[held], labels[held]),
        val=TensorDataset(val_images, val_labels),
        num_classes=source.NUM_CLASSES,
        input_shape=(3, data.image_size, data.image_size),
    )


def check(data: DataConfig) -> None:
    """Raise ConfigError unless load() knows the name."""
    if data.name not in SETS:
        raise ConfigError(f"data.name: {data.name!r} is no data set{did_you_mean(data.name, list(SETS))}")


def num_classes(data: DataConfig) -> int | None:
    """Return the number of classes of a known data set; None for an unknown name."""
    return SETS[data.name].NUM_CLASSES if data.name in SETS else None


class _Augmented(Dataset[tuple[Tensor, ...]]):
    """Images shifted by up to an eighth of their size in each direction, drawn from torch's global generator."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.margin = images.shape[-1] // 8
        self.draw: Callable[[], int] = lambda: int(torch.randint(2 * self.margin + 1, ()))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image = self.images[index]
        _, height, width = image.shape
        padded = torch.nn.functional.pad(image, [self.margin] * 4, mode="replicate")
        top, left = self.draw(), self.draw()
        return padded[:, top : top + height, left : left + width], self.labels[index]
