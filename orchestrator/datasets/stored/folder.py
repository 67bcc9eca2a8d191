"""Access through pyarrow to a folder on this machine or in an object store: file:///..., s3://bucket/... and gs://bucket/....

Credentials are found as by the provider's own tools. Another S3 server can be set in the environment variable
AWS_ENDPOINT_URL, or in the address: s3://bucket/folder?endpoint_override=http://127.0.0.1:9000.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.errors import DataError
from orchestrator.masking import masked
from orchestrator.storage.files import LEFTOVER_PREFIX, lock, open_lock, write_atomic

CHUNK_BYTES = 8 * 2**20


class StoredFolder:
    """A folder of files. Every error names the file, without credentials in its address."""

    def __init__(self, address: str, cache: LocalCache | None = None) -> None:
        self.address = address
        self._cache = cache
        try:
            if "://" in address:
                self._fs, self._root = fs.FileSystem.from_uri(address)
            else:
                self._fs, self._root = fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
            raise DataError(f"{masked(address)}: the folder cannot be opened ({error})") from error
        self.folder = Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None
        """Its path on this machine; None in an object store."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine."""
        return self.folder is not None

    def place(self, name: str = "") -> str:
        """Return the location of a file, for messages."""
        folder = masked(self.address).partition("?")[0].rstrip("/")
        return f"{folder}/{name}" if name else folder

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with self._telling(name, "read"), self._fs.open_input_stream(self._path(name)) as stream:
            content: bytes = stream.read()
            return content

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file, piece by piece."""
        with self._telling(name, "read"), self._fs.open_input_stream(self._path(name)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def open(self, name: str, num_bytes: int | None = None) -> Any:
        """Open a file for random access. num_bytes: its size; with it, and a cache, a copy on this machine's disk is opened."""
        with self._telling(name, "read"):
            if self._cache is not None and num_bytes is not None and not self.is_local:
                copy = self._cache.path(self.place(name), num_bytes, lambda: self.chunks(name))
                if copy is not None:
                    return fs.LocalFileSystem().open_input_file(str(copy))
            return self._fs.open_input_file(self._path(name))

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file atomically: a reader sees the old content or the new one. Object stores guarantee this themselves."""
        with self._telling(name, "written"):
            if self.is_local:
                write_atomic(Path(self._path(name)), bytes(content))
                return
            with self._fs.open_output_stream(self._path(name)) as stream:
                stream.write(content)

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted. Raises: DataError if it does not exist."""
        with self._telling("", "listed"):
            found = self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
            if not found and self._fs.get_file_info(self._root).type == fs.FileType.NotFound:
                raise DataError(f"{self.place()}: folder not found, expected one with a folder of images per class")
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def is_there(self, name: str) -> bool:
        """Return whether a file or folder exists; also False if the store cannot be reached."""
        try:
            return self._fs.get_file_info(self._path(name)).type != fs.FileType.NotFound
        except (OSError, ValueError):
            return False

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

    @contextmanager
    def _telling(self, name: str, what: str) -> Iterator[None]:
        """Turn pyarrow's errors, which are subclasses of OSError and ValueError, into a DataError."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise DataError(f"{self.place(name)} cannot be {what} ({error})") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")
