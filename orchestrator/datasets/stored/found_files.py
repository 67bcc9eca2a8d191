"""The files of a split that others wrote: all of a kind below a folder, or those that a pattern names."""

import re
from dataclasses import dataclass
from typing import Any

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.errors import DataError

SPLIT_NAMES = re.compile(r"(?:^|/)(train|validation|valid|val|test)\b", re.IGNORECASE)


@dataclass(frozen=True)
class FoundFiles:
    """Files below a folder, in the order of their names."""

    store: StoredFolder
    sizes: dict[str, int]
    """Bytes of each file, by its name below the folder."""

    @classmethod
    def of(cls, data: DataConfig, split: str, suffix: str) -> "FoundFiles":
        """Find the files of data.train or data.test: an address of a folder, or one with `*` in its last parts.

        Raises: DataError if nothing is found, or the files of several splits are.
        """
        address: str | None = getattr(data, split)
        if address is None:
            raise DataError(f"data.{split} is missing; data set {data.name} needs data.train and data.test")
        return cls.at(address, suffix, LocalCache.of(data))

    @classmethod
    def at(cls, address: str, suffix: str, cache: LocalCache | None = None) -> "FoundFiles":
        """Find the files at an address; see of()."""
        folder, pattern = _split_pattern(address, f"*{suffix}")
        store = StoredFolder(folder, cache)
        sizes = store.find(pattern)
        if not sizes:
            raise DataError(f"{store.place(pattern)}: found no file, expected {suffix} files")
        splits = {found[1].lower() for name in sizes if (found := SPLIT_NAMES.search(name))}
        if len(splits) > 1 and "*" not in address:
            raise DataError(
                f"{store.place()}: found files of several splits ({', '.join(sorted(splits))}); name those of one: "
                f"{store.place(f'{sorted(splits)[0]}*{suffix}')}"
            )
        return cls(store, sizes)

    @property
    def names(self) -> list[str]:
        """Return the names of the files."""
        return list(self.sizes)

    def open(self, name: str) -> Any:
        """Open a file for random access. Raises: DataError if it has changed its size since it was found."""
        opened = self.store.open(name, self.sizes[name])
        if opened.size() != self.sizes[name]:
            raise DataError(
                f"{self.store.place(name)}: found {opened.size()} bytes, it had {self.sizes[name]} when the training began; "
                "put the file back, or start again"
            )
        return opened


def _split_pattern(address: str, default: str) -> tuple[str, str]:
    """Return the folder and the pattern of the files in it.

    >>> _split_pattern("s3://bucket/data/train-*.tar", "*.tar"), _split_pattern("/data/train", "*.tar")
    (('s3://bucket/data', 'train-*.tar'), ('/data/train', '*.tar'))
    """
    place, _, query = address.partition("?")
    if "*" not in place:
        return address, default
    folder = place[: place.index("*")].rpartition("/")[0]
    pattern = place[len(folder) + 1 :]
    return f"{folder}?{query}" if query else folder or "/", pattern
