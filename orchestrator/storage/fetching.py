"""A folder of a run for a reader: where it is, or a copy of what is needed where it is in an object store."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from orchestrator.errors import RunDirError, StorageError
from orchestrator.storage.addresses import AddressedFolder, is_address
from orchestrator.storage.files import write_atomic


@contextmanager
def fetched(place: str, *patterns: str) -> Iterator[Path]:
    """Yield the folder at a path, or a copy of one at an address: of the files whose names below it match a pattern.

    The copy is removed afterwards. In a pattern `*` also matches `/`.
    Raises: RunDirError if nothing in the store matches, or it cannot be read.
    """
    if not is_address(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="gator-") as copy:
        try:
            store = AddressedFolder(place)
            names = [name for name in store.stamps() if any(fnmatchcase(name, pattern) for pattern in patterns)]
            for name in names:
                write_atomic(Path(copy, name), store.read(name))
        except StorageError as error:
            raise RunDirError(str(error)) from error
        if not names:
            raise RunDirError(
                f"{store.place()} holds none of {', '.join(patterns)}, expected the address of a run directory, such as "
                "s3://bucket/runs/digits"
            )
        yield Path(copy)
