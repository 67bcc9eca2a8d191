"""Access to a run directory: it belongs to one search or training, and one process at a time may work in it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TypeVar

from pydantic import ValidationError

from orchestrator.config.base import SavedConfig
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import ConfigError, RunDirError
from orchestrator.storage.files import lock, open_lock, remove, remove_leftovers, write_atomic
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import (
    BEFORE_THE_FIRST_EPOCH,
    CHECKPOINTS,
    RunDirPaths,
    RunPaths,
    TrialPaths,
    make_trial_id,
    trial_number,
)
from orchestrator.storage.records import read_results

SavedType = TypeVar("SavedType", bound=SavedConfig)
NUM_DIFFERENCES_SHOWN = 3
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOENT)
"""Errors for a path that cannot be a folder, or leads through something other than a folder."""


def read_config(cls: type[SavedType], path: Path) -> SavedType:
    """Return the config that a file of a run directory holds. Raises: RunDirError if it is damaged or of another release."""
    try:
        return cls.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunDirError(
            f"{path} was written by another release, or is damaged ({error.errors()[0]['msg']}); resume with that "
            "release, or start under another name: --set name=..."
        ) from error


def read_trial_config(paths: TrialPaths) -> TrialConfig:
    """Return the config of a trial, as read_config does."""
    return read_config(TrialConfig, paths.config)


def check_run_dir(run: RunDirPaths, config: SearchConfig | TrialConfig, *, must_exist: bool = False) -> None:
    """Raise RunDirError unless the run directory is new or belongs to this config. It only reads.

    A directory without results is new, whatever its config: the run was refused, or killed, before its first epoch ended.
    A search may have got other limits and more trials, baselines and references since (SearchConfig.refused_changes).
    must_exist: also refuse a directory that holds no run yet.
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
            f"{run.root} belongs to a {run.NOUN} with another config ({'; '.join(found[:NUM_DIFFERENCES_SHOWN])}{more}); rerun "
            "the command that started it to resume it, or start this one under another name: --set name=..."
        )
    if isinstance(run, RunPaths) and isinstance(config, SearchConfig) and not found:
        _check_started(run, config.search.num_trials)


def _check_started(run: RunPaths, num_trials: int) -> None:
    """Raise RunDirError if a trial beyond this number of trials has started."""
    ids = {*run.trial_ids(), *(row["trial_id"] for row in read_results(run.results))}
    num_started = 1 + max((trial_number(name) for name in ids if re.fullmatch(r"trial_\d+", name)), default=-1)
    if num_trials < num_started:
        raise RunDirError(
            f"search.num_trials is {num_trials}, but {make_trial_id(num_started - 1)} in {run.root} has started; expected at "
            f"least {num_started}, or another name: --set name=..."
        )


@contextmanager
def claim(
    run: RunDirPaths, config: SearchConfig | TrialConfig, mirror: Mirror | None = None, *, must_exist: bool = False
) -> Iterator[None]:
    """Hold the lock of the run directory, and save the config in it before anything else.

    The kernel releases the lock when the process dies, however it does.
    mirror: keeps a copy in an object store, which is fetched first if it is newer.    must_exist: as in check_run_dir.
    Raises: RunDirError if another process holds it, the directory belongs to another config, or the path cannot be a directory.
    """
    if mirror is None:
        check_run_dir(run, config, must_exist=must_exist)
    with _opened(run) as file:
        try:
            lock(file, run.lock, waits=False)
        except BlockingIOError as error:
            raise RunDirError(
                f"another process is using {run.root}; wait for it, or start this {run.NOUN} under another name: "
                "--set name=..."
            ) from error
        with nullcontext() if mirror is None else mirror.kept():
            # again: another process may have been here until just now
            check_run_dir(run, config, must_exist=must_exist)
            _prepare(run, config, mirror)
            yield


def _prepare(run: RunDirPaths, config: SearchConfig | TrialConfig, mirror: Mirror | None) -> None:
    """Remove what an earlier process left unfinished, and all of a run without results and with another config; save the config."""
    remove_leftovers(run.root)
    run.requests.unlink(missing_ok=True)  # to an earlier process
    is_new = not run.config.is_file() or bool(_differences(run, config))
    if is_new:
        for name in _holds(run):  # the config, which identifies the folder, is replaced last
            if name != run.config.name:
                remove(run.root / name)
        if mirror is not None:
            mirror.clear()
    if is_new or read_config(type(config), run.config) != config:
        run.recorded.unlink(missing_ok=True)  # first: MLflow lacks what is changed here
        write_atomic(run.config, config.to_json())


def is_claimed(run: RunDirPaths) -> bool:
    """Return whether a process works in the run directory."""
    if not run.lock.is_file():
        return False
    with open_lock(run.lock) as file:
        try:
            lock(file, run.lock, waits=False)
        except BlockingIOError:
            return True
    return False


def _opened(run: RunDirPaths) -> IO[str]:
    """Open the lock file, after creating the directory."""
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        return open_lock(run.lock)
    except OSError as error:
        if error.errno not in _NO_FOLDER:  # a disk that is full or away: rerunning the command resumes
            raise
        raise RunDirError(
            f"{run.root} cannot be a run directory ({error}); give --run-dir another folder, or move what is in the way"
        ) from error


def _check_is_free(run: RunDirPaths) -> None:
    if run.root.exists() and not run.root.is_dir():
        raise RunDirError(f"{run.root} is a file, expected a run directory; move it, or give --set name=...")
    if foreign := _holds(run):
        raise RunDirError(
            f"{run.root} is not empty and not a run directory (it holds {', '.join(foreign[:3])}, but no {run.config.name}); "
            f"give --run-dir another folder, or the {run.NOUN} another name: --set name=..."
        )


def _differences(run: RunDirPaths, config: SearchConfig | TrialConfig) -> list[str]:
    """Return how the config in the run directory differs from this one, where it may not. Raises: RunDirError if it cannot be read."""
    saved: SavedConfig = read_config(type(config), run.config)
    return saved.refused_changes(config)


def _has_earned(run: RunDirPaths) -> bool:
    """Return whether the run directory holds results of training, or files that this project did not write."""
    if not BEFORE_THE_FIRST_EPOCH.issuperset(_holds(run)):
        return True
    earned = (run.ray.rglob(f"{CHECKPOINTS}/"), run.root.glob("trials/*/metrics.parquet"))
    return any(True for paths in earned for _ in paths)


def _holds(run: RunDirPaths) -> list[str]:
    """Return the names in the run directory, except hidden ones: the lock, and unfinished files of a crash."""
    found = sorted(path.name for path in run.root.iterdir()) if run.root.is_dir() else []
    return [name for name in found if not name.startswith(".")]


def check(folder: str) -> None:
    """Raise ConfigError unless the folder holds a finished trial that had gates, or its pruned network."""
    paths = TrialPaths(Path(folder))
    try:
        paths.refuse_links()
    except RunDirError as error:
        raise ConfigError(f"gating.start_from: {error}") from error
    for file, what in ((paths.weights, "network"), (paths.architecture, "architecture"), (paths.gates, "gates")):
        if not file.is_file():
            raise ConfigError(
                f"gating.start_from: {folder} has no {file.name}, so no {what} to start from; expected the folder of a finished "
                "trial with gates, such as runs/digits/trials/trial_0003"
            )
