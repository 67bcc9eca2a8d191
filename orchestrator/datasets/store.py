"""A folder of files, on this machine or in an object store: file:///..., s3://bucket/... and gs://bucket/... by pyarrow.

Credentials come from where the provider's own tools look for them. Another server that speaks S3 is named by the
environment variable AWS_ENDPOINT_URL, or in the address: s3://bucket/folder?endpoint_override=http://127.0.0.1:9000.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from orchestrator.errors import DataError
from orchestrator.masking import masked
from orchestrator.paths import write_atomic


class Store:
    """A folder. Every error names the file, without the credentials that its address may hold."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_local = "://" not in address
        try:
            if self.is_local:
                self._fs, self._root = fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
            else:
                self._fs, self._root = fs.FileSystem.from_uri(address)
        except (OSError, ValueError) as error:  # pyarrow's errors are their children
            raise DataError(f"{masked(address)}: no folder that can be opened ({error})") from error

    def place(self, name: str = "") -> str:
        """Return where a file lies, fit for a message."""
        folder = masked(self.address).partition("?")[0].rstrip("/")
        return f"{folder}/{name}" if name else folder

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        try:
            with self._fs.open_input_stream(self._path(name)) as stream:
                content: bytes = stream.read()
                return content
        except OSError as error:
            raise DataError(f"{self.place(name)} cannot be read ({error})") from error

    def open(self, name: str) -> Any:
        """Return a file for random access."""
        try:
            return self._fs.open_input_file(self._path(name))
        except OSError as error:
            raise DataError(f"{self.place(name)} cannot be read ({error})") from error

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a whole file: a reader sees the old content or the new, never a part. Object stores promise as much."""
        try:
            if self.is_local:
                write_atomic(Path(self._path(name)), bytes(content))
                return
            with self._fs.open_output_stream(self._path(name)) as stream:
                stream.write(content)
        except OSError as error:
            raise DataError(f"{self.place(name)} cannot be written ({error})") from error

    def sizes(self, names: list[str]) -> list[int | None]:
        """Return the bytes of each file, None for one that is not there."""
        try:
            infos = self._fs.get_file_info([self._path(name) for name in names])
        except OSError as error:
            raise DataError(f"{self.place()} cannot be listed ({error})") from error
        return [info.size if info.is_file else None for info in infos]

    def has(self, name: str) -> bool:
        """Return whether a file is there now; False too if the store cannot be reached."""
        try:
            return self.sizes([name]) != [None]
        except DataError:
            return False

    def remove_folder(self, name: str) -> None:
        """Remove a folder in this one, and all that is in it; nothing happens if it is not there."""
        path = self._path(name)
        if self._fs.get_file_info(path).type == fs.FileType.Directory:
            self._fs.delete_dir(path)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
