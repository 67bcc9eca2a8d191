"""Images in files that consist of groups, which are read as a whole: the part that all formats share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from orchestrator.datasets.encoded import Size, header_size
from orchestrator.datasets.order import Indices
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.datasets.stored.group_cache import Group, GroupCache
from orchestrator.errors import DataError
from orchestrator.storage.files import wait_until

NUM_OPEN_FILES = 32
"""Files that a process keeps open; at any time an order reads from about as many as a rank has lanes."""


class FileGroups(ABC):
    """The images of a split, in the order of its files. What it holds in memory is small; images are read when they are asked for.

    group_N: the group of each image, ascending from 0.    shard_G: the file of each group.
    """

    def __init__(
        self,
        store: StoredFolder,
        files: Sequence[str],
        sizes_F: Sequence[Indices],
        labels_N: Tensor,
        classes: list[str],
    ) -> None:
        self.store = store
        self.files = list(files)
        self.classes = classes
        self.labels_N = labels_N
        sizes_G = np.concatenate([np.zeros(0, np.int64), *sizes_F])
        self.group_N = np.repeat(np.arange(len(sizes_G)), sizes_G)
        self.shard_G = np.repeat(np.arange(len(sizes_F)), [len(sizes) for sizes in sizes_F])
        self.largest_group = int(sizes_G.max(initial=1))
        self.first_image_G = np.cumsum(sizes_G) - sizes_G
        self._first_group_F = np.searchsorted(self.shard_G, np.arange(len(sizes_F)))
        self._cache = GroupCache(self._groups)
        self._kept_open = lru_cache(NUM_OPEN_FILES)(self.opened)

    def __len__(self) -> int:
        return len(self.group_N)

    def __getstate__(self) -> dict[str, Any]:
        """Drop open files: loader processes open their own."""
        return {**vars(self), "_kept_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _kept_open=lru_cache(NUM_OPEN_FILES)(self.opened))

    @property
    def is_remote(self) -> bool:
        """Whether it reads from an object store."""
        return not self.store.is_local

    @abstractmethod
    def opened(self, file: int) -> Any:
        """Open a file for read_groups, which several threads may call with it.

        Raises: DataError, OSError or ArrowException if it cannot be opened or has changed.
        """

    @abstractmethod
    def read_groups(self, opened: Any, file: int, groups: Sequence[int]) -> Sequence[Group]:
        """Return groups of a file, numbered from 0 within it. Raises: DataError, OSError or ArrowException."""

    def read(self, images: Sequence[int], *, capacity: int, ahead: Sequence[int] = ()) -> list[Tensor]:
        """Return the bytes of image files, (bytes,) uint8 each.

        capacity: number of groups to keep for later calls.    ahead: images that a later call will read; from an object store they
        are fetched meanwhile.
        """
        places = self._places(images)
        if self.is_remote and len(ahead):
            self._cache.read_ahead(self._places(ahead))
        found = self._cache.read(places, capacity)
        rows = np.asarray(images) - self.first_image_G[self.group_N[np.asarray(images)]]
        return [found[place][row] for place, row in zip(places, rows.tolist(), strict=True)]

    def name(self, image: int) -> str:
        """Return the location of an image, for messages."""
        file = int(self.shard_G[self.group_N[image]])
        first = int(self.first_image_G[self._first_group_F[file]])
        return f"{self.store.place(self.files[file])}, image {image - first}"

    def size(self, image: int, encoded: Tensor) -> Size:
        """Return the height and width of an image, without decoding it."""
        return header_size(encoded)

    def places(self) -> list[tuple[str, int, int]]:
        """Return the file of each image, its group in the file, and its place in the group."""
        groups, files = self.group_N, self.shard_G[self.group_N]
        in_file, rows = groups - self._first_group_F[files], np.arange(len(self)) - self.first_image_G[groups]
        return [
            (self.files[file], *place)
            for file, *place in zip(files.tolist(), in_file.tolist(), rows.tolist(), strict=True)
        ]

    def _places(self, images: Sequence[int]) -> list[tuple[int, int]]:
        groups = self.group_N[np.asarray(images)]
        files = self.shard_G[groups]
        return list(zip(files.tolist(), (groups - self._first_group_F[files]).tolist(), strict=True))

    def _groups(self, file: int, groups: Sequence[int]) -> Sequence[Group]:
        """Read groups; after a failure wait until the store is reachable, by its folder, and read once more."""
        place = self.store.place(self.files[file])
        try:
            return self.read_groups(self._kept_open(file), file, groups)
        except (pa.ArrowException, OSError, DataError):
            self._kept_open.cache_clear()  # it was opened before the failure
            wait_until(lambda: self.store.is_there(self.files[file].rpartition("/")[0]), place)
        try:
            return self.read_groups(self._kept_open(file), file, groups)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{place}, groups {list(groups)}: cannot be read ({error}); {self.advice}") from error

    advice = "copy the file again"
    """What to do about a file that cannot be read."""
