"""Files of a run: written atomically, locked, waited for while their storage is away, read with clear errors."""

import errno
import fcntl
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
"""Prefix of files that are being written, by which the leftovers of a process that died are recognised."""
LEFTOVER_AGE_S = 3600.0
"""No write takes longer than this."""
_LEFTOVER = re.compile(r"\.tmp\..+\.[0-9a-f]{8,16}")
"""Temporary names: those of write_atomic, and of the check that all nodes share a folder."""
STORAGE_TIMEOUT_S, POLL_S = 600.0, 0.5
"""How long to wait for an unreachable storage, and how often to check for it."""


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
    """Flush a rename to disk; some network file systems do it themselves and refuse the call."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def open_lock(path: Path, mode: int = 0o666) -> IO[str]:
    """Open a lock file, created if it is missing. Child processes, which may outlive this one, do not inherit it.

    Raises: RunDirError if it is a link, since opening it would create or touch its target.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise RunDirError(f"{path} is a link, expected a lock file; remove it") from error
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def lock(file: int | IO[str], path: Path, *, waits: bool) -> None:
    """Take the lock of an open file, which the system releases when the process dies.

    Raises: BlockingIOError if another process holds it, unless this one waits; RunDirError on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise RunDirError(
            f"{path} is on a file system without locks (flock: {error.strerror}), expected one on which a single process can hold "
            "a folder; mount it with `-o flock` where it is Lustre, or choose a folder elsewhere"
        ) from error


def num_bytes(path: Path) -> int:
    """Return the size of a file; -1 if there is none, or if its storage is away."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def wait_until_reachable(marker: Path) -> None:
    """Wait until a file that was written before is reachable; its storage may be away for a while.

    Otherwise a write would create the folders again, on the local disk below the mount point.
    Raises: StorageError after STORAGE_TIMEOUT_S.
    """
    wait_until(lambda: os.path.isfile(marker), str(marker))  # Path.is_file raises if the mount is away


def wait_until(is_there: Callable[[], bool], place: str) -> None:
    """Wait until something that was there before is there again. Raises: StorageError after STORAGE_TIMEOUT_S."""
    deadline = time.monotonic() + STORAGE_TIMEOUT_S
    is_told = False
    while not is_there():
        if not is_told:
            logging.getLogger(__name__).warning("%s is not reachable; waiting for its storage", place)
            is_told = True
        if time.monotonic() > deadline:
            raise StorageError(
                f"{place} was not reachable for {STORAGE_TIMEOUT_S:g} s; mount its storage again, then rerun the same command to resume"
            )
        time.sleep(POLL_S)


def remove_leftovers(root: Path) -> None:
    """Remove unfinished files of processes that died; the caller must hold the lock of this folder."""
    for folder in (root, *root.glob("trials/*"), *root.glob("trials/*/cut")):
        for path in folder.glob(f"{LEFTOVER_PREFIX}*") if not folder.is_symlink() else ():
            remove(path)


def remove_old_leftovers(folder: Path) -> None:
    """Remove unfinished files that are more than an hour old from a folder without a lock, in which other processes may write.

    Only files named like those of write_atomic: the folder may be somebody's home.
    """
    latest = time.time() - LEFTOVER_AGE_S
    for path in folder.glob(f"{LEFTOVER_PREFIX}*"):
        if _LEFTOVER.fullmatch(path.name) and path.is_file() and _changed_at(path) <= latest:
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link but not its target; do nothing if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _changed_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # its owner has just renamed it
        return math.inf


def cut_torn_line(path: Path) -> None:
    """Cut off an incomplete last line: the next line that is appended would be lost with it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logging.getLogger(__name__).warning("%s ends with an incomplete line, which is removed", path)
        os.truncate(path, whole)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises: ValueError if it is not valid JSON, or is nested deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(path: Path, error: type[OrchestratorError], advice: str) -> str:
    """Return the text of a file. Raises: `error`, with the advice, if it is missing, unreadable, not UTF-8, or not a plain file."""
    try:
        if not path.is_file():  # reading a pipe would block
            raise ValueError("no such file")
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
