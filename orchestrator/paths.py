"""Every file name of a run, in one place.

<storage>/                      StoragePaths
    mlflow.db  mlartifacts/     the embedded MLflow, one for all searches
    base/<hash>/                base networks, shared by all trials and searches that agree on their config
    <name>/                     RunPaths, one search
        trials/<trial_id>/      TrialPaths, one trial
    <name>-train/               TrainPaths, one training without a search
"""

import errno
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from orchestrator.errors import RunDirError, StorageError

LEFTOVER_PREFIX = ".tmp."
"""Names of files that are being written begin so; what a process that died left behind is known by it."""
LEFTOVER_AGE_S = 3600.0
"""Nothing is written for so long."""
_LEFTOVER = re.compile(r"\.tmp\..+\.[0-9a-f]{8,16}")
"""The names that write_atomic gives, and a check of the nodes."""
STORAGE_TIMEOUT_S, POLL_S = 600.0, 0.5
"""How long a storage that is away is waited for, and how often is looked."""
_TRIAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Folder:
    """A folder in which everything is ours."""

    root: Path

    def refuse_links(self) -> None:
        """Raise RunDirError if something in it is a link: reading or writing it would reach out of the folder."""
        links = sorted(path.name for path in self.root.iterdir() if path.is_symlink()) if self.root.is_dir() else []
        if links:
            raise RunDirError(
                f"{self.root}: {', '.join(links)} is a link, expected a file; put what it leads to in its place"
            )


@dataclass(frozen=True)
class TrialPaths(Folder):
    """The files of one trial."""

    @property
    def config(self) -> Path:
        """The full TrialConfig; this file alone repeats the trial."""
        return self.root / "config.json"

    @property
    def architecture(self) -> Path:
        """Which channels are kept."""
        return self.root / "architecture.json"

    @property
    def widths(self) -> Path:
        """The widths of every channel group before and after, as a table."""
        return self.root / "widths.csv"

    @property
    def weights(self) -> Path:
        """The pruned and fine-tuned network."""
        return self.root / "weights.safetensors"

    @property
    def gates(self) -> Path:
        """The gates' logits at the end of the gating stage, for a stage that goes on from here."""
        return self.root / "gates.safetensors"

    @property
    def cut(self) -> "TrialPaths":
        """The network as cut, before it was fine-tuned, and its gates; where pruning.keep_cut asks for them."""
        return TrialPaths(self.root / "cut")

    @property
    def metrics(self) -> Path:
        """One row per epoch."""
        return self.root / "metrics.parquet"

    @property
    def log(self) -> Path:
        """What rank 0 logged."""
        return self.root / "log.txt"

    @property
    def stop(self) -> Path:
        """Asks the workers, by being there, to save the trial and end."""
        return self.root / ".stop"

    def exported(self, form: str) -> Path:
        """The pruned network without its class, written by `orchestrator export`; form: onnx or pt2."""
        return self.root / f"network.{form}"


@dataclass(frozen=True)
class RunDirPaths(Folder):
    """What the run directories of a search and of a training have in common."""

    NOUN: ClassVar[str]
    """What lies in it, in a message."""
    CONFIG: ClassVar[str]
    """The file by which a run directory is known."""

    @property
    def config(self) -> Path:
        """The full config, saved before anything starts."""
        return self.root / self.CONFIG

    @property
    def ray(self) -> Path:
        """Ray's own state: Train's checkpoints, and Tune's files if it is a search."""
        return self.root / "ray"

    @property
    def lock(self) -> Path:
        """Held by the process that works in this run directory."""
        return self.root / ".lock"


@dataclass(frozen=True)
class TrainPaths(RunDirPaths, TrialPaths):
    """The files of one training without a search: a trial's, in a run directory of its own."""

    NOUN: ClassVar[str] = "training"
    CONFIG: ClassVar[str] = "config.json"
    SUFFIX: ClassVar[str] = "-train"
    """Behind the space's name, which is a search's run directory."""

    @property
    def result(self) -> Path:
        """The final metrics; written when all is trained and measured."""
        return self.root / "result.json"


@dataclass(frozen=True)
class RunPaths(RunDirPaths):
    """The files of one search."""

    NOUN: ClassVar[str] = "search"
    CONFIG: ClassVar[str] = "search.json"

    @property
    def study(self) -> Path:
        """Optuna's journal."""
        return self.root / "study.log"

    @property
    def decisions(self) -> Path:
        """What the scheduler was told, one line of JSON per report."""
        return self.root / "decisions.jsonl"

    @property
    def results(self) -> Path:
        """One row per trial."""
        return self.root / "results.parquet"

    @property
    def pareto(self) -> Path:
        """The front as JSON."""
        return self.root / "pareto.json"

    @property
    def report(self) -> Path:
        """What a person opens."""
        return self.root / "report.html"

    @property
    def front_png(self) -> Path:
        """The front as a picture."""
        return self.root / "front.png"

    @property
    def latency_curve(self) -> Path:
        """What trials on CPUs estimate latencies from, taken before the first of them."""
        return self.root / "latency_curve.json"

    @property
    def search_id(self) -> Path:
        """The id that ties this directory to its runs in MLflow."""
        return self.root / "search_id"

    @property
    def recorded(self) -> Path:
        """Written when MLflow has all of a search that has ended; how to open it there."""
        return self.root / "recorded.txt"

    @property
    def trials(self) -> Path:
        """One folder per trial."""
        return self.root / "trials"

    def trial(self, trial_id: str) -> TrialPaths:
        """Return the paths of one trial; nothing is created.

        Raises: RunDirError for an id that leads out of the run directory, or a folder that is a link to elsewhere: ids
        come from results.parquet too, which somebody else may have written.
        """
        if not _TRIAL_ID.fullmatch(trial_id):
            raise RunDirError(
                f"{trial_id[:60]!r} is no trial of {self.root}, expected letters, digits, dashes and underscores"
            )
        paths = TrialPaths(self.trials / trial_id)
        for folder in (self.trials, paths.root):
            if folder.is_symlink():
                raise RunDirError(f"{folder} is a link, expected a folder; put what it leads to in its place")
        return paths

    def trial_ids(self) -> list[str]:
        """Return the ids of the trials that have a folder, sorted."""
        if not self.trials.is_dir():
            return []
        return sorted(folder.name for folder in self.trials.iterdir() if folder.is_dir() and not folder.is_symlink())


@dataclass(frozen=True)
class BasePaths(Folder):
    """The files of one base network: trained once, shared by the trials that start from it."""

    @property
    def weights(self) -> Path:
        """The state dict of the unpruned network."""
        return self.root / "weights.safetensors"

    @property
    def ray(self) -> Path:
        """The checkpoints of its training."""
        return self.root / "ray"

    @property
    def stop(self) -> Path:
        """As a trial's; for who holds the lock, as others wait for the same network."""
        return TrialPaths(self.root).stop


@dataclass(frozen=True)
class StoragePaths:
    """What lies in the storage beside the run directories."""

    root: Path

    @property
    def mlflow_db(self) -> Path:
        """The SQLite store of the embedded MLflow."""
        return self.root / "mlflow.db"

    @property
    def mlartifacts(self) -> Path:
        """The artifact root of the embedded MLflow."""
        return self.root / "mlartifacts"

    def base(self, base_hash: str) -> BasePaths:
        """Return the paths of the base network with this TrialConfig.base_hash()."""
        return BasePaths(self.root / "base" / base_hash)

    def run(self, name: str) -> RunPaths:
        """Return the paths of the search with this name."""
        return RunPaths(self.root / name)


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
