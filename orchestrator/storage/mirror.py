"""The copy of a run directory in an object store, kept by the one process that works in the directory.

What locks and appends needs a disk: the run directory is on the head's, and is copied into the store as it grows. A head that is
lost costs what was not copied yet; the same command on another head fetches the copy and resumes. The files of a trial are not
copied here: its workers send them (see trial/exchange.py), each before the checkpoint that belongs to it.
"""

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import RLock

from pydantic import ValidationError

from orchestrator.config.base import Config
from orchestrator.errors import RunDirError, StorageError
from orchestrator.storage.addresses import AddressedFolder, Stamp, repeated
from orchestrator.storage.files import remove, write_atomic
from orchestrator.storage.paths import RunDirPaths, StoragePaths

logger = logging.getLogger(__name__)
SAVED_EVERY_S = 10.0
"""Seconds between two copies: what a head that is lost may cost, besides the epochs since the checkpoints."""
HELD_S = 180.0
"""How long a process without a sign of life is taken to be at work."""
SIGN_EVERY_S = 60.0
HOLDER = "mirror.json"
HOST = socket.gethostname()
JOURNALS = ("study.log", "results.parquet", "reports.jsonl")
"""Read in this order and written in the reverse one, so that a copy is like a run directory whose process was killed: a row is in
it once its reports are, and the study knows of it only then."""
NOT_COPIED = {
    "recorded.txt",  # true of the MLflow on this head alone
    "metrics.parquet", "log.txt", "weights.safetensors", "widths.csv", "architecture.json", "gates.safetensors",
}  # fmt: skip
"""In the run directory of a training these are what its worker sends."""


class Holder(Config):
    """Who works in a run, as the store has it."""

    host: str
    """The head's name."""
    time_s: float
    """The last sign of life."""
    is_open: bool
    """Whether the process has not ended, as far as it could say."""
    token: str = ""
    """A random name of the run directory on the head's disk; empty in what an earlier release wrote."""


class Mirror:
    """Keeps the copy of a run directory. is_taken: whether a process elsewhere is taken for gone, whatever the store says."""

    def __init__(self, storage: StoragePaths, run: RunDirPaths, *, is_taken: bool) -> None:
        self._run = run
        self._address = storage.place(run.root)
        self._is_taken = is_taken
        self._sent: dict[str, Stamp | None] = {}
        self._signed_s = 0.0
        self._lock = RLock()
        self._is_over = False
        """Whether another head has taken over."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Fetch the run directory if the copy is newer, and keep the copy while the body runs; the caller holds the directory's lock.

        Raises: RunDirError if the store cannot be used, or a process on another host or in another folder works in this run.
        """
        self._open()
        try:
            with repeated(self._save_or_stop, SAVED_EVERY_S, "mirror"):
                yield
        finally:
            self._store.waited_for(self._end)

    def save(self) -> None:
        """Copy what has changed; waits while the store is away. Raises: StorageError; RunDirError if another head has taken over."""
        self._store.waited_for(self._save)

    def clear(self) -> None:
        """Remove all that the store has of this run."""
        self._store.waited_for(self._store.remove_below)
        self._sent.clear()
        self._sign(is_open=True)

    def _open(self) -> None:
        try:
            self._store = AddressedFolder(self._address)
            holder = self._holder()
            if holder is not None:
                self._refuse(holder)
                if not self._is_here(holder) or not self._run.config.is_file():
                    self._fetch()
            self._sign(is_open=True)
            self._send_missing()
        except (StorageError, RunDirError) as error:
            self._remove_if_empty()
            raise RunDirError(str(error)) from error

    def _remove_if_empty(self) -> None:
        """Remove a run directory that holds nothing but the lock, and the folders above it that are empty then."""
        if [path.name for path in self._run.root.iterdir()] == [self._run.lock.name]:
            self._run.lock.unlink()
            os.removedirs(self._run.root)

    def _refuse(self, holder: Holder) -> None:
        age_s = time.time() - holder.time_s
        if holder.is_open and not self._is_here(holder) and age_s < HELD_S and not self._is_taken:
            raise RunDirError(
                f"{self._store.place()} is in use by {_process(holder)}, {age_s:.0f} s ago; wait for it, give --take-over if it is "
                f"gone, or start again in {HELD_S - age_s:.0f} s"
            )

    def _is_here(self, holder: Holder) -> bool:
        """Return whether the holder has worked in this very folder: then it was killed, as this process has the lock."""
        return holder.host == HOST and holder.token in ("", self._token())

    def _token(self) -> str:
        """Return the token of the run directory, which its lock file keeps."""
        if not (token := self._run.lock.read_text()):
            token = secrets.token_hex(8)
            self._run.lock.write_text(token)
        return token

    def _holder(self) -> Holder | None:
        if HOLDER not in self._store.names():
            return None
        try:
            return Holder.model_validate_json(self._store.read(HOLDER))
        except ValidationError as error:
            raise RunDirError(
                f"{self._store.place(HOLDER)} is damaged; delete it if no other machine works in this run"
            ) from error

    def _sign(self, *, is_open: bool) -> None:
        holder = Holder(host=HOST, time_s=time.time(), is_open=is_open, token=self._token())
        self._store.write(HOLDER, holder.model_dump_json().encode())
        self._signed_s = time.monotonic()

    def _fetch(self) -> None:
        """Replace the run directory by the copy; the file that identifies it comes last, so that what is cut short is fetched again."""
        logger.info("fetching %s into %s", self._store.place(), self._run.root)
        for path in self._run.root.iterdir():
            if not path.name.startswith("."):
                remove(path)
        last = self._run.config.name
        for name in sorted(self._store.stamps(), key=lambda name: name == last):
            if name != HOLDER and not name.startswith(("ray/", ".")):
                write_atomic(self._run.root / name, self._store.read(name))

    def _send_missing(self) -> None:
        """Send what the store lacks, of trials too, as after it was emptied; and note what it has."""
        present = self._store.stamps()
        self._sent = {name: None for name in present if "/" not in name and name not in NOT_COPIED | {HOLDER}}
        for path in sorted(self._run.root.rglob("*")):
            name = path.relative_to(self._run.root).as_posix()
            is_ours = not name.startswith("ray/") and not path.name.startswith(".")
            if is_ours and "/" in name and path.is_file() and name not in present:
                self._store.write(name, path.read_bytes())

    def _save(self) -> None:
        with self._lock:
            holder = self._holder()
            if holder is not None and not self._is_here(holder):
                raise RunDirError(f"{self._store.place()} was taken over by {_process(holder)}; follow that one")
            contents = [(name, *self._content(name)) for name in self._names()]
            for name, stamp, content in reversed(contents):
                if self._sent.get(name) != stamp:
                    self._store.write(name, content)
                    self._sent[name] = stamp
            for name in self._sent.keys() - {name for name, *_ in contents}:
                self._store.remove_file(name)
                del self._sent[name]
            if time.monotonic() - self._signed_s > SIGN_EVERY_S:
                self._sign(is_open=True)

    def _names(self) -> list[str]:
        """Return the files to copy in the order in which they are read."""
        found = {path.name for path in self._run.root.iterdir() if path.is_file() and not path.name.startswith(".")}
        journals = [name for name in JOURNALS if name in found]
        return [*journals, *sorted(found - {*journals} - NOT_COPIED)]

    def _content(self, name: str) -> tuple[Stamp, bytes]:
        """Return a file's stamp and, if that has changed, its content."""
        path = self._run.root / name
        stat = path.stat()
        stamp = (stat.st_size, stat.st_mtime_ns)
        return stamp, b"" if self._sent.get(name) == stamp else path.read_bytes()

    def _end(self) -> None:
        with suppress(RunDirError):  # another head has taken over: its copy stays
            self._save()
            self._sign(is_open=False)

    def _save_or_stop(self) -> None:
        """Save; stop this process, as SIGTERM does, if another head has taken over."""
        if self._is_over:
            return
        try:
            self._save()
        except RunDirError as error:
            logger.error("%s", error)
            self._is_over = True
            os.kill(os.getpid(), signal.SIGTERM)


def _process(holder: Holder) -> str:
    """Return where a process works that does not work in this folder."""
    folder = ", in another folder of this machine or in one that was deleted" if holder.host == HOST else ""
    return f"a process on {holder.host}{folder}"
