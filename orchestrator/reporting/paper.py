"""Compares a search with the tables of Gator's paper (arXiv 2205.15404): `report RUN_DIR --against paper`.

Rows are matched by MACs, not by loss weight: weights do not carry over from one implementation to another (the research
code draws two masks on a path, which doubles the task's gradient), shares of the MACs do. The weight that led to a share
is printed next to it. Networks that the paper compares with, and its one published architecture, are the search's references.

The paper's rows, and under "comparison" its recipe and which of its names mean what here, are in search_spaces/paper/results.json.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

from orchestrator.config.metrics import FINISHED, REFERENCE, latency_column
from orchestrator.config.yaml_files import SHIPPED
from orchestrator.errors import UserError
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.table import aligned, metric_text, ratio_text, value_text
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import Row, read_metrics

RESULTS = SHIPPED / "search_spaces" / "paper" / "results.json"
BATCH_SIZES = (8, 32)
"""At which the paper timed its networks."""
MAX_DISTANCE = 0.02
"""Of the unpruned MACs: a trial further from a row does not match it."""
UNSURE_NOTE = "?: probably too low; the paper's code stops counting at the first removed block of a stage."
CHAIN_NOTE = (
    'recipe: each trial starts from the unpruned network here; in the paper that holds for rows named "direct" alone'
)


@dataclass(frozen=True)
class Match:
    """A row of the paper, and the trial of the search nearest to it in MACs."""

    method: str
    pressure: str
    """The part of gating.cost that the row was pruned for."""
    paper_top1: float
    paper_diff: float
    """Points against the paper's unpruned network."""
    paper_ratio: float
    """MACs over the unpruned network's."""
    is_ratio_sure: bool
    """False where the paper's code counted a network with removed blocks, whose MACs it counts too low."""
    trial: Row | None
    """None: no finished trial is within MAX_DISTANCE."""
    diff: float | None
    """Points of the trial against the search's unpruned network."""
    loss_weight: float | None
    """The weight of the cost that led there: the mean over the trial's gating epochs."""


class _Paper:
    """What results.json holds about the model of a search. Raises: UserError if the paper has no table for it."""

    def __init__(self, model: str) -> None:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        comparison = results["comparison"]
        tables: dict[str, str] = comparison["model_tables"]
        if model not in tables:
            raise UserError(f"--against paper: the paper has no table for {model}; it has {', '.join(tables)}")
        self.rows: list[dict[str, Any]] = results[tables[model]]
        self.unpruned = next(row for row in self.rows if row["group"] == "original")
        self.pressures: dict[str, str] = comparison["pressures"]
        self.references: dict[str, str] = comparison["references"]
        self.recipe: dict[str, object] = comparison["recipes"][tables[model]]
        self.notes: list[str] = comparison["notes"][tables[model]]


def matches(outcome: Outcome, run: RunPaths) -> list[Match]:
    """Return the paper's rows for this model, each with the trial that is nearest to it.

    Raises: UserError if the paper has no table for the model.
    """
    paper = _Paper(outcome.config.base.model.name)
    finished = [row for row in outcome.trials if row["status"] == FINISHED]
    found = []
    for row in paper.rows:
        if row["group"] not in paper.pressures or row["top1"] is None or row["flops_reduction_percent"] is None:
            continue
        ratio = 1 - row["flops_reduction_percent"] / 100
        trial, unpruned = _nearest(finished, ratio), outcome.unpruned
        found.append(
            Match(
                method=row["method"],
                pressure=paper.pressures[row["group"]],
                paper_top1=row["top1"],
                paper_diff=row["top1"] - paper.unpruned["top1"],
                paper_ratio=ratio,
                is_ratio_sure="cost_suspect" not in row,
                trial=trial,
                diff=None if trial is None or unpruned is None else trial["top1"] - unpruned["top1"],
                loss_weight=None if trial is None else _loss_weight(run, trial["trial_id"]),
            )
        )
    return sorted(found, key=lambda match: -match.paper_ratio)


def comparison_text(outcome: Outcome, run: RunPaths) -> str:
    """Return the tables for a person: the paper, the search, their difference, row by row; then what differs in the recipe.

    The rows under the pressure of this search come first, then those that merely cost as much.
    """
    paper, found = _Paper(outcome.config.base.model.name), matches(outcome, run)
    same = [match for match in found if getattr(outcome.config.base.gating.cost, match.pressure) > 0]
    other = [match for match in found if match not in same]
    header = (
        "paper's row", "its MACs", "its top1", "its diff", "trial", "MACs", "weight", "top1", "diff", "diff - paper's",
    )  # fmt: skip
    gap = [("",) * len(header)] if same and other else []
    notes = [
        "MACs: those of the unpruned network are 1.",
        "diff: points against the unpruned network of the same side; the last column compares these, not the accuracies.",
        "weight: of the cost in the loss, mean over the gating epochs; the paper's is the number in its row's name.",
        *(["below the gap: rows under another pressure than this search's, at equal MACs."] if gap else []),
        *([] if all(match.is_ratio_sure for match in found) else [UNSURE_NOTE]),
        *paper.notes,
        *_recipe(outcome, paper),
    ]
    table = aligned([header, *map(_cells, same), *gap, *map(_cells, other)], text_columns=(0, 4))
    return "\n".join([*table, "", *_references_table(outcome, paper), *notes])


def _references_table(outcome: Outcome, paper: _Paper) -> list[str]:
    """Return the table of the networks that were not trained, and a blank line; nothing if the search has none."""
    theirs = {row["method"]: row for row in paper.rows}
    speedups = tuple(f"speedup b{size}" for size in BATCH_SIZES)
    lines = [("network", "paper's top1", *speedups, "top1", *speedups)]
    for row in outcome.rows:
        if row["kind"] == REFERENCE and (of_paper := theirs.get(paper.references.get(row["trial_id"], ""))):
            their_speedups = (ratio_text(paper.unpruned, of_paper, f"ms_batch_{size}") for size in BATCH_SIZES)
            own_speedups = (ratio_text(outcome.unpruned, row, _latency_column(outcome, size)) for size in BATCH_SIZES)
            top1 = "not trained" if row["top1"] is None else metric_text("top1", row["top1"])
            lines.append((row["trial_id"], metric_text("top1", of_paper["top1"]), *their_speedups, top1, *own_speedups))
    return [*aligned(lines, text_columns=(0,)), ""] if len(lines) > 1 else []


def _latency_column(outcome: Outcome, batch_size: int) -> str:
    return "latency_ms" if outcome.config.base.profile.batch_sizes[0] == batch_size else latency_column(batch_size)


def _loss_weight(run: RunPaths, trial_id: str) -> float | None:
    path = run.trial(trial_id).metrics
    rows = read_metrics(path) if path.is_file() else []
    weights = [row["loss_weight"] for row in rows if row["stage"] == "gate" and not row["final"]]
    return sum(weights) / len(weights) if weights else None


def _nearest(rows: list[Row], ratio: float) -> Row | None:
    near = [row for row in rows if abs(row["macs_ratio"] - ratio) <= MAX_DISTANCE]
    return min(near, key=lambda row: abs(row["macs_ratio"] - ratio), default=None)


def _cells(match: Match) -> tuple[str, ...]:
    trial, diff = match.trial, match.diff
    return (
        match.method,
        f"{match.paper_ratio:.3f}{'' if match.is_ratio_sure else '?'}",
        f"{match.paper_top1:.2f}",
        f"{match.paper_diff:+.2f}",
        "none near it" if trial is None else trial["trial_id"],
        metric_text("macs_ratio", None if trial is None else trial["macs_ratio"]),
        "-" if match.loss_weight is None else f"{match.loss_weight:.3g}",
        metric_text("top1", None if trial is None else trial["top1"]),
        "-" if diff is None else f"{diff:+.2f}",
        "-" if diff is None else f"{diff - match.paper_diff:+.2f}",
    )


def _recipe(outcome: Outcome, paper: _Paper) -> list[str]:
    """Return what differs from the paper's recipe, a line each."""
    differing = [
        f"recipe: {name} is {value_text(own)} here, {value_text(theirs)} in the paper"
        for name, theirs in paper.recipe.items()
        if (own := functools.reduce(getattr, name.split("."), outcome.config.base)) != theirs
    ]
    return differing if outcome.config.search.descend == "chain" else [*differing, CHAIN_NOTE]
