"""Who may work in a run directory: one search or training, one process at a time."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from orchestrator.config.base import differences
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import ConfigError, RunDirError
from orchestrator.storage.files import open_lock, remove, remove_leftovers, write_atomic
from orchestrator.storage.paths import RunDirPaths, TrialPaths

NUM_DIFFERENCES_SHOWN = 3
BEFORE_THE_FIRST_EPOCH = (
    "config.json",
    "search.json",
    "log.txt",
    "ray",
    "trials",
    "study.log",
    "search_id",
    "latency_curve.json",
)
"""What a start writes before it has earned anything: in Ray's folder only while there is no checkpoint, in trials no epoch."""
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOENT)
"""What the system says of a path that can be no folder, or leads through something that is none."""


def check_run_dir(run: RunDirPaths, config: SearchConfig | TrialConfig, *, must_exist: bool = False) -> None:
    """Raise RunDirError unless the search, or training, of this config may write to the run directory: a new one, or its own. Only reads.

    One in which nothing was earned is new, whatever its config: what started there was refused, or killed, before its first epoch.
    must_exist: also refuse one that holds no search yet.
    """
    if not run.config.is_file():
        _check_is_free(run)
        if must_exist:
            raise RunDirError(f"{run.root} holds no {run.NOUN} that could be resumed; leave --resume out to start one")
        return
    run.refuse_links()
    if (found := _differences(run, config)) and _has_earned(run):
        more = f"; and {len(found) - NUM_DIFFERENCES_SHOWN} more" if len(found) > NUM_DIFFERENCES_SHOWN else ""
        raise RunDirError(
            f"{run.root} belongs to a {run.NOUN} of another config ({'; '.join(found[:NUM_DIFFERENCES_SHOWN])}{more}); repeat "
            "the command that started it to go on with it, or start this one under another name: --set name=..."
        )


@contextmanager
def claim(run: RunDirPaths, config: SearchConfig | TrialConfig) -> Iterator[None]:
    """Hold the run directory's lock, the config saved in it before anything else.

    The kernel lets go of the lock when the process dies, however it does.
    Raises: RunDirError if another process holds it, the directory belongs to another config, or cannot be one.
    """
    check_run_dir(run, config)
    with _opened(run) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirError(
                f"another process works in {run.root}; wait for it, or start this {run.NOUN} under another name: "
                "--set name=..."
            ) from error
        check_run_dir(run, config)  # again: another process may have been here until just now
        remove_leftovers(run.root)
        if not run.config.is_file() or _differences(run, config):
            for name in _holds(
                run
            ):  # of a start that has earned nothing; the config last, by which the folder is known
                if name != run.config.name:
                    remove(run.root / name)
            write_atomic(run.config, config.to_json())
        yield


def _opened(run: RunDirPaths) -> IO[str]:
    """Return the file of the lock, the directory made."""
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        return open_lock(run.lock)
    except OSError as error:
        if error.errno not in _NO_FOLDER:  # a disk that is full or away: the same command goes on
            raise
        raise RunDirError(
            f"{run.root} cannot be a run directory ({error}); give --run-dir another folder, or move what is in the way"
        ) from error


def _check_is_free(run: RunDirPaths) -> None:
    if run.root.exists() and not run.root.is_dir():
        raise RunDirError(f"{run.root} is a file; a run directory is expected there: move it, or give --set name=...")
    if foreign := _holds(run):
        raise RunDirError(
            f"{run.root} is not empty and no run directory (it holds {', '.join(foreign[:3])}, but no {run.config.name}); "
            f"give --run-dir another folder, or the {run.NOUN} another name: --set name=..."
        )


def _differences(run: RunDirPaths, config: SearchConfig | TrialConfig) -> list[str]:
    """Return what the config that the run directory holds has otherwise. Raises: RunDirError if it cannot be read."""
    try:
        return differences(type(config).model_validate_json(run.config.read_bytes()), config)
    except ValidationError as error:
        raise RunDirError(
            f"{run.config} was written by another release, or is damaged ({error.errors()[0]['msg']}); go on with that "
            "release, or start under another name: --set name=..."
        ) from error


def _has_earned(run: RunDirPaths) -> bool:
    """Return whether the run directory holds anything that training has made, or that is none of ours."""
    if not set(_holds(run)) <= set(BEFORE_THE_FIRST_EPOCH):
        return True
    earned = (run.ray.rglob("checkpoint_*/"), run.root.glob("trials/*/metrics.parquet"))
    return any(True for paths in earned for _ in paths)


def _holds(run: RunDirPaths) -> list[str]:
    """Return what lies in the run directory, without what a crash leaves: a lock or a torn write."""
    found = sorted(path.name for path in run.root.iterdir()) if run.root.is_dir() else []
    return [name for name in found if not name.startswith(".")]


def check(folder: str) -> None:
    """Raise ConfigError unless the folder is that of a finished trial that had gates, or of its cut."""
    paths = TrialPaths(Path(folder))
    try:
        paths.refuse_links()
    except RunDirError as error:
        raise ConfigError(f"gating.start_from: {error}") from error
    for file, what in ((paths.weights, "network"), (paths.architecture, "architecture"), (paths.gates, "gates")):
        if not file.is_file():
            raise ConfigError(
                f"gating.start_from: {folder} has no {file.name}, so no {what} to go on from; expected the folder of a finished "
                "trial with gates, such as runs/digits/trials/trial_0003"
            )
