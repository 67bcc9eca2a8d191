"""A search beside the tables of Gator's paper (arXiv 2205.15404): `report RUN_DIR --against paper`.

Rows are matched by multiply-adds, not by loss weight: weights do not carry over from one implementation to another (the research
code draws two masks on a path, which doubles the task's gradient), shares of the multiply-adds do.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import TrialConfig
from orchestrator.errors import UserError
from orchestrator.outcome import Outcome
from orchestrator.pareto import Row

RESULTS = Path(__file__).resolve().parents[1] / "search_spaces" / "paper" / "results.json"
TABLES = {"resnet50": "imagenet_resnet50", "resnet56_cifar": "cifar10_resnet56"}
"""Our model -> the paper's table of it."""
OWN_GROUPS = ("flops", "latency", "b8", "b32", "memory", "direct")
"""The paper's own rows; the others are networks that it compares with."""
MAX_DISTANCE = 0.02
"""Of the unpruned multiply-adds: a trial further from a row is no match for it."""
RECIPES = {
    "imagenet_resnet50": {
        "data": "ImageNet",
        "gating.lr": 0.01,
        "gating.epochs": 30,
        "finetuning.lr": 1e-4,
        "finetuning.epochs": 40,
    },
    "cifar10_resnet56": {"data": "CIFAR-10", "gating.lr": 0.01},
}
"""What the paper trained with, as far as it says so, by the names of our config."""

PAPER_NOTES = {
    "imagenet_resnet50": (
        "The paper counts 3.86 G multiply-adds for ResNet-50, this project the 4.09 G that run: shares differ a little.",
    )
}


@dataclass(frozen=True)
class Match:
    """A row of the paper, and our trial nearest to it in multiply-adds."""

    method: str
    paper_top1: float
    paper_diff: float
    """Points against the paper's unpruned network."""
    paper_ratio: float
    """Multiply-adds over the unpruned network's."""
    trial: Row | None
    """None: no finished trial lies within MAX_DISTANCE."""
    diff: float | None
    """Points of the trial against our unpruned network."""


def matches(outcome: Outcome) -> list[Match]:
    """Return the paper's rows for this model, each with the trial that lies nearest to it.

    Raises: UserError if the paper has no table for the model.
    """
    rows = _paper_rows(outcome.config.base)
    unpruned = next(row for row in rows if row["group"] == "original")
    ours = [row for row in outcome.rows if row["kind"] == "trial" and row["status"] == "finished"]
    own = outcome.unpruned
    found = []
    for row in rows:
        if row["group"] not in OWN_GROUPS or row["top1"] is None or row["flops_reduction_percent"] is None:
            continue
        ratio = 1 - row["flops_reduction_percent"] / 100
        trial = _nearest(ours, ratio)
        diff = trial["top1"] - own["top1"] if trial is not None and own is not None else None
        found.append(Match(row["method"], row["top1"], row["top1"] - unpruned["top1"], ratio, trial, diff))
    return sorted(found, key=lambda match: -match.paper_ratio)


def comparison_text(outcome: Outcome) -> str:
    """Return the table for a person: paper, ours, difference, row by row; then what differs in the recipe."""
    header = ("paper's row", "its MACs", "top1", "diff", "our trial", "MACs", "top1", "diff", "ours - paper")
    lines = [header, *(_cells(match) for match in matches(outcome))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [
        "diff: points against the unpruned network of the same side; ours - paper compares these, not the accuracies.",
        *PAPER_NOTES.get(TABLES[outcome.config.base.model.name], ()),
        *_recipe(outcome.config.base),
    ]
    return "\n".join([*table, "", *notes])


def _paper_rows(base: TrialConfig) -> list[dict[str, Any]]:
    if base.model.name not in TABLES:
        raise UserError(f"--against paper: the paper has no table for {base.model.name}; it has {', '.join(TABLES)}")
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))[TABLES[base.model.name]]
    return rows


def _nearest(rows: Sequence[Row], ratio: float) -> Row | None:
    nearest = min(rows, key=lambda row: abs(row["macs_ratio"] - ratio), default=None)
    return nearest if nearest is not None and abs(nearest["macs_ratio"] - ratio) <= MAX_DISTANCE else None


def _cells(match: Match) -> tuple[str, ...]:
    paper = (match.method, f"{match.paper_ratio:.3f}", f"{match.paper_top1:.2f}", f"{match.paper_diff:+.2f}")
    if match.trial is None:
        return (*paper, "none near it", "-", "-", "-", "-")
    ours = (match.trial["trial_id"], f"{match.trial['macs_ratio']:.3f}", f"{match.trial['top1']:.2f}")
    if match.diff is None:
        return (*paper, *ours, "-", "-")
    return (*paper, *ours, f"{match.diff:+.2f}", f"{match.diff - match.paper_diff:+.2f}")


def _recipe(base: TrialConfig) -> list[str]:
    """Return what sets our recipe apart, a line each."""
    stages = {"gating": base.gating, "finetuning": base.finetuning}
    lines = []
    for name, theirs in RECIPES[TABLES[base.model.name]].items():
        stage, _, field = name.partition(".")
        ours = getattr(stages[stage], field) if field else base.data.name
        if ours != theirs:
            lines.append(f"recipe: {name} is {ours} here, {theirs} in the paper")
    return lines
