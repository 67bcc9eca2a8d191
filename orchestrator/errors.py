"""What can go wrong in the orchestrator, as one tree.

OrchestratorError        exit 1: the job failed
├── TrialError           one trial failed; the search goes on with the others
│   ├── DamagedCheckpointError  a checkpoint that is not whole; the trial trains from its start
│   └── OutOfMemoryError  a worker's device or node has too little memory for the trial's batches
├── MeasurerError        what measures latency failed or was lost; the same command goes on
├── StorageError         the storage is full, or has been away for too long; the same command goes on
└── UserError            exit 2: the user's mistake, told in one message without a traceback
    ├── ConfigError      a search space, a cluster file, --set, a model or a data set name
    ├── DataError        the data is absent or cannot be read
    ├── RunDirError      the run directory belongs to another search, or is in use
    ├── ClusterError     Ray cannot be reached, or lacks the resources for one trial
    ├── TrackingError    the MLflow store cannot be opened
    └── LatencyTableError  a latency table is absent, damaged, or for other hardware or settings

UnjudgedReportWarning    a report that lacks an objective; the trial goes on
"""

import difflib
from collections.abc import Sequence

from orchestrator.masking import masked, printable


class OrchestratorError(Exception):
    """Base of every error that the orchestrator raises on purpose; `exit_code` is what the process ends with.

    As text it is without secrets: what a library said is often passed on in it, with the URI it was given. And without what
    would steer a terminal: names are shown that stand in files.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(masked(super().__str__()))


class TrialError(OrchestratorError):
    """One trial failed; the search goes on with the others."""


class DamagedCheckpointError(TrialError):
    """A checkpoint that is cut short or changed; the trial trains from its start."""


class OutOfMemoryError(TrialError):
    """A worker's device or node has too little memory; what is saved is kept. Others may have held it: it is tried again."""


class MeasurerError(OrchestratorError):
    """What measures or exports networks failed, or its process was lost; what was measured is kept, and the same command goes on."""


class StorageError(OrchestratorError):
    """The storage is full, or has been away for too long; what is done is kept, and the same command goes on."""


class UserError(OrchestratorError):
    """The user's mistake: the message says what was found, what was expected, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A search space, a cluster file, an override, a model or a data set that does not fit its schema."""


class DataError(UserError):
    """The data of a known data set is absent or cannot be read."""


class RunDirError(UserError):
    """The run directory belongs to another search, another process works in it, or something in it is damaged or a link."""


class ClusterError(UserError):
    """Ray cannot be reached, or the cluster lacks the resources for one trial."""


class TrackingError(UserError):
    """The MLflow store cannot be opened. One that fails later holds nobody up."""


class UnjudgedReportWarning(UserWarning):
    """A trial's report lacks an objective, or one is NaN: the scheduler does not judge the trial by it."""


class LatencyTableError(UserError):
    """A latency table that is absent, damaged, or holds for other hardware or settings than asked."""


def in_one_line(error: BaseException) -> str:
    """Return an error as a part of another one's message.

    >>> in_one_line(ValueError("no\\nand so on"))
    'ValueError: no'
    """
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


def did_you_mean(found: str, names: Sequence[str]) -> str:
    """Return what follows "X is unknown" in a message: the nearest names, and all if they are few or none is near.

    >>> did_you_mean("tpo1", ("top1", "macs"))
    '; did you mean top1? (valid: top1, macs)'
    """
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.9) or difflib.get_close_matches(found, names)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return hint + (f" (valid: {', '.join(names)})" if len(names) <= 40 or not near else "")
