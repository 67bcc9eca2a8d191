"""write whole or not at all, locks, waiting, reading back"""

import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import OrchestratorError, RunDirError, StorageError

LEFTOVER_PREFIX = ".tmp."
"""Names of files that are being written begin so; what a process that died left behind is known by it."""
LEFTOVER_AGE_S = 3600.0
"""Nothing is written for so long."""
_LEFTOVER = re.compile(r"\.tmp\..+\.[0-9a-f]{8,16}")
"""The names that write_atomic gives, and a check of the nodes."""
STORAGE_TIMEOUT_S, POLL_S = 600.0, 0.5
"""How long a storage that is away is waited for, and how often is looked."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file so that a reader, also after a crash, sees the old content or the new, never a part.

    Creates the parent folders. gator.files does the same for the method's files; it is not used here because importing
    gator imports torch, and --help or a typo in a YAML file should not wait for that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{LEFTOVER_PREFIX}{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a rename to disk; some network file systems refuse it, and do so themselves."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def open_lock(path: Path, mode: int = 0o666) -> IO[str]:
    """Return a lock file, opened; makes it if it is not there. Child processes, which may outlive this one, do not inherit it.

    Raises: RunDirError if it is a link, which would make, or touch, what it leads to.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RunDirError(f"{path} is a link, expected a lock file; remove it") from error
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def wait_until_reachable(marker: Path) -> None:
    """Return when the file, one that was written before, is there; a storage may be away for a while.

    Without it a write would make the folders anew on whatever lies under the mount point.
    Raises: StorageError after STORAGE_TIMEOUT_S.
    """
    wait_until(lambda: os.path.isfile(marker), str(marker))  # Path.is_file raises what a mount that is away answers


def wait_until(is_there: Callable[[], bool], place: str) -> None:
    """Return when what lies at the place, and was there before, is there. Raises: StorageError after STORAGE_TIMEOUT_S."""
    deadline = time.monotonic() + STORAGE_TIMEOUT_S
    is_told = False
    while not is_there():
        if not is_told:
            logging.getLogger(__name__).warning("%s is not reachable; waits for its storage", place)
            is_told = True
        if time.monotonic() > deadline:
            raise StorageError(
                f"{place} was not reachable for {STORAGE_TIMEOUT_S:g} s; mount its storage again, and the same command goes on"
            )
        time.sleep(POLL_S)


def remove_leftovers(root: Path) -> None:
    """Remove what processes that died had begun to write; for who holds the lock of this folder."""
    for folder in (root, *root.glob("trials/*"), *root.glob("trials/*/cut")):
        for path in folder.glob(f"{LEFTOVER_PREFIX}*") if not folder.is_symlink() else ():
            remove(path)


def remove_old_leftovers(folder: Path) -> None:
    """Remove what processes that died had begun to write an hour ago and more, where no lock is held and others may write.

    Files with names that write_atomic gives alone: the folder may be somebody's home.
    """
    latest = time.time() - LEFTOVER_AGE_S
    for path in folder.glob(f"{LEFTOVER_PREFIX}*"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file() and _changed_at(path) <= latest:
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link but not what it leads to; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _changed_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # its owner has just put it in its place
        return math.inf


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that was not written to its end: who appends to it would lose the next line as well."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logging.getLogger(__name__).warning("%s ends in half a line, which is cut off", path)
        os.truncate(path, whole)


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says. Raises: ValueError if it is none, or is nested deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(path: Path, error: type[OrchestratorError], advice: str) -> str:
    """Return the text of a file. Raises: `error`, with the advice, if it is missing, unreadable, no UTF-8, or no plain file."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("there is no such file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {advice}") from problem


def read_json(path: Path, error: type[OrchestratorError], advice: str) -> dict[str, Any]:
    """Return the mapping in a JSON file. Raises: `error`, with the advice, if it cannot be read or holds anything else."""
    text = read_text(path, error, advice)
    try:
        content = parse_json(text)
    except ValueError as problem:
        raise error(f"{path} is damaged ({problem}); {advice}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} is damaged (found a {type(content).__name__}, expected a mapping); {advice}")
    return content
