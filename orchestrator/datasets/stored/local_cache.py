"""Copies of an object store's files on a node's own disk, up to a size; the trials and loader processes of the node share them."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.trial import DataConfig
from orchestrator.errors import DataError, StorageError
from orchestrator.storage.files import LEFTOVER_PREFIX, lock, open_lock, remove_old_leftovers

SMALL = "small"
"""Folder of the copies of small files."""


@dataclass(frozen=True)
class LocalCache:
    """A folder of copies, named by the place and size of the original.

    Each large file is fetched once per node, by the process that needs it first. The copies that were opened longest ago go when
    a new one needs their room; who has them open reads on.

    Small files, of which there may be millions, are neither locked nor counted: their caller decides which of them fit, by the
    listing alone, so that all processes decide alike. They would gain nothing if the oldest made room: an epoch needs all, in
    random order.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def of(cls, data: DataConfig) -> "LocalCache | None":
        """Return the cache that a config names, if any, without what processes that died left in it."""
        if data.cache is None:
            return None
        folder = Path(data.cache).expanduser()
        remove_old_leftovers(folder)
        return cls(folder, int(data.cache_gb * 1e9))

    def path(self, place: str, num_bytes: int, content: Callable[[], Iterable[bytes]]) -> Path | None:
        """Return a copy of the file; None if it is larger than the cache.

        place: its address.    content: returns the file, piece by piece.
        Raises: StorageError if the disk is full; DataError if the file ends early; what `content` raises.
        """
        if num_bytes > self.max_bytes:
            return None
        copy = self.folder / _name(place, num_bytes)
        if not _is_whole(copy, num_bytes):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = copy.with_suffix(".lock")
            with open_lock(path) as file:
                lock(file, path, waits=True)
                if not _is_whole(copy, num_bytes):  # another process may have fetched it meanwhile
                    self._make_room(num_bytes)
                    self._fetch(copy, place, num_bytes, content)
        os.utime(copy)
        return copy

    def read(self, place: str, num_bytes: int, content: Callable[[], Iterable[bytes]]) -> bytes:
        """Return the content of a small file, of which a copy stays here; see path()."""
        name = _name(place, num_bytes)
        copy = self.folder / SMALL / name[:2] / name
        if not _is_whole(copy, num_bytes):
            self._fetch(copy, place, num_bytes, content)
        return copy.read_bytes()

    def _fetch(self, copy: Path, place: str, num_bytes: int, content: Callable[[], Iterable[bytes]]) -> None:
        unfinished = self.folder / f"{LEFTOVER_PREFIX}{copy.name}.{secrets.token_hex(4)}"
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                for chunk in content():
                    file.write(chunk)
            if (found := unfinished.stat().st_size) != num_bytes:
                raise DataError(f"{place}: found {found} bytes, expected {num_bytes}; copy the file again")
            os.replace(unfinished, copy)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: {place} cannot be copied there ({error}); make room, or lower data.cache_gb"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        copies = []
        for path in self.folder.iterdir():
            if path.suffix != ".lock" and path.name != SMALL and (state := _state(path)) is not None:
                copies.append((state.st_mtime, state.st_size, path))
        excess = sum(size for _, size, _ in copies) + num_bytes - self.max_bytes
        for _, size, path in sorted(copies):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _name(place: str, num_bytes: int) -> str:
    return hashlib.sha256(f"{place}:{num_bytes}".encode()).hexdigest()[:32]


def _is_whole(copy: Path, num_bytes: int) -> bool:
    state = _state(copy)
    return state is not None and state.st_size == num_bytes


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
