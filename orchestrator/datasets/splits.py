"""Loads data sets by name and splits them: training, validation and test images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from orchestrator.config.trial import DataConfig
from orchestrator.datasets import cifar10, digits, fashion_mnist, image_folder, synthetic
from orchestrator.datasets.in_memory import InMemoryImages, stratified
from orchestrator.datasets.parquet import reading as parquet
from orchestrator.datasets.stored import in_place
from orchestrator.errors import ConfigError, did_you_mean

ImageDataset = Dataset[tuple[Tensor, Tensor]]
IN_MEMORY = {"cifar10": cifar10, "digits": digits, "fashion_mnist": fashion_mnist, "synthetic": synthetic}
ENCODED: dict[str, Any] = {"image_folder": image_folder, "parquet": parquet, **in_place.FORMATS}
NAMES = (*IN_MEMORY, *ENCODED)
MIRRORED = ("cifar10",)
"""Data sets whose images may be mirrored; digits may not."""


def check(data: DataConfig) -> None:
    """Raise ConfigError unless the data set exists and supports every option that is set."""
    if data.name not in NAMES:
        raise ConfigError(f"data.name: found {data.name!r}, expected a data set{did_you_mean(data.name, NAMES)}")
    options = ("trivial_augment", "mixup", "cutmix", "start_size")
    unknown = [name for name in options if getattr(data, name) not in (False, 0, None)]
    if data.name in IN_MEMORY and unknown:
        raise ConfigError(f"data.{unknown[0]}: data set {data.name} does not support it, {', '.join(ENCODED)} do")


def num_classes(data: DataConfig) -> int | None:
    """Return the number of classes of a known data set; None for an unknown name, or folders that this machine does not see.

    A search may be planned on a machine that does not see the data; the workers, which see it, check the number.
    """
    if data.name in ENCODED and is_visible(data.train):
        return len(ENCODED[data.name].class_names(data))
    return IN_MEMORY[data.name].NUM_CLASSES if data.name in IN_MEMORY else None


def is_visible(address: str | None) -> bool:
    """Return whether this machine sees a folder, or the folder of a pattern; an object store is not asked."""
    if address is None or "://" in address:
        return False
    return Path(address.partition("*")[0].rpartition("/")[0] if "*" in address else address).is_dir()


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """The images that a trial trains on, those that judge it while it runs, and those that are used once, at the end."""

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    num_classes: int
    input_shape: tuple[int, int, int]
    """(3, H, W); images in batches are float32 of this shape, labels int64."""


def load(data: DataConfig, seed: int) -> DataSplits:
    """Return the splits; the same seed holds out the same images, the same share of each class.

    Raises: ConfigError for an unknown name, or a num_train that exceeds the images; DataError if the files are missing
    or damaged.
    """
    check(data)
    if data.name in ENCODED:
        train, validation, test = ENCODED[data.name].load(data, seed)
        shape = (3, data.image_size, data.image_size)
        return DataSplits(
            train=train, validation=validation, test=test, num_classes=train.num_classes, input_shape=shape
        )
    source = IN_MEMORY[data.name]
    (images, labels), (test_images, test_labels) = source.load(data)
    if data.num_train is not None and data.num_train > len(images):
        raise ConfigError(f"data.num_train: found {data.num_train}, expected at most the {len(images)} of {data.name}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: data.num_train]
    held = stratified(labels[order], data.validation_share)
    kept, out = order[~held], order[held]
    return DataSplits(
        train=InMemoryImages(
            images[kept],
            labels[kept],
            max_shift=data.image_size // 8 if data.augment else 0,
            mirror=data.augment and data.name in MIRRORED,
        ),
        validation=InMemoryImages(images[out], labels[out]),
        test=InMemoryImages(test_images, test_labels),
        num_classes=source.NUM_CLASSES,
        input_shape=(3, data.image_size, data.image_size),
    )


def num_train(data: DataConfig, *, enough: int | None = None) -> int | None:
    """Return the number of training images, the held-out ones included; None if it depends on data that this machine does not see.

    enough: files in folders, which must be listed, are counted up to this number; None does not count them.
    """
    if data.num_train is not None:
        return data.num_train
    if data.name in ENCODED and is_visible(data.train):
        return ENCODED[data.name].num_images(data, enough)
    return IN_MEMORY[data.name].NUM_TRAIN if data.name in IN_MEMORY else None
