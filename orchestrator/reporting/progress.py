"""What a search shows while it runs, on stderr: one live table on a terminal, else one plain line per event."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.config.metrics import FAILED, FINISHED, REFERENCE, STOPPED, UNPRUNED, used_as
from orchestrator.config.rungs import max_gating_epochs, max_num_epochs, rungs_of
from orchestrator.config.search import SearchConfig
from orchestrator.pareto.asha import judged_epoch
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.table import metric_text
from orchestrator.storage.records import Row

FIXED = (UNPRUNED, REFERENCE)
"""Kinds of networks that are measured, not trained."""
NUM_UNTIL_EMPTY_IS_SAID = 3
"""Finished trials after which the progress reports, once, that none of them meets the constraints, and by how much."""
NUM_ENDED_SHOWN = 12
"""The live table shows all running trials and so many of those that ended last."""


@dataclass
class TrialStatus:
    """A trial as the progress shows it."""

    state: str = "starting"
    epoch: int = 0
    judged_epoch: int = 0
    """As its rungs count."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    has_ended: bool = False


class SearchState:
    """The trials of a search so far, and what follows from them."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.num_epochs = max_num_epochs(config)
        self.rungs = rungs_of(config)
        self.num_trials = config.search.num_trials + len(config.baselines)
        self.trials: dict[str, TrialStatus] = {}
        self.outcome = Outcome(config)
        self._num_epochs_timed = 0
        self._began_s: float | None = None

    def load(self, outcome: Outcome) -> None:
        """Take over what an earlier process has found."""
        self.outcome = outcome
        for row in outcome.rows:
            if row["kind"] not in FIXED:
                self.trials[row["trial_id"]] = self._ended(row)

    def begin(self, now_s: float) -> None:
        """Start the clock of the time left: the first trial, or the first baseline, is about to start."""
        self._began_s, self._num_epochs_timed = now_s, 0

    def start(self, trial_id: str) -> None:
        """Add a trial, or one again that an earlier process did not finish."""
        self.trials[trial_id] = TrialStatus()

    def epoch(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Take note of a report."""
        trial = self.trials[trial_id]
        # A continued trial starts in the middle: only the epochs of this process are timed.
        self._num_epochs_timed += max(0, metrics["epoch"] - trial.epoch) if trial.epoch else 1
        trial.epoch, trial.metrics = metrics["epoch"], metrics
        trial.judged_epoch = judged_epoch(metrics, max_gating_epochs(self.config))
        trial.state = {"gate": "gating", "finetune": "fine-tuning"}.get(metrics["stage"], metrics["stage"])

    def end(self, row: Row) -> None:
        """Take note of how a trial ended."""
        self.outcome = self.outcome.with_row(row)
        if row["kind"] not in FIXED:
            self.trials[row["trial_id"]] = self._ended(row)

    def rung_text(self, trial: TrialStatus) -> str:
        """Return how many of the rungs the trial has reached, such as "1/2"; "-" where there are none."""
        return f"{sum(epoch <= trial.judged_epoch for epoch in self.rungs)}/{len(self.rungs)}" if self.rungs else "-"

    @property
    def num_ended(self) -> int:
        """Trials with a row."""
        return sum(trial.has_ended for trial in self.trials.values())

    def left_s(self, now_s: float) -> float | None:
        """Return the seconds left if no further trial is stopped and epochs take as long as so far; None if unknown."""
        if self._began_s is None or self._num_epochs_timed == 0:
            return None
        running = [trial for trial in self.trials.values() if not trial.has_ended]
        num_to_come = self.num_trials - self.num_ended - len(running)
        num_epochs = num_to_come * self.num_epochs + sum(self.num_epochs - trial.epoch for trial in running)
        return num_epochs * (now_s - self._began_s) / self._num_epochs_timed

    def _ended(self, row: Row) -> TrialStatus:
        epoch = self.num_epochs if row["status"] == FINISHED else row.get("stopped_epoch") or 0
        before = self.trials.get(row["trial_id"])
        judged = before.judged_epoch if before is not None and before.judged_epoch else epoch
        return TrialStatus(row["status"], epoch, judged, row, has_ended=True)


class Progress:
    """Shows a search: on a terminal as one table, updated in place below lines of their own; elsewhere as a line per event."""

    def __init__(self, config: SearchConfig, console: Console) -> None:
        self.state = SearchState(config)
        self.console = console
        live = Live(console=console, get_renderable=self.table, refresh_per_second=2)
        self._live = live if console.is_terminal else None
        self._is_empty_said = False

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def earlier(self, outcome: Outcome) -> None:
        """Take over what an earlier process has found."""
        self.state.load(outcome)

    def trials_begin(self, num_left: int, num_at_once: int) -> None:
        """The first trial is about to start."""
        self.state.begin(time.monotonic())
        self.say(f"{num_left} of {self.state.num_trials} trials to run, {num_at_once} at once")

    def started(self, trial_id: str, kind: str) -> None:
        """A trial's driver runs, or another network is about to be measured."""
        if kind in FIXED:
            self.say(f"Measuring {_name(trial_id, kind)}")
            return
        self.state.start(trial_id)
        self.event(f"{trial_id} starts")

    def epoch(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """A trial has reported."""
        self.state.epoch(trial_id, metrics)
        if not metrics.get("final"):
            trial = self.state.trials[trial_id]
            place = f"epoch {trial.epoch}/{self.state.num_epochs} {trial.state}"
            self.event(f"{trial_id} {place} {self._metrics_text(metrics)}")

    def ended(self, row: Row) -> None:
        """A network has a row."""
        self.state.end(row)
        if row["kind"] in FIXED:
            self.say(f"{_name(row['trial_id'], row['kind'])}: {self._metrics_text(row)}")
            return
        if row["status"] == FAILED:
            self.say(f"{row['trial_id']} failed: {row['error']}")
        elif row["status"] == STOPPED:
            self.event(f"{row['trial_id']} stopped at epoch {row['stopped_epoch']}")
        else:
            self.event(f"{row['trial_id']} finished {self._metrics_text(row)}")
        self.event(self.summary())
        self._say_why_empty()

    def _say_why_empty(self) -> None:
        """Report, while something can still be done about it, that no trial is within the constraints."""
        outcome = self.state.outcome
        num_finished = sum(row["status"] == FINISHED for row in outcome.trials)
        if num_finished >= NUM_UNTIL_EMPTY_IS_SAID and not self._is_empty_said and outcome.why_empty:
            self._is_empty_said = True
            self.say(outcome.why_empty)

    def event(self, line: str) -> None:
        """Print what has happened, unless a table shows it."""
        if self._live is None:
            self.say(line)

    def summary(self) -> str:
        """Return the search in a line: "3/8 trials ended, front 2, hypervolume 56.1, 2 min left"."""
        state = self.state
        parts = [f"{state.num_ended}/{state.num_trials} trials ended", f"front {len(state.outcome.front)}"]
        if (volume := state.outcome.hypervolume) is not None:
            parts.append(f"hypervolume {volume:.4g}")
        if left_s := state.left_s(time.monotonic()):
            parts.append(f"about {duration_text(left_s)} left")
        return ", ".join(parts)

    def _metrics_text(self, metrics: Mapping[str, Any]) -> str:
        return " ".join(f"{name} {metric_text(name, metrics.get(name))}" for name in self._columns())

    def _columns(self) -> list[str]:
        names = [objective.metric for objective in self.state.config.objectives]
        return list(dict.fromkeys([*names, *(name for name in used_as("headline") if name in used_as("log"))]))

    def table(self) -> Table | str:
        """Return the trials as a table; nothing before the first has started."""
        trials = list(self.state.trials.items())
        if not trials:
            return ""
        columns = self._columns()
        table = Table(box=None, header_style="bold", caption=self.summary(), caption_justify="left")
        for name in ("", "trial", "state", "epoch", "rung", *columns):
            table.add_column(name, justify="right" if name in columns else "left", no_wrap=True)
        on_front = self.state.outcome.front_ids
        hidden = set([trial_id for trial_id, trial in trials if trial.has_ended][:-NUM_ENDED_SHOWN])
        for trial_id, trial in trials:
            if trial_id not in hidden:
                values = (metric_text(name, trial.metrics.get(name)) for name in columns)
                mark = "*" if trial_id in on_front else ""
                epoch, rung = f"{trial.epoch}/{self.state.num_epochs}", self.state.rung_text(trial)
                table.add_row(mark, trial_id, trial.state, epoch, rung, *values, style=_style(trial))
        return table


def duration_text(seconds: float) -> str:
    """Return a duration a person can read.

    >>> duration_text(42), duration_text(130), duration_text(9000)
    ('42 s', '2 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _name(trial_id: str, kind: str) -> str:
    return "the unpruned network" if kind == UNPRUNED else trial_id


def _style(trial: TrialStatus) -> str:
    if not trial.has_ended:
        return "bold"
    return {FINISHED: "green", STOPPED: "dim", FAILED: "red"}[trial.state]
