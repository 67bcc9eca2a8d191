"""The folder of a data set, on this machine or in an object store (see storage/addresses.py)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from pyarrow import fs

from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.errors import DataError
from orchestrator.storage.addresses import AddressedFolder
from orchestrator.storage.files import LEFTOVER_PREFIX, lock, open_lock


class StoredFolder(AddressedFolder):
    """A folder of files. Every error names the file, without credentials in its address."""

    error = DataError

    def __init__(self, address: str, cache: LocalCache | None = None) -> None:
        super().__init__(address)
        self._cache = cache

    def open(self, name: str, num_bytes: int | None = None) -> Any:
        """Open a file for random access. num_bytes: its size; with it, and a cache, a copy on this machine's disk is opened."""
        with self._telling(name, "read"):
            if self._cache is not None and num_bytes is not None and not self.is_local:
                copy = self._cache.path(self.place(name), num_bytes, lambda: self.chunks(name))
                if copy is not None:
                    return fs.LocalFileSystem().open_input_file(str(copy))
            return self._fs.open_input_file(self._path(name))

    def content(self, name: str, num_bytes: int) -> bytes:
        """Return the content of a small file. num_bytes: its size if a copy is to stay in the cache, 0 otherwise."""
        if self._cache is not None and num_bytes:
            return self._cache.read(self.place(name), num_bytes, lambda: self.chunks(name))
        return b"".join(self.chunks(name))  # read() asks once more, because of files that are replaced

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted. Raises: DataError if it does not exist."""
        with self._telling("", "listed"):
            children = self._children()
            if not children and self._fs.get_file_info(self._path("")).type == fs.FileType.NotFound:
                raise DataError(
                    f"{self.place()}: folder not found, expected one with a folder of images per class{self.advice()}"
                )
        return sorted(name for name, is_folder in children.items() if is_folder)

    def find(self, pattern: str) -> dict[str, int]:
        """Return the files below the folder whose path matches the pattern (`*` also matches `/`), with their sizes in bytes, sorted."""
        with self._telling("", "listed"):
            found = self._fs.get_file_info(fs.FileSelector(self._root, recursive=True))
        root = f"{self._root.rstrip('/')}/"
        names = {info.path.removeprefix(root): info.size for info in found if info.is_file}
        return {name: names[name] for name in sorted(names) if fnmatchcase(name, pattern)}

    def sizes(self, names: list[str]) -> list[int | None]:
        """Return the size of each file in bytes, None for one that does not exist."""
        with self._telling("", "listed"):
            infos = self._fs.get_file_info([self._path(name) for name in names])
        return [info.size if info.is_file else None for info in infos]

    def remove(self, names: list[str]) -> None:
        """Remove files; those that do not exist are ignored."""
        for name, size in zip(names, self.sizes(names), strict=True):
            if size is not None:
                with self._telling(name, "removed"):
                    self._fs.delete_file(self._path(name))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock file within the context; object stores have no locks.

        The kernel releases the lock when the process dies, however it does; the file stays.
        Raises: DataError if another process holds it.
        """
        if self.folder is None:
            yield
            return
        with self._telling(name, "written"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open_lock(self.folder / name) as file:
            try:
                lock(file, self.folder / name, waits=False)
            except BlockingIOError as error:
                raise DataError(
                    f"another process is using {self.place()}; wait for it, or name another folder"
                ) from error
            yield

    def remove_leftovers(self, names: Iterable[str]) -> None:
        """Remove what processes that died left of these files, unfinished; the caller must hold the lock. Object stores keep none."""
        if self.folder is None:
            return
        paths = {self.folder / name for name in names}
        for folder in {path.parent for path in paths}:
            for path in folder.glob(f"{LEFTOVER_PREFIX}*"):
                if folder / path.name.removeprefix(LEFTOVER_PREFIX).rpartition(".")[0] in paths:
                    path.unlink(missing_ok=True)
