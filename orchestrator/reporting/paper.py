"""A search beside the tables of Gator's paper (arXiv 2205.15404): `report RUN_DIR --against paper`.

Rows are matched by multiply-adds, not by loss weight: weights do not carry over from one implementation to another (the research
code draws two masks on a path, which doubles the task's gradient), shares of the multiply-adds do. The weight that led to a share
is printed beside it. Networks that the paper compares with, and its one published architecture, are the search's references.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.metrics import FINISHED, REFERENCE, latency_column
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import UserError
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import Row, read_metrics

RESULTS = Path(__file__).resolve().parents[2] / "search_spaces" / "paper" / "results.json"
TABLES = {"resnet50": "imagenet_resnet50", "resnet56_cifar": "cifar10_resnet56"}
"""Our model -> the paper's table of it."""
OWN_GROUPS = ("flops", "latency", "b8", "b32", "memory", "direct")
"""The paper's own rows; the others are networks that it compares with."""
REFERENCES = {
    "mobilenet_v2": "Mobilenet V2",
    "squeezenet1_0": "squeezenet 1_0",
    "squeezenet1_1": "squeezenet 1_1",
    "shufflenet_v2_x1_0": "Shufflenet v2 x1",
    "paper_latency_0.5": "GATOR latency 0.5",
}
"""Name of a reference in search_spaces/paper -> the paper's row of the same network."""
BATCH_SIZES = (8, 32)
"""At which the paper timed its networks."""
MAX_DISTANCE = 0.02
"""Of the unpruned multiply-adds: a trial further from a row is no match for it."""
PRESSURES = {
    "flops": "macs",
    "direct": "macs",
    "latency": "latency",
    "b8": "latency",
    "b32": "latency",
    "memory": "memory",
}
"""The paper's rows -> which part of our cost they press on."""
SHARED_RECIPE = {"gating.lr": 0.01, "gating.momentum": 0.9, "gating.weight_decay": 1e-4, "gating.magnitude_spread": 0.0,
                 "finetuning.distillation.weight": 0.0, "pruning.align": 1}  # fmt: skip
RECIPES: dict[str, dict[str, object]] = {
    "imagenet_resnet50": {
        **SHARED_RECIPE,
        "data.global_batch_size": 256,
        "gating.epochs": 30,
        "finetuning.lr": 1e-4,
        "finetuning.epochs": 40,
    },
    "cifar10_resnet56": {**SHARED_RECIPE, "data.name": "cifar10"},
}
"""What the paper trained with, as far as it says so, by the names of our config."""
UNSURE_NOTE = "?: probably too low; the paper's code stops counting at the first removed block of a stage."
PAPER_NOTES = {
    "imagenet_resnet50": (
        "The paper counts 3.86 G multiply-adds for ResNet-50, this project the 4.09 G that run: shares differ a little.",
    )
}


@dataclass(frozen=True)
class Match:
    """A row of the paper, and our trial nearest to it in multiply-adds."""

    method: str
    group: str
    """Which of the paper's series the row is of; a key of PRESSURES."""
    paper_top1: float
    paper_diff: float
    """Points against the paper's unpruned network."""
    paper_ratio: float
    """Multiply-adds over the unpruned network's."""
    is_ratio_sure: bool
    """False where the paper's code counted a network with removed blocks, whose multiply-adds it counts too low."""
    trial: Row | None
    """None: no finished trial lies within MAX_DISTANCE."""
    diff: float | None
    """Points of the trial against our unpruned network."""
    loss_weight: float | None
    """The weight of the cost that led there: the mean over the trial's gating epochs."""


def matches(outcome: Outcome, run: RunPaths) -> list[Match]:
    """Return the paper's rows for this model, each with the trial that lies nearest to it.

    Raises: UserError if the paper has no table for the model.
    """
    rows = _paper_rows(outcome.config.base)
    unpruned = next(row for row in rows if row["group"] == "original")
    ours = [row for row in outcome.trials if row["status"] == FINISHED]
    own = outcome.unpruned
    found = []
    for row in rows:
        if row["group"] not in OWN_GROUPS or row["top1"] is None or row["flops_reduction_percent"] is None:
            continue
        ratio = 1 - row["flops_reduction_percent"] / 100
        trial = _nearest(ours, ratio)
        diff = trial["top1"] - own["top1"] if trial is not None and own is not None else None
        weight = None if trial is None else _loss_weight(run, trial["trial_id"])
        found.append(
            Match(
                method=row["method"],
                group=row["group"],
                paper_top1=row["top1"],
                paper_diff=row["top1"] - unpruned["top1"],
                paper_ratio=ratio,
                is_ratio_sure="cost_suspect" not in row,
                trial=trial,
                diff=diff,
                loss_weight=weight,
            )
        )
    return sorted(found, key=lambda match: -match.paper_ratio)


def comparison_text(outcome: Outcome, run: RunPaths) -> str:
    """Return the tables for a person: paper, ours, difference, row by row; then what differs in the recipe.

    The rows that press on what this search presses on come first, then those that merely cost as much.
    """
    found = matches(outcome, run)
    same = [match for match in found if getattr(outcome.config.base.gating.cost, PRESSURES[match.group]) > 0]
    other = [match for match in found if match not in same]
    header = (
        "paper's row", "its MACs", "its top1", "its diff", "our trial", "our MACs", "weight", "our top1", "our diff", "ours - paper",
    )  # fmt: skip
    blank = ("",) * len(header)
    has_gap = bool(same and other)
    rows = [*map(_cells, same), *([blank] if has_gap else []), *map(_cells, other)]
    notes = [
        "MACs: multiply-adds as a share of the unpruned network's.",
        "diff: points against the unpruned network of the same side; ours - paper compares these, not the accuracies.",
        "weight: of the cost in the loss, mean over the gating epochs; the paper's is the number in its row's name.",
        *(
            ["below the gap: rows under another pressure than this search's, at equal multiply-adds."]
            if has_gap
            else []
        ),
        *([] if all(match.is_ratio_sure for match in found) else [UNSURE_NOTE]),
        *PAPER_NOTES.get(TABLES[outcome.config.base.model.name], ()),
        *_recipe(outcome),
    ]
    return "\n".join([*_aligned([header, *rows]), "", *_references_table(outcome), *notes])


def _references_table(outcome: Outcome) -> list[str]:
    """Return the table of the networks that were not trained, and a blank line; nothing if the search has none."""
    theirs = {row["method"]: row for row in _paper_rows(outcome.config.base)}
    unpruned = next(row for row in theirs.values() if row["group"] == "original")
    speedups = tuple(f"speedup b{size}" for size in BATCH_SIZES)
    lines = [("network", "paper's top1", *speedups, "our top1", *speedups)]
    for row in outcome.rows:
        if row["kind"] == REFERENCE and REFERENCES.get(row["trial_id"]) in theirs:
            paper = theirs[REFERENCES[row["trial_id"]]]
            their_speedups = (_speedup(unpruned, paper, f"ms_batch_{size}") for size in BATCH_SIZES)
            own_speedups = (_speedup(outcome.unpruned, row, _latency_column(outcome, size)) for size in BATCH_SIZES)
            top1 = "not trained" if row["top1"] is None else f"{row['top1']:.2f}"
            lines.append((row["trial_id"], f"{paper['top1']:.2f}", *their_speedups, top1, *own_speedups))
    return [*_aligned(lines), ""] if len(lines) > 1 else []


def _latency_column(outcome: Outcome, batch_size: int) -> str:
    return "latency_ms" if outcome.config.base.profile.batch_sizes[0] == batch_size else latency_column(batch_size)


def _speedup(unpruned: Row | None, row: Row, column: str) -> str:
    if unpruned is None or unpruned.get(column) is None or row.get(column) is None:
        return "-"
    return f"{unpruned[column] / row[column]:.2f}x"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _loss_weight(run: RunPaths, trial_id: str) -> float | None:
    path = run.trial(trial_id).metrics
    rows = read_metrics(path) if path.is_file() else []
    weights = [row["loss_weight"] for row in rows if row["stage"] == "gate" and not row["final"]]
    return sum(weights) / len(weights) if weights else None


def _paper_rows(base: TrialConfig) -> list[dict[str, Any]]:
    if base.model.name not in TABLES:
        raise UserError(f"--against paper: the paper has no table for {base.model.name}; it has {', '.join(TABLES)}")
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))[TABLES[base.model.name]]
    return rows


def _nearest(rows: Sequence[Row], ratio: float) -> Row | None:
    nearest = min(rows, key=lambda row: abs(row["macs_ratio"] - ratio), default=None)
    return nearest if nearest is not None and abs(nearest["macs_ratio"] - ratio) <= MAX_DISTANCE else None


def _cells(match: Match) -> tuple[str, ...]:
    ratio = f"{match.paper_ratio:.3f}{'' if match.is_ratio_sure else '?'}"
    paper = (match.method, ratio, f"{match.paper_top1:.2f}", f"{match.paper_diff:+.2f}")
    if match.trial is None:
        return (*paper, "none near it", "-", "-", "-", "-", "-")
    weight = "-" if match.loss_weight is None else f"{match.loss_weight:.3g}"
    ours = (match.trial["trial_id"], f"{match.trial['macs_ratio']:.3f}", weight, f"{match.trial['top1']:.2f}")
    if match.diff is None:
        return (*paper, *ours, "-", "-")
    return (*paper, *ours, f"{match.diff:+.2f}", f"{match.diff - match.paper_diff:+.2f}")


def _recipe(outcome: Outcome) -> list[str]:
    """Return what sets our recipe apart, a line each."""
    base = outcome.config.base
    differing = [
        f"recipe: {name} is {_shown(ours)} here, {_shown(theirs)} in the paper"
        for name, theirs in RECIPES[TABLES[base.model.name]].items()
        if (ours := functools.reduce(getattr, name.split("."), base)) != theirs
    ]
    if outcome.config.search.descend == "chain":
        return differing
    return [
        *differing,
        'recipe: each trial starts from the unpruned network here; in the paper that holds for rows named "direct" alone',
    ]


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
