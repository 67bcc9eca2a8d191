"""What a search has found: its config, its rows, and every question that is asked about the two.

The table, the report, MLflow and the progress all show an Outcome, so that they cannot disagree.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np

from orchestrator.config.metrics import FAILED, FINISHED, STOPPED, TRIAL, UNPRUNED, used_as
from orchestrator.config.search import Constraint, Objective, ReferenceConfig, SearchConfig
from orchestrator.config.trial import Baseline
from orchestrator.errors import RunDirError
from orchestrator.pareto.front import hypervolume, non_dominated
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import Row, read_results
from orchestrator.storage.run_dir import read_config

if TYPE_CHECKING:
    from gator.graph.architecture import Architecture

PARETO_VERSION = 1
_STATUS_WORDS = {FINISHED: "finished", STOPPED: "stopped early", FAILED: "failed"}


@dataclass(frozen=True)
class Outcome:
    """The config of a search and its rows so far; a running search has an Outcome too."""

    config: SearchConfig
    rows: Sequence[Row] = ()
    """As in results.parquet."""

    @classmethod
    def load(cls, run: RunPaths) -> Self:
        """Read the outcome of a run directory. Raises RunDirError if it is not one, or its files are damaged or links."""
        if not run.config.is_file():
            raise RunDirError(
                f"{run.root} is not a run directory: it has no {run.config.name}; expected a folder that a search wrote, "
                "such as runs/digits"
            )
        run.refuse_links()
        return cls.so_far(read_config(SearchConfig, run.config), run)

    @classmethod
    def so_far(cls, config: SearchConfig, run: RunPaths) -> Self:
        """Return the outcome of a search whose config is known; without rows if its run directory has none yet."""
        return cls(config, tuple(read_results(run.results)))

    def with_row(self, row: Row) -> Self:
        """Return the outcome with one more row, which replaces an earlier one of the same network."""
        others = (other for other in self.rows if other["trial_id"] != row["trial_id"])
        return dataclasses.replace(self, rows=(*others, row))

    # ---- what is left to do

    @property
    def trials(self) -> list[Row]:
        """The rows of trials, without those of the unpruned network, references and baselines."""
        return [row for row in self.rows if row["kind"] == TRIAL]

    @property
    def missing_trials(self) -> int:
        """How many trials have no result yet."""
        return max(0, self.config.search.num_trials - len(self.trials))

    @property
    def missing_baselines(self) -> list[Baseline]:
        """The baselines that are asked for and have no row yet."""
        present = {row["kind"] for row in self.rows}
        return [kind for kind in self.config.baselines if kind not in present]

    @property
    def missing_references(self) -> list[ReferenceConfig]:
        """The networks to measure that have no row yet."""
        present = {row["trial_id"] for row in self.rows}
        return [reference for reference in self.config.references if reference.name not in present]

    @property
    def is_done(self) -> bool:
        """Whether every trial, baseline and reference has a row."""
        return not (self.missing_trials or self.missing_baselines or self.missing_references)

    @property
    def have_all_failed(self) -> bool:
        """Whether no trial has a result, not even that of a network that was stopped: then the search has failed."""
        return all(row["status"] == FAILED for row in self.trials)

    # ---- the front

    @property
    def unpruned(self) -> Row | None:
        """The unpruned network, measured like the trials; None if it was not measured yet."""
        return next((row for row in self.rows if row["kind"] == UNPRUNED), None)

    @property
    def finished(self) -> list[Row]:
        """The finished trials for which every objective was measured.

        A stopped trial is not one, however good its last epoch looked: its network was not fine-tuned to the end.
        """
        ended = (row for row in self.trials if row["status"] == FINISHED)
        return [row for row in ended if _is_measured(row, self.config.objectives)]

    @property
    def candidates(self) -> list[Row]:
        """What may be on the front: the finished trials that meet the constraints."""
        return [row for row in self.finished if meets(row, self.config.constraints)]

    @cached_property
    def front(self) -> list[Row]:
        """The non-dominated candidates, best in the first objective first; it may be empty."""
        candidates, objectives = self.candidates, self.config.objectives
        kept = non_dominated([_point(row, objectives) for row in candidates], [one.mode for one in objectives])
        return sort_best_first([row for row, is_kept in zip(candidates, kept, strict=True) if is_kept], objectives)

    @property
    def front_ids(self) -> set[str]:
        """The trials of the front."""
        return {row["trial_id"] for row in self.front}

    @property
    def knee(self) -> Row | None:
        """The network of the front that gives up least over all objectives; None for an empty front.

        Every objective is scaled to [0, 1] over the front (0 its best value there); the knee has the smallest sum.
        With two objectives that is the point farthest from the line between the two ends of the front.
        """
        if not self.front:
            return None
        losses = np.array([[_loss(row, objective) for objective in self.config.objectives] for row in self.front])
        span = np.ptp(losses, axis=0)
        scaled = (losses - losses.min(axis=0)) / np.where(span > 0, span, 1.0)
        return self.front[int(scaled.sum(axis=1).argmin())]

    def best_under(self, limits: Mapping[str, float]) -> Row | None:
        """Return the candidate that is best in the first objective among those at or under every limit; None if there is none.

        Example: outcome.best_under({"latency_ms": 4.0}).
        """
        small = [
            row
            for row in self.candidates
            if all(_is_within(row.get(name), None, limit) for name, limit in limits.items())
        ]
        return next(iter(sort_best_first(small, self.config.objectives)), None)

    @property
    def reference_point(self) -> list[float] | None:
        """The corner that the hypervolume is counted from, in the order of the objectives.

        What is minimised: the unpruned network's value (pruning that saves nothing is worth nothing). top1 and top5: what
        guessing gives, 100 * k / num_classes. Any other maximised metric: 0. It depends on no trial, so searches of one
        space compare. None as long as the unpruned network was not measured.
        """
        unpruned, num_classes = self.unpruned, self.config.base.model.num_classes
        if unpruned is None or not _is_measured(unpruned, self.config.objectives):
            return None
        guessing = {"top1": 100.0 / num_classes, "top5": 100.0 * min(5, num_classes) / num_classes}
        return [
            float(unpruned[objective.metric]) if objective.mode == "min" else guessing.get(objective.metric, 0.0)
            for objective in self.config.objectives
        ]

    @cached_property
    def hypervolume(self) -> float | None:
        """How much of objective space the front dominates; None as long as there is no reference point."""
        corner, objectives = self.reference_point, self.config.objectives
        points = [_point(row, objectives) for row in self.front]
        return None if corner is None else hypervolume(points, [objective.mode for objective in objectives], corner)

    @property
    def pareto_json(self) -> str:
        """The text of pareto.json; what needs a measured unpruned network is null without one."""
        unpruned, names = self.unpruned, ("trial_id", *used_as("front"), *self.config.params, "mlflow_run_id")
        document = {
            "version": PARETO_VERSION,
            "objectives": [objective.model_dump() for objective in self.config.objectives],
            "constraints": [constraint.model_dump(exclude_none=True) for constraint in self.config.constraints],
            "reference_point": self.reference_point,
            "hypervolume": self.hypervolume,
            "unpruned": {name: unpruned.get(name) for name in used_as("unpruned")} if unpruned is not None else None,
            "front": [{name: row.get(name) for name in names} for row in self.front],
        }
        return json.dumps(document, indent=2) + "\n"

    # ---- in words

    @property
    def why_empty(self) -> str | None:
        """Why there is no front, in a sentence; None when there is one."""
        if self.front:
            return None
        if not (finished := self.finished):
            return f"The front is empty: {self._why_none_finished()}."
        unmet = [one for one in self.config.constraints if not any(meets(row, [one]) for row in finished)]
        nearest = "; ".join(_nearest_miss(finished, constraint) for constraint in unmet)
        reason = nearest or "each constraint is met by some trial, but never all by the same one"
        return f"The front is empty: none of {len(finished)} finished trials meets the constraints ({reason})."

    def _why_none_finished(self) -> str:
        ended = [row for row in self.trials if row["status"] == FINISHED]
        if not ended:
            return "no trial has finished"
        metrics = [objective.metric for objective in self.config.objectives]
        lacking = [metric for metric in metrics if all(row.get(metric) is None for row in ended)]
        return f"none of {len(ended)} finished trials has {' and '.join(lacking) or 'all objectives'}"

    @property
    def counts(self) -> str:
        """How the trials ended: "8 trials: 5 finished, 2 stopped early, 1 failed"."""
        statuses = Counter(row["status"] for row in self.trials)
        ended = ", ".join(f"{statuses[status]} {word}" for status, word in _STATUS_WORDS.items() if statuses[status])
        return f"{statuses.total()} trials: {ended}" if ended else "no trial has ended yet"

    @property
    def bounds(self) -> str:
        """The constraints: "macs_ratio <= 0.5"; empty when there are none."""
        limits = [
            (one.metric, *bound) for one in self.config.constraints for bound in (("<=", one.max), (">=", one.min))
        ]
        return " and ".join(f"{metric} {sign} {limit:g}" for metric, sign, limit in limits if limit is not None)

    @property
    def question(self) -> str:
        """What is sought: "top1 max, latency_ms min, with macs_ratio <= 0.5"."""
        sought = ", ".join(f"{objective.metric} {objective.mode}" for objective in self.config.objectives)
        return f"{sought}, with {self.bounds}" if self.bounds else sought

    def reading_order(self) -> list[Row]:
        """Return the rows as a reader wants them: unpruned, the front, other finished networks, the stopped, the failed."""
        on_front, statuses = self.front_ids, list(_STATUS_WORDS)

        def place(row: Row) -> tuple[bool, int, bool]:
            return row["kind"] != UNPRUNED, statuses.index(row["status"]), row["trial_id"] not in on_front

        return sorted(sort_best_first(self.rows, self.config.objectives), key=place)


def load_architectures(outcome: Outcome, run: RunPaths) -> "dict[str, Architecture]":
    """Return the recorded architectures of the front, by trial id. Raises RunDirError for a damaged one, or a link."""
    from gator.errors import ArchitectureError  # late: torch takes seconds to import
    from gator.graph.architecture import Architecture

    trials = {row["trial_id"]: run.trial(row["trial_id"]) for row in outcome.front}
    for paths in trials.values():
        paths.refuse_links()
    try:
        return {
            trial_id: Architecture.load(paths.architecture)
            for trial_id, paths in trials.items()
            if paths.architecture.is_file()
        }
    except ArchitectureError as error:
        raise RunDirError(str(error)) from error


def meets(row: Row, constraints: Sequence[Constraint]) -> bool:
    """Return whether the row has every constrained metric, within its bounds (bounds included)."""
    return all(_is_within(row.get(constraint.metric), constraint.min, constraint.max) for constraint in constraints)


def sort_best_first(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """Return the rows sorted by the objectives in turn, best first, then by trial_id; nulls come last."""
    return sorted(rows, key=lambda row: (*(_loss(row, objective) for objective in objectives), row["trial_id"]))


def _loss(row: Row, objective: Objective) -> float:
    """Return the metric so that less is better; infinity if it was not measured."""
    value = row.get(objective.metric)
    if value is None or math.isnan(value):
        return math.inf
    return -float(value) if objective.mode == "max" else float(value)


def _point(row: Row, objectives: Sequence[Objective]) -> list[float]:
    return [float(row[objective.metric]) for objective in objectives]


def _is_measured(row: Row, objectives: Sequence[Objective]) -> bool:
    values = (row.get(objective.metric) for objective in objectives)
    return not any(value is None or math.isnan(value) for value in values)


def _is_within(value: float | None, low: float | None, high: float | None) -> bool:
    if value is None or math.isnan(value):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def _nearest_miss(rows: Sequence[Row], constraint: Constraint) -> str:
    values = [row[constraint.metric] for row in rows if row.get(constraint.metric) is not None]
    if not values:
        return f"{constraint.metric} was not measured"
    if constraint.max is not None:
        return f"{constraint.metric} must be at most {constraint.max:g}, the smallest is {min(values):g}"
    return f"{constraint.metric} must be at least {constraint.min:g}, the largest is {max(values):g}"
