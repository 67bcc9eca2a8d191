"""Access through pyarrow to a folder on this machine or in an object store: file:///..., s3://bucket/... and gs://bucket/....

Credentials are found as by the provider's own tools. Another S3 server can be set in the environment variable
AWS_ENDPOINT_URL, or in the address: s3://bucket/folder?endpoint_override=http://127.0.0.1:9000.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import ClassVar, TypeVar

import pyarrow as pa
from pyarrow import fs

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.masking import masked
from orchestrator.storage.files import wait_until, write_atomic

logger = logging.getLogger(__name__)
CHUNK_BYTES = 8 * 2**20
RETRY_LIMIT_S = 20
"""How long pyarrow repeats a request to Google Cloud Storage that fails; its default of 15 minutes also holds without credentials."""
ADVICE = {
    "s3": "check the bucket's name, the credentials and the region (such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
    "AWS_DEFAULT_REGION)",
    "gs": "check the bucket's name and the credentials (such as GOOGLE_APPLICATION_CREDENTIALS)",
}
"""What to do about a store that cannot be used, by the scheme of its address."""
T = TypeVar("T")
Stamp = tuple[int, int]
"""Size in bytes and time of the last change: differs when the content has changed."""


def is_address(place: str) -> bool:
    """Return whether this is an address such as s3://bucket/runs, and not a path."""
    return "://" in place


def joined(address: str, name: str) -> str:
    """Return the address of what is in a folder.

    >>> joined("s3://bucket/runs?region=eu-west-1", "digits")
    's3://bucket/runs/digits?region=eu-west-1'
    """
    folder, mark, options = address.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def parted(place: str) -> tuple[str, str]:
    """Return the folder of a file, and the file's name; place: a path or an address.

    >>> parted("s3://bucket/runs/weights.safetensors?region=eu-west-1")
    ('s3://bucket/runs?region=eu-west-1', 'weights.safetensors')
    """
    path, mark, options = place.partition("?") if is_address(place) else (place, "", "")
    folder, _, name = path.rpartition("/")
    return f"{folder}{mark}{options}", name


def _with_retry_limit(address: str) -> str:
    """Return the address with a time limit for the requests to Google Cloud Storage, unless it has one.

    >>> _with_retry_limit("gs://bucket/runs"), _with_retry_limit("s3://bucket/runs")
    ('gs://bucket/runs?retry_limit_seconds=20', 's3://bucket/runs')
    """
    if not address.startswith("gs://") or "retry_limit_seconds=" in address:
        return address
    return f"{address}{'&' if '?' in address else '?'}retry_limit_seconds={RETRY_LIMIT_S}"


class AddressedFolder:
    """A folder of files. Every error names the file, without credentials in its address."""

    error: ClassVar[type[OrchestratorError]] = StorageError
    """What is raised where the folder or a file in it cannot be read or written."""

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            if is_address(address):
                self._fs, self._root = fs.FileSystem.from_uri(_with_retry_limit(address))
            else:
                self._fs, self._root = fs.LocalFileSystem(), str(Path(address).expanduser().absolute())
        except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
            raise self.error(f"{masked(address)}: the folder cannot be opened ({error}){self.advice()}") from error
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
        """Return the content of a file, as it was at one time."""
        with self._telling(name, "read"):
            while True:
                with self._fs.open_input_stream(self._path(name)) as stream:
                    content: bytes = stream.read()
                # pyarrow asks for the size first, and cuts an object short that has been replaced by a longer one since
                if self.is_local or self._fs.get_file_info(self._path(name)).size == len(content):
                    return content

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file, piece by piece."""
        with self._telling(name, "read"), self._fs.open_input_stream(self._path(name)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file atomically: a reader sees the old content or the new one. Object stores guarantee this themselves."""
        with self._telling(name, "written"):
            if self.is_local:
                write_atomic(Path(self._path(name)), bytes(content))
                return
            with self._fs.open_output_stream(self._path(name)) as stream:
                stream.write(content)

    def is_there(self, name: str) -> bool:
        """Return whether a file or folder exists; also False if the store cannot be reached."""
        try:
            return self._fs.get_file_info(self._path(name)).type != fs.FileType.NotFound
        except (OSError, ValueError):
            return False

    def names(self, name: str = "", *, only_folders: bool = False) -> list[str]:
        """Return the names of the files and folders in the folder, or in one below it, sorted; none if it does not exist."""
        return sorted(child for child, is_folder in self._children(name).items() if is_folder or not only_folders)

    def _children(self, name: str = "") -> dict[str, bool]:
        """Return the names in the folder, or in one below it, each with whether it is a folder."""
        path = self._path(name)
        is_flat = self._fs.type_name == "gcs"  # pyarrow lists there the folders alone that somebody has created
        with self._telling(name, "listed"):
            found = self._fs.get_file_info(fs.FileSelector(path, recursive=is_flat, allow_not_found=True))
        children: dict[str, bool] = {}
        for info in found:
            child, below, _ = info.path.removeprefix(f"{path}/").partition("/")
            children[child] = bool(below) or info.type == fs.FileType.Directory or children.get(child, False)
        return children

    def stamps(self, name: str = "") -> dict[str, Stamp]:
        """Return the files below the folder, or below one in it: their names, from this folder on, with their stamps."""
        with self._telling(name, "listed"):
            found = self._fs.get_file_info(fs.FileSelector(self._path(name), recursive=True, allow_not_found=True))
        root = f"{self._root.rstrip('/')}/"
        return {info.path.removeprefix(root): (info.size, info.mtime_ns or 0) for info in found if info.is_file}

    def remove_below(self, name: str = "") -> None:
        """Remove everything below the folder, or below one in it, if it exists."""
        with self._telling(name, "removed"):
            self._fs.delete_dir_contents(self._path(name), missing_dir_ok=True)

    def remove_file(self, name: str) -> None:
        """Remove a file, if it exists."""
        with self._telling(name, "removed"):
            if self._fs.get_file_info(self._path(name)).is_file:
                self._fs.delete_file(self._path(name))

    def waited_for(self, action: Callable[[], T]) -> T:
        """Return what the action returns, which is repeated as long as the store cannot be reached.

        Raises: StorageError after STORAGE_TIMEOUT_S.
        """
        results: list[T] = []
        problems: list[str] = []

        def succeeds() -> bool:
            """Try once."""
            try:
                results.append(action())
            except self.error as error:
                problems[:] = [str(error)]
            return bool(results)

        try:
            wait_until(succeeds, self.place())
        except StorageError as error:
            raise StorageError(f"{error}; the last attempt ended with: {problems[0]}") from error
        return results[0]

    @contextmanager
    def _telling(self, name: str, what: str) -> Iterator[None]:
        """Turn pyarrow's errors, which are subclasses of OSError and ValueError, into one of this project."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise self.error(f"{self.place(name)} cannot be {what} ({error}){self.advice()}") from error

    def advice(self) -> str:
        """Return the end of a message about a store that cannot be used; "" for a folder on this machine."""
        advice = ADVICE.get(self.address.partition("://")[0])
        return "" if advice is None else f"; {advice}"

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")


@contextmanager
def repeated(action: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Call the action every so many seconds while the body runs, from another thread; a store that is away is reported once."""
    ended = Event()

    def work() -> None:
        """Repeat it."""
        is_away = False
        while not ended.wait(every_s):
            try:
                action()
                is_away = False
            except StorageError as error:
                if not is_away:
                    logger.warning("%s; tried again until it succeeds", error)
                is_away = True

    thread = Thread(target=work, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
