"""What the orchestration costs when there are many trials.

    python -m benchmarks.bench_scale decisions [--num-trials 5000] [--num-objectives 2] [--num-rungs 5]    the rule alone
    python -m benchmarks.bench_scale records [--num-trials 2000]     all that the search's process does, without Ray
    python -m benchmarks.bench_scale tune FOLDER [--minutes 4]       the whole path with Tune; the same command goes on
    python -m benchmarks.bench_scale render                          all of them -> benchmarks/results/scale.md

Rows are kept as JSON lines in benchmarks/results/scale.jsonl. What they mean for a large cluster: docs/scale.md.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from orchestrator.pareto.asha import ParetoASHA

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "scale.jsonl"
OBJECTIVES = [("top1", "max"), ("latency_ms", "min"), ("params", "min"), ("macs", "min")]
NUM_EPOCHS, GRACE_EPOCHS, REDUCTION_FACTOR = 243, 1, 3  # rungs after epochs 1, 3, 9, 27, 81
NUM_LAST = 1000
"""The decisions at the full size, which the table is about."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("decisions", "records", "tune", "render"))
    parser.add_argument("folder", nargs="?", type=Path, help="where the search of `tune` lies")
    parser.add_argument("--minutes", type=float, default=4.0, help="after which `tune` starts no further trial")
    parser.add_argument("--num-trials", type=int)
    parser.add_argument("--num-objectives", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--num-rungs", type=int, default=5, help="of `decisions`; they do not touch one another")
    arguments = parser.parse_args(argv)
    if arguments.part == "decisions":
        for kind in ("tradeoff", "independent"):
            _keep(decisions(kind, arguments.num_objectives, arguments.num_trials or 5000, arguments.num_rungs))
    elif arguments.part == "records":
        from benchmarks.scale_records import through_records  # late: the rule alone needs neither Ray nor MLflow

        for row in through_records(arguments.num_trials or 2000):
            _keep(row)
    elif arguments.part == "tune":
        from benchmarks.scale_tune import through_tune  # late, like the above

        if arguments.folder is None:
            parser.error("tune needs a FOLDER, where it finds what it has run before")
        _keep(through_tune(arguments.folder, arguments.num_trials or 2000, arguments.minutes))
    else:
        (RESULTS / "scale.md").write_text(render([json.loads(line) for line in ROWS.read_text().splitlines()]))
    return 0


def decisions(kind: str, num_objectives: int, num_trials: int, num_rungs: int) -> dict[str, Any]:
    """Let so many trials report at each rung, in turns, and time each decision.

    In a search a stopped trial reports at no further rung, so that the rungs hold a third each of the one before; here
    each rung has trials of its own and holds all of them.
    """
    draw = random.Random(0)
    rungs = [GRACE_EPOCHS * REDUCTION_FACTOR**k for k in range(num_rungs)]
    began = time.process_time()
    rule = _filled(kind, num_objectives, num_trials - NUM_LAST, rungs, draw)
    fill_s = time.process_time() - began
    seconds: list[float] = []
    for number in range(NUM_LAST):
        for epoch in rungs:
            metrics = _metrics(kind, draw)
            began = time.process_time()
            rule.report(f"{number}/{epoch}", epoch, metrics)
            seconds.append(time.process_time() - began)
    last_ms = 1000 * np.array(seconds)
    median, p99 = np.percentile(last_ms, (50, 99))
    return {
        "part": "decisions", "kind": kind, "num_objectives": num_objectives, "num_trials": num_trials, "num_rungs": num_rungs,
        "mean_ms": float(last_ms.mean()), "median_ms": float(median), "p99_ms": float(p99), "max_ms": float(last_ms.max()),
        "n": len(last_ms), "fill_s": fill_s, "machine": machine("numpy"),
    }  # fmt: skip


def _filled(kind: str, num_objectives: int, num_trials: int, rungs: Sequence[int], draw: random.Random) -> ParetoASHA:
    """Return a rule whose rungs hold so many trials each, restored from a state: the decisions on them are not made again."""

    def entry() -> dict[str, Any]:
        metrics = _metrics(kind, draw)
        losses = [-metrics[name] if mode == "max" else metrics[name] for name, mode in OBJECTIVES[:num_objectives]]
        return {"losses": losses, "excess": 0.0, "spread": [None, None], "architecture": None}

    rule = ParetoASHA(
        OBJECTIVES[:num_objectives], grace_epochs=GRACE_EPOCHS, reduction_factor=REDUCTION_FACTOR, max_epochs=NUM_EPOCHS
    )
    state = rule.state()  # of five rungs; those that are left out stay empty
    for epoch in rungs:
        state["rungs"][0][str(epoch)] = {f"earlier {number}/{epoch}": entry() for number in range(num_trials)}
    rule.restore(state)
    return rule


def _metrics(kind: str, draw: random.Random) -> dict[str, float]:
    """Return the metrics of a trial: four independent numbers, or what a size gives: all objectives but top1 agree."""
    names = [name for name, _ in OBJECTIVES]
    if kind == "independent":
        return {name: draw.random() for name in names}
    size = draw.random()
    top1 = 100 * (1 - 0.3 * (1 - size) ** 4) + draw.gauss(0, 1)
    return {"top1": top1, **{name: size * (1 + draw.gauss(0, 0.05)) for name in names[1:]}}


def _keep(row: dict[str, Any]) -> None:
    print(json.dumps(row))
    RESULTS.mkdir(exist_ok=True)
    with open(ROWS, "a") as file:
        file.write(json.dumps(row) + "\n")


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables."""
    decided = [row for row in rows if row["part"] == "decisions"]
    recorded = [row for row in rows if row["part"] == "records"]
    tuned = [row for row in rows if row["part"] == "tune"]
    parts = [
        "# What the orchestration costs when there are many trials",
        "## One decision of ParetoASHA",
        "`python -m benchmarks.bench_scale decisions --num-objectives 2` (3, 4), with `--num-trials` and `--num-rungs`. Each rung "
        "holds all trials and does not touch the others; CPU milliseconds per decision over the last n at that size; one run. On a "
        "machine with other work: the largest numbers may hold pauses of Python's garbage collector.",
        _table(
            ["objectives", "points", "rungs", "trials at each", "median ms", "mean ms", "p99 ms", "max ms", "n"],
            [
                [row["num_objectives"], row["kind"], row["num_rungs"], f"{row['num_trials']:,}", f"{row['median_ms']:.3f}",
                 f"{row['mean_ms']:.3f}", f"{row['p99_ms']:.2f}", f"{row['max_ms']:.1f}", f"{row['n']:,}"]
                for row in sorted(decided, key=lambda row: (row["num_objectives"], row["kind"], row["num_trials"]))
            ],
        ),
        "independent: each objective is a number of its own. tradeoff: accuracy rises with size, and the other objectives are "
        "size with 5 % noise, as in a pruning search.",
        "## What the search's own process does for a trial",
        "`python -m benchmarks.bench_scale records`: trials that end at once through the real searcher (random), scheduler, "
        "recorder, MLflow on SQLite and progress, called as Tune calls them; CPU milliseconds per trial; one run. Ray's own work "
        "is not in it.",
        _table(
            ["trials", "reports a trial", "suggest ms", "decide ms", "record ms", "memory MiB"],
            [
                [f"{row['first'] + 1:,} to {row['first'] + row['num']:,}", f"{row['reports']:.1f}", f"{row['suggest_ms']:.1f}",
                 f"{row['decide_ms']:.2f}", f"{row['record_ms']:.0f}", f"{row['memory_mib']:.0f}"]
                for row in recorded
            ],
        ),
        *(["## The whole path", _tuned_text(tuned)] if tuned else []),
        f"{decided[0]['machine']}; records: {recorded[0]['machine']}.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tuned_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return what was measured of trials through Tune."""
    num = sum(row["num"] for row in rows)
    seconds = sum(row["seconds_per_trial"] * row["num"] for row in rows)
    ours, process = (sum(row[name] * row["num"] for row in rows) / num for name in ("ours_ms", "process_ms"))
    table = _table(
        ["trials", "trials/s", "ours ms", "this process ms", "memory MiB", "Ray's processes MiB"],
        [
            [f"{row['first'] + 1:,} to {row['first'] + row['num']:,}", f"{1 / row['seconds_per_trial']:.2f}",
             f"{row['ours_ms']:.0f}", f"{row['process_ms']:.0f}", f"{row['memory_mib']:,.0f}", f"{row['ray_mib']:,.0f}"]
            for row in rows
        ],
    )  # fmt: skip
    return (
        "`python -m benchmarks.bench_scale tune FOLDER`, in pieces of minutes that go on with one search: Tune, a driver process for each "
        "trial, scheduler (ParetoASHA), searcher (random), results.parquet, MLflow on SQLite; trials report nine epochs and train nothing. "
        "Ours: CPU milliseconds per trial in what Tune calls of this project; this process: of the whole search process, Tune's share "
        f"included. The drivers import no torch; real ones do, which takes 1.5 CPU seconds more each. {num:,} trials were run, "
        f"four at once.\n\n{table}\n\n"
        f"Ours is {100 * ours / process:.0f} % of the search process's CPU time and {100 * ours / (1000 * seconds / num):.0f} % of the "
        f"wall time per trial."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    sys.exit(main())
