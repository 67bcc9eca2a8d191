"""What a search tries next: one Optuna study per run directory, whatever the algorithm.

The study's journal (study.log) records which trials were suggested with which values; results.parquet records which have
ended. Together they are the whole state: a resumed search first hands out the suggested trials that have no result, under
their old ids and values, and then new ones. Nothing is pickled.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from orchestrator.config.domains import distribution
from orchestrator.config.metrics import FAILED, FINISHED, STOPPED, TRIAL
from orchestrator.config.search import SearchConfig
from orchestrator.errors import RunDirError
from orchestrator.storage.files import cut_torn_line, wait_until_reachable
from orchestrator.storage.paths import make_trial_id, trial_number
from orchestrator.storage.records import Row
from orchestrator.tuning.samplers import Params, draw, make_sampler, partly_fixed, suggest

STUDY_NAME = "search"
FIRST_NUM_TRIALS = "num_trials"
"""In the journal: the trials that the search was begun with."""
PARENT = "parent"
"""In the journal and in results.parquet: the trial that a trial starts from."""


class TrialSource(Searcher, ABC):
    """What Tune asks for every trial. Tune neither saves nor restores it: files of the run directory hold its state."""

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, Params] = {}
        """Trial id -> the values it was suggested with, of the trials handed out by this process."""
        self.parents: dict[str, str | None] = {}
        """Trial id -> the trial that it starts from, of the same trials."""
        self.num_at_once = sys.maxsize
        """Most trials at once; may change while they run."""
        self.is_draining = False
        """Whether no further trial is handed out."""
        self._live: set[str] = set()
        """Tune's ids of the trials that have not ended."""

    @property
    @abstractmethod
    def num_left(self) -> int:
        """Trials that can still be handed out."""

    @abstractmethod
    def next_trial(self) -> dict[str, Any] | None:
        """Return the next trial's config; None if there is none."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's config, FINISHED, or None for later. trial_id: Tune's own, which changes with the process."""
        if len(self._live) >= self.num_at_once and not self.is_draining:
            return None
        config = None if self.is_draining else self.next_trial()
        if config is None:
            return str(Searcher.FINISHED)
        self._live.add(trial_id)
        return config

    def tell(self, row: Row) -> None:
        """Take note of how a trial ended; unless a subclass learns from it, this does nothing."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Make room for another trial; Tune calls it before the trial's row is written, and tell() comes after that."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: see the class."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts into tuner.pkl, which this project never reads


class OptunaSearcher(TrialSource):
    """Suggests the values of the searched parameters.

    A value depends on the search's seed and the trial's number, for "tpe" and "nsga2" also on the results so far.
    """

    def __init__(
        self,
        config: SearchConfig,
        journal: Path,
        rows: Sequence[Row],
        make_request: Callable[[str, Params, str | None], dict[str, Any]],
        may_start: Callable[[], bool] = lambda: True,
        choose_parent: Callable[[str, Params], str | None] | None = None,
    ) -> None:
        """rows: results.parquet so far.    make_request: (trial_id, values, parent) -> the config that Tune gives the trial.
        may_start: whether another trial may start; the first no ends the suggestions.
        choose_parent: (trial_id, values) -> the trial that it starts from, if any; asked once for each trial, the journal keeps
        the answer. None where no trial starts from another.

        Raises: RunDirError if the journal lacks a trial that has a result.
        """
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config = config
        self._make_request = make_request
        self._may_start = may_start
        self._choose_parent = choose_parent
        self._distributions = {name: distribution(domain) for name, domain in config.params.items()}
        self._journal = journal
        self._study = _open_study(journal, config)
        # as begun: how TPE and NSGA-II learn follows from the number of trials
        self._search = config.search.model_copy(update={"num_trials": self._study.user_attrs[FIRST_NUM_TRIALS]})
        ended = {row["trial_id"]: row for row in rows if row["kind"] == TRIAL}
        trials = {make_trial_id(trial.number): trial for trial in self._study.get_trials(deepcopy=False)}
        if unknown := sorted(ended.keys() - trials.keys()):
            raise RunDirError(
                f"{journal} lacks {', '.join(unknown)}, which results.parquet has; restore it from a copy, or start a "
                "new run"
            )
        for row in ended.values():  # the process may have died between writing a row and telling it
            self.tell(row)
        num_trials = config.search.num_trials  # the journal may hold more, if the search was given fewer since
        self._unfinished = [trial for name, trial in trials.items() if name not in ended and trial.number < num_trials]
        for trial in self._unfinished:  # at most the last one was half-written, and what is drawn next may look at it
            self._values(trial.number)
        if _is_longest_first(config):
            self._suggest_all()

    @property
    def num_left(self) -> int:
        """Trials that can still be handed out."""
        num_suggested = len(self._study.get_trials(deepcopy=False))
        return len(self._unfinished) + max(0, self._config.search.num_trials - num_suggested)

    def next_trial(self) -> dict[str, Any] | None:
        """Return the next trial's config; None if there is none. Raises: StorageError if the storage is away for too long."""
        wait_until_reachable(self._journal)
        if self.num_left == 0 or not self._may_start():
            return None
        number = self._unfinished.pop(0).number if self._unfinished else self._study.ask().number
        name, params = make_trial_id(number), self._values(number)
        self.params[name] = params
        self.parents[name] = self._parent(name)
        return self._make_request(name, params, self.parents[name])

    def tell(self, row: Row) -> None:
        """Take note of how a trial ended, unless that is known. row: as in results.parquet, which already has it."""
        number = trial_number(row["trial_id"])
        self._tell_constraints(number, row)
        values = [_value(row, objective.metric) for objective in self._config.objectives]
        if row["status"] == FINISHED and all(math.isfinite(value) for value in values):
            self._study.tell(number, values, skip_if_finished=True)
            return
        # A stopped trial's last epoch is not a result: with its values it would be on the study's front. Without any, TPE
        # ranks it behind what finished. What breaks a constraint is ranked by how far it does, whatever its end; a failed
        # one counts for nothing.
        state = TrialState.PRUNED if row["status"] == STOPPED else TrialState.FAIL
        self._study.tell(number, state=state, skip_if_finished=True)

    def _tell_constraints(self, number: int, row: Row) -> None:
        """Store by how much the trial breaks each constraint (0 or less: it does not), for TPE and NSGA-II.

        Of a stopped one too: TPE would take it for one that breaks none, and better than what finished just above a bound.
        """
        if row["status"] == FAILED or self._recorded(number).state.is_finished():
            return
        trial = self._open(number)
        for constraint in self._config.constraints:
            value = _value(row, constraint.metric)
            for name, bound, sign in (("max", constraint.max, 1), ("min", constraint.min, -1)):
                if bound is not None and math.isfinite(value):
                    trial.set_constraint(f"{constraint.metric} {name}", sign * (value - bound))

    def _recorded(self, number: int) -> FrozenTrial:
        """Return what the journal has of a trial."""
        return self._study.get_trials(deepcopy=False)[number]

    def _open(self, number: int) -> optuna.trial.Trial:
        """Return a trial of the journal to write to."""
        return optuna.trial.Trial(self._study, self._recorded(number)._trial_id)

    def _parent(self, name: str) -> str | None:
        """Return the parent that the journal has for the trial, or choose one and put it there."""
        if self._choose_parent is None:
            return None
        number = trial_number(name)
        if PARENT not in self._recorded(number).user_attrs:
            self._open(number).set_user_attr(PARENT, self._choose_parent(name, self.params[name]))
        parent: str | None = self._recorded(number).user_attrs[PARENT]
        return parent

    def _suggest_all(self) -> None:
        """Suggest what is left at once, and sort it by length: a long trial that starts last would run alone.

        The given points stay first. Trials keep the numbers, hence the values, that they have in any order.
        """
        search, base = self._config.search, self._config.base
        for _ in range(self.num_left - len(self._unfinished)):
            number = self._study.ask().number
            self._values(number)
            self._unfinished.append(self._recorded(number))

        def place(trial: FrozenTrial) -> tuple[bool, int]:
            """Return what to sort by: given points by number, then all others by epochs, the most first."""
            stages = {"gating.epochs": base.gating.epochs, "finetuning.epochs": base.finetuning.epochs}
            if trial.number < len(search.points_to_evaluate):
                return False, trial.number
            return True, -sum(trial.params.get(name, stages[name]) for name in stages)

        self._unfinished.sort(key=place)  # equal ones stay in the order of their numbers

    def _values(self, number: int) -> Params:
        """Return the values of the study's trial, drawing and writing those that the journal lacks.

        The journal gets a line for each. A process may die between two of them: all are drawn again then, also those that
        are there, because one sampler draws them one after another.
        """
        frozen = self._recorded(number)
        if frozen.params.keys() == self._distributions.keys():
            return frozen.params
        sampler = make_sampler(self._search, number, self._distributions)
        drawn = draw(self._study, sampler, frozen, self._distributions)
        self._study.sampler = partly_fixed(drawn, sampler)
        trial = self._open(number)
        return {name: suggest(trial, name, domain) for name, domain in self._config.params.items()}


class GivenTrials(TrialSource):
    """Hands out trials that are known beforehand, each once; results.parquet says which of them are left."""

    def __init__(self, tune_configs: Mapping[str, dict[str, Any]]) -> None:
        """tune_configs: trial id -> the config that Tune gives the trial."""
        super().__init__()
        self.params = {name: {} for name in tune_configs}
        self._left = list(tune_configs.values())

    @property
    def num_left(self) -> int:
        """Trials that can still be handed out."""
        return len(self._left)

    def next_trial(self) -> dict[str, Any] | None:
        """Return the next trial's config; None if there is none."""
        return self._left.pop(0) if self._left else None


def _value(row: Row, metric: str) -> float:
    value = row.get(metric)
    return math.nan if value is None else float(value)


def _is_longest_first(config: SearchConfig) -> bool:
    """Return whether trials differ in length, and their values do not depend on how others end."""
    is_known = config.search.algorithm in ("random", "sobol")
    return is_known and bool({"gating.epochs", "finetuning.epochs"} & config.params.keys())


def _open_study(journal: Path, config: SearchConfig) -> optuna.Study:
    """Return the study of the journal, made when it is not there. Raises: RunDirError if the journal is damaged."""
    cut_torn_line(journal)
    directions = [
        StudyDirection.MAXIMIZE if objective.mode == "max" else StudyDirection.MINIMIZE
        for objective in config.objectives
    ]
    try:
        storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=_RunDirLock(str(journal))))
        study = optuna.create_study(storage=storage, study_name=STUDY_NAME, directions=directions, load_if_exists=True)
        study.get_trials(deepcopy=False)
        if FIRST_NUM_TRIALS not in study.user_attrs:
            study.set_user_attr(FIRST_NUM_TRIALS, config.search.num_trials)
    except OSError:
        raise
    except Exception as error:  # whatever a line that Optuna did not write leads to
        raise RunDirError(
            f"{journal} is damaged ({type(error).__name__}: {error}); restore it from a copy, or start the search under another name: "
            "--set name=..."
        ) from error
    return study


class _RunDirLock(JournalFileOpenLock):
    """Locks nothing: the process that writes the journal holds the lock of the run directory.

    Optuna's lock file outlives a killed process, and the next one would wait 30 s for it.
    """

    def acquire(self) -> bool:
        """Return True at once."""
        return True

    def release(self) -> None:
        """Do nothing."""
