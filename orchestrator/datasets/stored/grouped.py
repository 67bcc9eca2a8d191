"""Images that are read in groups, such as the row groups of a Parquet file: a subset of them, its order, and who is held out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.encoded import EncodedImages, Size
from orchestrator.datasets.order import LANES, Indices, grouped_order
from orchestrator.datasets.stored.file_groups import FileGroups
from orchestrator.errors import ConfigError


class GroupedImages(EncodedImages):
    """A subset of the images, in their order."""

    def __init__(self, source: FileGroups, images_N: Indices, data: DataConfig, *, augment: bool) -> None:
        images_N = np.sort(images_N)
        super().__init__(source.labels_N[images_N], data, augment=augment, num_classes=len(source.classes))
        self.source = source
        self.images = images_N

    @property
    def is_remote(self) -> bool:
        """Whether the images are in an object store."""
        return self.source.is_remote

    def order(self, *, seed: int, global_batch_size: int, num_ranks: int) -> Indices:
        """Return a permutation of the indices that reads groups as a whole; see orchestrator.datasets.order."""
        return grouped_order(
            self.source.group_N[self.images],
            self.source.shard_G,
            seed=seed,
            global_batch_size=global_batch_size,
            num_ranks=num_ranks,
            buffer=self.data.shuffle_buffer,
        )

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """See EncodedImages."""
        ahead = self.images[np.asarray(getattr(indices, "ahead", ()), dtype=np.int64)]
        images = self.images[np.asarray(indices)].tolist()
        return self.source.read(images, capacity=self._capacity(indices), ahead=ahead.tolist())

    def name(self, index: int) -> str:
        """See EncodedImages."""
        return self.source.name(int(self.images[index]))

    def size(self, index: int, encoded: Tensor) -> Size:
        """See EncodedImages."""
        return self.source.size(int(self.images[index]), encoded)

    def _capacity(self, indices: Sequence[int]) -> int:
        """Return the number of groups to keep: those in the windows of this loader process's lanes, and at their borders."""
        info = get_worker_info()
        num_lanes = LANES // math.gcd(LANES, info.num_workers) if info else LANES
        return num_lanes * getattr(indices, "num_shares", 1) * groups_of_lane(self.data, self.source.largest_group)


def groups_of_lane(data: DataConfig, images_per_group: int) -> int:
    """Return the number of groups that a window of the shuffle buffer and its borders touch."""
    return math.ceil(data.shuffle_buffer // LANES / images_per_group) + 2


def split_off(source: FileGroups, data: DataConfig, seed: int, advice: str) -> tuple[GroupedImages, GroupedImages]:
    """Return the images to train on and those held out, which are never augmented.

    Whole groups are held out at random, so that a pass over the held-out images reads nothing else. advice: how the groups
    become smaller.
    Raises: ConfigError if there are fewer images than data.num_train, or too few groups.
    """
    num_train = len(source) if data.num_train is None else data.num_train
    if num_train > len(source):
        raise ConfigError(
            f"data.num_train: found {num_train}, expected at most the {len(source)} of {data.train}; to train on all: "
            f"--set base.data.num_train={len(source)}"
        )
    shuffled = torch.randperm(len(source.shard_G), generator=torch.Generator().manual_seed(seed)).numpy()
    place = np.empty_like(shuffled)
    place[shuffled] = np.arange(len(shuffled))
    chosen = np.argsort(place[source.group_N], kind="stable")[:num_train]
    places = place[source.group_N[chosen]]
    num_held = max(1, round(data.validation_share * num_train))
    is_held: Any = places <= places[num_held - 1]
    if is_held.all():
        raise ConfigError(
            f"data.validation_share: {data.train} has {len(shuffled)} row groups, of which {num_train} images are used; whole row "
            f"groups are held out, so at least two are needed; {advice}"
        )
    return (
        GroupedImages(source, chosen[~is_held], data, augment=data.augment),
        GroupedImages(source, chosen[is_held], data, augment=False),
    )
