"""The data set `parquet`: images in shards that `python -m orchestrator.data pack` wrote, in a folder or an object store.

data: {name: parquet, train: s3://bucket/imagenet/train, val: s3://bucket/imagenet/val, image_size: 224, ...}
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.encoded import EncodedImages, Size
from orchestrator.datasets.image_folder import check_same_classes
from orchestrator.datasets.order import LANES, Indices, grouped_order
from orchestrator.datasets.parquet.format import Shards, read_manifest
from orchestrator.datasets.parquet.shard_folder import ShardFolder
from orchestrator.errors import ConfigError, DataError


class PackedImages(EncodedImages):
    """A subset of the images of packed shards, in the shards' order."""

    def __init__(self, shards: Shards, images_N: Indices, data: DataConfig, *, augment: bool) -> None:
        images_N = np.sort(images_N)
        super().__init__(shards.labels_N[images_N], data, augment=augment, num_classes=len(shards.classes))
        self.shards = shards
        self.images = images_N

    @property
    def is_remote(self) -> bool:
        """Whether the shards are in an object store."""
        return not self.shards.store.is_local

    def order(self, *, seed: int, global_batch_size: int, num_ranks: int) -> Indices:
        """Return a permutation of the indices that reads row groups as a whole; see orchestrator.datasets.order."""
        return grouped_order(
            self.shards.group_N[self.images],
            self.shards.shard_G,
            seed=seed,
            global_batch_size=global_batch_size,
            num_ranks=num_ranks,
            buffer=self.data.shuffle_buffer,
        )

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """See EncodedImages."""
        return self.shards.read(self.images[np.asarray(indices)].tolist(), capacity=self._capacity(indices))

    def name(self, index: int) -> str:
        """See EncodedImages."""
        return self.shards.name(int(self.images[index]))

    def size(self, index: int, encoded: Tensor) -> Size:
        """See EncodedImages; known from the index."""
        height, width = self.shards.sizes_N2[self.images[index]].tolist()
        return height, width

    def _capacity(self, indices: Sequence[int]) -> int:
        """Return the number of row groups to keep: those in the windows of this loader process's lanes, and at their borders."""
        info = get_worker_info()
        num_lanes = LANES // math.gcd(LANES, info.num_workers) if info else LANES
        num_lanes *= getattr(indices, "num_shares", 1)
        window = self.data.shuffle_buffer // LANES
        return num_lanes * (math.ceil(window / self.shards.manifest.rows_per_group) + 2)


def load(data: DataConfig, seed: int) -> tuple[PackedImages, PackedImages, PackedImages]:
    """Return the images for training, held out of the training images, and for validation; the last two are never augmented.

    Whole row groups are held out at random, so that a pass over the held-out images reads nothing else. Images were shuffled
    when they were packed, so about the same share of each class is held out.
    Raises: DataError if a folder is not a packed split or is damaged, or the two have different classes.
    """
    train, val = Shards(_address(data, "train")), Shards(_address(data, "val"))
    check_same_classes(train.classes, val.classes)
    kept, held = _hold_out(train, data, seed)
    return (
        PackedImages(train, kept, data, augment=data.augment),
        PackedImages(train, held, data, augment=False),
        PackedImages(val, np.arange(len(val)), data, augment=False),
    )


def _hold_out(shards: Shards, data: DataConfig, seed: int) -> tuple[Indices, Indices]:
    """Return the images to train on and those held out."""
    num_train = len(shards) if data.num_train is None else data.num_train
    if num_train > len(shards):
        skipped = f", with {len(shards.manifest.skipped)} unreadable ones left out" if shards.manifest.skipped else ""
        raise ConfigError(
            f"data.num_train: found {num_train}, expected at most the {len(shards)} of {data.train}{skipped}; to train on all: "
            f"--set base.data.num_train={len(shards)}"
        )
    shuffled = torch.randperm(len(shards.shard_G), generator=torch.Generator().manual_seed(seed)).numpy()
    place = np.empty_like(shuffled)
    place[shuffled] = np.arange(len(shuffled))
    chosen = np.argsort(place[shards.group_N], kind="stable")[:num_train]
    places = place[shards.group_N[chosen]]
    num_held = max(1, round(data.holdout * num_train))
    is_held = places <= places[num_held - 1]
    if is_held.all():
        raise ConfigError(
            f"data.holdout: {data.train} has {len(shuffled)} row groups, of which {num_train} images are used; whole row "
            "groups are held out, so at least two are needed; pack with a smaller --rows-per-group"
        )
    return chosen[~is_held], chosen[is_held]


def class_names(address: str) -> list[str]:
    """Return the classes of a packed split. Raises: DataError."""
    return Shards(address).classes


def num_images(address: str, enough: int | None) -> int | None:
    """Return the number of images in a packed split, from its manifest. Raises: DataError."""
    return read_manifest(ShardFolder(address)).num_images


def _address(data: DataConfig, split: str) -> str:
    address: str | None = getattr(data, split)
    if address is None:
        raise DataError(
            f"data.{split} is missing; data set parquet needs data.train and data.val, folders that "
            "`python -m orchestrator.data pack` wrote"
        )
    return address
