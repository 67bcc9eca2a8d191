"""What a search has found, read from its run directory and from nothing else.

The report, the page and MLflow all show the same Outcome, so that they cannot disagree.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

from pydantic import ValidationError

from orchestrator import pareto
from orchestrator.config import Constraint, Objective, SearchConfig
from orchestrator.errors import RunDirError
from orchestrator.pareto import Row
from orchestrator.paths import RunPaths
from orchestrator.records import read_results

if TYPE_CHECKING:
    from gator import Architecture

_STATUS_WORDS = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}


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
        return pareto.front(self.rows, self.config.objectives, self.config.constraints)

    @cached_property
    def architectures(self) -> "dict[str, Architecture]":
        """The recorded architectures of the front, by trial id. Raises RunDirError for a damaged one, or a link."""
        from gator import (  # late: torch takes seconds to import, and a table needs none of it
            Architecture,
            ArchitectureError,
        )

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
        return pareto.find_unpruned(self.rows)

    @property
    def params(self) -> list[str]:
        """Dotted names of the searched parameters."""
        return list(self.config.params)

    @property
    def knee(self) -> Row | None:
        """The network of the front that gives up least over all objectives."""
        return pareto.knee(self.front, self.config.objectives)

    @property
    def pareto_json(self) -> str:
        """The text of pareto.json."""
        return pareto.pareto_json(
            self.rows, self.config.objectives, self.config.constraints, self.config.base.model.num_classes, self.params
        )

    @property
    def reference_point(self) -> list[float] | None:
        """Where the hypervolume is counted from, one number per objective."""
        return pareto.reference_point(self.rows, self.config.objectives, self.config.base.model.num_classes)

    @property
    def hypervolume(self) -> float | None:
        """How much of objective space the front dominates."""
        return pareto.front_hypervolume(
            self.rows, self.config.objectives, self.config.constraints, self.config.base.model.num_classes
        )

    @property
    def why_empty(self) -> str | None:
        """Why there is no front, in a sentence; None when there is one."""
        if self.front:
            return None
        return pareto.why_empty(self.rows, self.config.objectives, self.config.constraints)

    def best_under(self, limits: Mapping[str, float]) -> Row | None:
        """Return the best candidate in the first objective that lies at or under every limit, or None."""
        return pareto.best_under(self.rows, self.config.objectives, self.config.constraints, limits)

    @property
    def counts(self) -> str:
        """How the trials ended: "8 trials: 5 finished, 2 stopped early, 1 failed"."""
        statuses = Counter(row["status"] for row in self.rows if row["kind"] == "trial")
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
        return row["kind"] != pareto.UNPRUNED, statuses.index(row["status"]), row["trial_id"] not in on_front

    return sorted(pareto.sort_best_first(rows, objectives), key=place)


def _constraint_text(constraint: Constraint) -> str:
    bounds = [f"{constraint.metric} <= {constraint.max:g}"] if constraint.max is not None else []
    bounds += [f"{constraint.metric} >= {constraint.min:g}"] if constraint.min is not None else []
    return " and ".join(bounds)
