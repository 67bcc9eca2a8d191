"""The exceptions of the orchestrator, as one tree, and helpers for their messages.

OrchestratorError        exit 1: the job failed
├── TrialError           one trial failed; the search continues with the others
│   ├── DamagedCheckpointError  an incomplete or changed checkpoint; the trial trains from its start
│   └── OutOfMemoryError  a worker's device or node has too little memory for the trial's batches
├── MeasurerError        the measurement process failed or crashed; rerun the same command to resume
├── StorageError         the storage is full, or was away for too long; rerun the same command to resume
└── UserError            exit 2: invalid input, reported as one error without a traceback
    ├── ConfigError      an invalid search space, cluster file, --set, model or data set name
    ├── DataError        the data is missing or cannot be read
    ├── RunDirError      the run directory belongs to another search, or is in use
    ├── ClusterError     Ray cannot be reached, or lacks the resources for one trial
    ├── TrackingError    the MLflow store cannot be opened
    └── LatencyTableError  a latency table is missing, damaged, or for other hardware or settings

UnjudgedReportWarning    a report lacks an objective; the trial continues
"""

import difflib
from collections.abc import Sequence

from orchestrator.masking import masked, printable


class OrchestratorError(Exception):
    """Base of every error that the orchestrator raises on purpose; `exit_code` is the exit code of the process.

    Its text contains no secrets, which a library's message may hold in a URI, and no control characters, which names from
    files may hold.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(masked(super().__str__()))


class TrialError(OrchestratorError):
    """One trial failed; the search continues with the others."""


class DamagedCheckpointError(TrialError):
    """A checkpoint is incomplete or was changed; the trial trains from its start."""


class OutOfMemoryError(TrialError):
    """A worker's device or node has too little memory; finished work is kept, and the trial is retried: others may have used the memory."""


class MeasurerError(OrchestratorError):
    """The process that measures or exports networks failed or crashed; rerunning the same command resumes from finished results."""


class StorageError(OrchestratorError):
    """The storage is full, or was away for too long; finished work is kept. Rerun the same command to resume."""


class UserError(OrchestratorError):
    """Invalid input: the message says what was found, what was expected, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A search space, a cluster file, an override, a model or a data set name is invalid."""


class DataError(UserError):
    """The data of a known data set is missing or cannot be read."""


class RunDirError(UserError):
    """The run directory belongs to another search, is in use by another process, or holds a damaged file or a link."""


class ClusterError(UserError):
    """Ray cannot be reached, or the cluster lacks the resources for one trial."""


class TrackingError(UserError):
    """The MLflow store cannot be opened. A store that fails later does not stop a search."""


class UnjudgedReportWarning(UserWarning):
    """A trial's report lacks an objective, or one is NaN: the scheduler does not judge the trial by it."""


class LatencyTableError(UserError):
    """A latency table is missing, damaged, or was measured on other hardware or with other settings."""


def in_one_line(error: BaseException) -> str:
    """Return an error as one line, for the message of another error.

    >>> in_one_line(ValueError("no\\nand so on"))
    'ValueError: no'
    """
    name, first = type(error).__name__, first_line(error)
    return name if first == name else f"{name}: {first}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without secrets; the name of its type if it says nothing."""
    return masked((str(error).strip() or type(error).__name__).splitlines()[0])


def did_you_mean(found: str, names: Sequence[str]) -> str:
    """Return the hint after "X is unknown" in a message: similar names, and all names if they are few or none is similar.

    >>> did_you_mean("tpo1", ("top1", "macs"))
    '; did you mean top1? (valid: top1, macs)'
    """
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.9) or difflib.get_close_matches(found, names)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return hint + (f" (valid: {', '.join(names)})" if len(names) <= 40 or not near else "")
