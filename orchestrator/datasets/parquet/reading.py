"""The data set `parquet`: images in shards that `python -m orchestrator.data pack` wrote, in a folder or an object store.

data: {name: parquet, train: s3://bucket/imagenet/train, test: s3://bucket/imagenet/val, image_size: 224, ...}
"""

import numpy as np

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.image_folder import check_same_classes
from orchestrator.datasets.parquet.format import Shards, read_manifest
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.datasets.stored.grouped import GroupedImages, split_off
from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.errors import DataError


def load(data: DataConfig, seed: int) -> tuple[GroupedImages, GroupedImages, GroupedImages]:
    """Return the images for training, for validation (held out of them), and for testing; the last two are never augmented.

    Images were shuffled when they were packed, so about the same share of each class is held out.
    Raises: DataError if a folder is not a packed split or is damaged, or the two have different classes.
    """
    train, test = (Shards(_address(data, split), LocalCache.of(data)) for split in ("train", "test"))
    check_same_classes(train.classes, test.classes)
    kept, held = split_off(train, data, seed, "pack with a smaller --rows-per-group")
    return kept, held, GroupedImages(test, np.arange(len(test)), data, augment=False)


def class_names(data: DataConfig) -> list[str]:
    """Return the classes of data.train. Raises: DataError."""
    return Shards(_address(data, "train")).classes


def num_images(data: DataConfig, enough: int | None) -> int | None:
    """Return the number of images in data.train, from its manifest. Raises: DataError."""
    return read_manifest(StoredFolder(_address(data, "train"))).num_images


def _address(data: DataConfig, split: str) -> str:
    address: str | None = getattr(data, split)
    if address is None:
        raise DataError(
            f"data.{split} is missing; data set parquet needs data.train and data.test, folders that "
            "`python -m orchestrator.data pack` wrote"
        )
    return address
