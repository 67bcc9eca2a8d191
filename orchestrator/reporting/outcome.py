"""What a search has found, read from its run directory and from nothing else.

The report, the page and MLflow all show the same Outcome, so that they cannot disagree.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import ValidationError

from orchestrator.config.metrics import FAILED, FINISHED, STOPPED, TRIAL, UNPRUNED, used_as
from orchestrator.config.search import Constraint, Objective, ReferenceConfig, SearchConfig
from orchestrator.config.trial import Baseline
from orchestrator.errors import RunDirError
from orchestrator.pareto.front import _loss, _losses, hypervolume, non_dominated
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import Row, read_results

if TYPE_CHECKING:
    from gator.graph.architecture import Architecture

_STATUS_WORDS = {FINISHED: "finished", STOPPED: "stopped early", FAILED: "failed"}


def _constraint_text(constraint: Constraint) -> str:
    bounds = [f"{constraint.metric} <= {constraint.max:g}"] if constraint.max is not None else []
    bounds += [f"{constraint.metric} >= {constraint.min:g}"] if constraint.min is not None else []
    return " and ".join(bounds)


def num_missing(config: SearchConfig, rows: Sequence[dict[str, Any]]) -> int:
    """Return how many trials have no result yet."""
    return config.search.num_trials - len(ended_trials(rows))


def _rows(run: RunPaths) -> list[dict[str, Any]]:
    return read_results(run.results) if run.results.exists() else []


@dataclass(frozen=True)
class Outcome:
    """The config of a search and its rows so far; a running search has an Outcome too."""

    run: RunPaths
    config: SearchConfig
    rows: tuple[Row, ...]
    """As in results.parquet."""

    @classmethod
    def load(cls, run: RunPaths) -> Self:
        """Return what stands in the run directory. Raises RunDirError when it is none, or its files are damaged or links."""
        if not run.config.is_file():
            raise RunDirError(
                f"{run.root} is no run directory: it has no {run.config.name}; expected a folder that a search wrote, "
                "such as runs/digits"
            )
        run.refuse_links()
        try:
            config = SearchConfig.model_validate_json(run.config.read_bytes())
        except ValidationError as error:
            raise RunDirError(f"{run.config} does not fit this program's SearchConfig: {error}") from error
        return cls(run, config, tuple(read_results(run.results)) if run.results.exists() else ())

    @cached_property
    def front(self) -> list[Row]:
        """The Pareto front, best in the first objective first."""
        return front(self.rows, self.config.objectives, self.config.constraints)

    @cached_property
    def architectures(self) -> "dict[str, Architecture]":
        """The recorded architectures of the front, by trial id. Raises RunDirError for a damaged one, or a link."""
        from gator.errors import ArchitectureError
        from gator.graph.architecture import Architecture

        trials = {row["trial_id"]: self.run.trial(row["trial_id"]) for row in self.front}
        for paths in trials.values():
            paths.refuse_links()
        files = {trial_id: paths.architecture for trial_id, paths in trials.items()}
        try:
            return {trial_id: Architecture.load(file) for trial_id, file in files.items() if file.is_file()}
        except ArchitectureError as error:
            raise RunDirError(str(error)) from error

    @property
    def unpruned(self) -> Row | None:
        """The unpruned network, measured like the trials."""
        return find_unpruned(self.rows)

    @property
    def params(self) -> list[str]:
        """Dotted names of the searched parameters."""
        return list(self.config.params)

    @property
    def knee(self) -> Row | None:
        """The network of the front that gives up least over all objectives."""
        return knee(self.front, self.config.objectives)

    @property
    def pareto_json(self) -> str:
        """The text of pareto.json."""
        return pareto_json(
            self.rows, self.config.objectives, self.config.constraints, self.config.base.model.num_classes, self.params
        )

    @property
    def reference_point(self) -> list[float] | None:
        """Where the hypervolume is counted from, one number per objective."""
        return reference_point(self.rows, self.config.objectives, self.config.base.model.num_classes)

    @property
    def hypervolume(self) -> float | None:
        """How much of objective space the front dominates."""
        return front_hypervolume(
            self.rows, self.config.objectives, self.config.constraints, self.config.base.model.num_classes
        )

    @property
    def why_empty(self) -> str | None:
        """Why there is no front, in a sentence; None when there is one."""
        if self.front:
            return None
        return why_empty(self.rows, self.config.objectives, self.config.constraints)

    def best_under(self, limits: Mapping[str, float]) -> Row | None:
        """Return the best candidate in the first objective that lies at or under every limit, or None."""
        return best_under(self.rows, self.config.objectives, self.config.constraints, limits)

    @property
    def counts(self) -> str:
        """How the trials ended: "8 trials: 5 finished, 2 stopped early, 1 failed"."""
        statuses = Counter(row["status"] for row in self.rows if row["kind"] == TRIAL)
        ended = ", ".join(f"{statuses[status]} {word}" for status, word in _STATUS_WORDS.items() if statuses[status])
        return f"{statuses.total()} trials: {ended}" if ended else "no trial has ended yet"

    @property
    def bounds(self) -> str:
        """The constraints: "macs_ratio <= 0.5"; empty when there are none."""
        return " and ".join(_constraint_text(constraint) for constraint in self.config.constraints)

    @property
    def question(self) -> str:
        """What is sought: "top1 max, latency_ms min, with macs_ratio <= 0.5"."""
        sought = ", ".join(f"{objective.metric} {objective.mode}" for objective in self.config.objectives)
        return f"{sought}, with {self.bounds}" if self.bounds else sought


def reading_order(rows: Sequence[Row], front: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """Return the rows as a reader wants them: unpruned, the front, other finished networks, the stopped, the failed."""
    on_front = {row["trial_id"] for row in front}
    statuses = list(_STATUS_WORDS)

    def place(row: Row) -> tuple[bool, int, bool]:
        return row["kind"] != UNPRUNED, statuses.index(row["status"]), row["trial_id"] not in on_front

    return sorted(sort_best_first(rows, objectives), key=place)


PARETO_VERSION = 1


def meets(row: Row, constraints: Sequence[Constraint]) -> bool:
    """Return whether the row has every constrained metric and it lies within its bounds (bounds included)."""
    return all(_is_within(row.get(constraint.metric), constraint.min, constraint.max) for constraint in constraints)


def candidates(rows: Sequence[Row], objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> list[Row]:
    """Return what may stand on the front: finished trials with every objective measured that meet the constraints.

    A stopped trial never stands there, however good its last epoch looked: its network was not fine-tuned to the end.
    """
    finished = (row for row in rows if row["kind"] == TRIAL and row["status"] == FINISHED)
    return [row for row in finished if _is_measured(row, objectives) and meets(row, constraints)]


def front(rows: Sequence[Row], objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> list[Row]:
    """Return the non-dominated candidates, best in the first objective first; it may be empty."""
    eligible = candidates(rows, objectives, constraints)
    kept = non_dominated([_point(row, objectives) for row in eligible], [objective.mode for objective in objectives])
    return sort_best_first([row for row, is_kept in zip(eligible, kept, strict=True) if is_kept], objectives)


def why_empty(rows: Sequence[Row], objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> str:
    """Return the sentence that explains an empty front."""
    finished = candidates(rows, objectives, constraints=())
    if not finished:
        ended = [row for row in rows if row["kind"] == TRIAL and row["status"] == FINISHED]
        lacking = [one.metric for one in objectives if ended and all(row.get(one.metric) is None for row in ended)]
        return (
            f"The front is empty: none of {len(ended)} finished trials has {' and '.join(lacking) or 'all objectives'}."
            if ended
            else "The front is empty: no trial has finished."
        )
    unmet = [constraint for constraint in constraints if not any(meets(row, [constraint]) for row in finished)]
    nearest = "; ".join(_nearest_miss(finished, constraint) for constraint in unmet)
    reason = nearest or "each constraint is met by some trial, but never all by the same one"
    return f"The front is empty: none of {len(finished)} finished trials meets the constraints ({reason})."


def sort_best_first(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """Return the rows sorted by the objectives in turn, best first, then by trial_id; nulls come last."""

    def key(row: Row) -> tuple[Any, ...]:
        losses = (_loss(row.get(objective.metric), objective.mode) for objective in objectives)
        return (*(math.inf if math.isnan(loss) else loss for loss in losses), row["trial_id"])

    return sorted(rows, key=key)


def knee(front_rows: Sequence[Row], objectives: Sequence[Objective]) -> Row | None:
    """Return the network of the front that gives up least over all objectives, or None for an empty front.

    Every objective is scaled to [0, 1] over the front (0 its best value there); the knee has the smallest sum.
    With two objectives that is the point farthest from the line between the two ends of the front.
    """
    if not front_rows:
        return None
    losses = _losses([_point(row, objectives) for row in front_rows], [objective.mode for objective in objectives])
    span = np.ptp(losses, axis=0)
    scaled = (losses - losses.min(axis=0)) / np.where(span > 0, span, 1.0)
    return front_rows[int(scaled.sum(axis=1).argmin())]


def best_under(
    rows: Sequence[Row], objectives: Sequence[Objective], constraints: Sequence[Constraint], limits: Mapping[str, float]
) -> Row | None:
    """Return the candidate that is best in the first objective among those at or under every limit, {metric: limit}.

    Example: best_under(rows, objectives, constraints, {"latency_ms": 4.0}). None when no candidate is that small.
    """
    eligible = candidates(rows, objectives, constraints)
    small = [row for row in eligible if all(_is_within(row.get(name), None, limit) for name, limit in limits.items())]
    return next(iter(sort_best_first(small, objectives)), None)


def reference_point(rows: Sequence[Row], objectives: Sequence[Objective], num_classes: int) -> list[float] | None:
    """Return the corner that the hypervolume is counted from, in the order of the objectives.

    What is minimised: the unpruned network's value (pruning that saves nothing is worth nothing). top1 and top5: what
    guessing gives, 100 * k / num_classes. Any other maximised metric: 0. So it depends on no trial, and searches of one
    space compare. None as long as the unpruned network was not measured.
    """
    unpruned = find_unpruned(rows)
    if unpruned is None or not _is_measured(unpruned, objectives):
        return None
    guessing = {"top1": 100.0 / num_classes, "top5": 100.0 * min(5, num_classes) / num_classes}
    return [
        float(unpruned[objective.metric]) if objective.mode == "min" else guessing.get(objective.metric, 0.0)
        for objective in objectives
    ]


def front_hypervolume(
    rows: Sequence[Row], objectives: Sequence[Objective], constraints: Sequence[Constraint], num_classes: int
) -> float | None:
    """Return the hypervolume of the front from reference_point(); None as long as there is no reference."""
    corner = reference_point(rows, objectives, num_classes)
    if corner is None:
        return None
    points = [_point(row, objectives) for row in front(rows, objectives, constraints)]
    return hypervolume(points, [objective.mode for objective in objectives], corner)


def pareto_json(
    rows: Sequence[Row],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    num_classes: int,
    params: Sequence[str],
) -> str:
    """Return the text of pareto.json.

    `params`: dotted names of the searched parameters. "unpruned", "reference_point" and "hypervolume" are null as long
    as there is no measured unpruned network.
    """
    unpruned = find_unpruned(rows)
    document = {
        "version": PARETO_VERSION,
        "objectives": [objective.model_dump() for objective in objectives],
        "constraints": [constraint.model_dump(exclude_none=True) for constraint in constraints],
        "reference_point": reference_point(rows, objectives, num_classes),
        "hypervolume": front_hypervolume(rows, objectives, constraints, num_classes),
        "unpruned": {name: unpruned.get(name) for name in used_as("unpruned")} if unpruned is not None else None,
        "front": [_front_entry(row, params) for row in front(rows, objectives, constraints)],
    }
    return json.dumps(document, indent=2) + "\n"


def find_unpruned(rows: Sequence[Row]) -> Row | None:
    """Return the row of the unpruned network, or None when it was not measured yet."""
    return next((row for row in rows if row["kind"] == UNPRUNED), None)


def _front_entry(row: Row, params: Sequence[str]) -> dict[str, Any]:
    names = ("trial_id", *used_as("front"), *params, "mlflow_run_id")
    return {name: row.get(name) for name in names}


def _point(row: Row, objectives: Sequence[Objective]) -> list[float]:
    return [float(row[objective.metric]) for objective in objectives]


def _is_measured(row: Row, objectives: Sequence[Objective]) -> bool:
    return not any(math.isnan(_loss(row.get(objective.metric), objective.mode)) for objective in objectives)


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


def ended_trials(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of trials; those of the unpruned network and of baselines are none."""
    return [row for row in rows if row["kind"] == TRIAL]


def missing_baselines(config: SearchConfig, rows: Sequence[Mapping[str, Any]]) -> list[Baseline]:
    """Return the baselines that are asked for and have no row yet."""
    present = {row["kind"] for row in rows}
    return [kind for kind in config.baselines if kind not in present]


def missing_references(config: SearchConfig, rows: Sequence[Mapping[str, Any]]) -> list[ReferenceConfig]:
    """Return the networks to measure that have no row yet."""
    present = {row["trial_id"] for row in rows}
    return [reference for reference in config.references if reference.name not in present]


def have_all_failed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no trial has a result, not even that of a network that was stopped: then the search has failed."""
    return all(row["status"] == FAILED for row in ended_trials(rows))
