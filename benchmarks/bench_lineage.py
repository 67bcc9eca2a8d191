"""What it saves to let trials go on from one another: the same front, from fewer epochs?

    python -m benchmarks.bench_lineage FOLDER [--seeds 3] [--seconds 200]     what is not in lineage.jsonl yet
    python -m benchmarks.bench_lineage --render                               -> benchmarks/results/lineage.md

Four trials on digits at falling targets, for each seed in three ways that take turns: each from the unpruned network, with
all of its epochs; the same with two thirds of them; and with lineage, where each but the first goes on from the one before as it was cut,
for half of the epochs. The last two spend about the same. The first trial of the first way and of lineage is one and the same.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.record_trials import DIGITS, REFERENCE, run_alone
from benchmarks.row_file import RESULTS, RowFile, source_hash
from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.pareto.front import hypervolume
from orchestrator.storage.paths import BasePaths, TrialPaths
from orchestrator.storage.records import read_metrics
from orchestrator.tuning.descend import descend

ROWS = RowFile(RESULTS / "lineage.jsonl")
TARGETS = (0.5, 0.3, 0.15, 0.07)
SHORT = {"gating.epochs": 4, "finetuning.epochs": 4}
LINEAGE_SHARE = 0.5
FULL, SHORTENED, LINEAGE = "full", "shortened", "lineage"
NAMES = {
    FULL: "each from the unpruned network",
    SHORTENED: "each from the unpruned network, two thirds of the epochs",
    LINEAGE: f"with lineage, {LINEAGE_SHARE:g} of the epochs from the second trial on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no result yet, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the networks lie")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=200, help="after which no further trial is begun")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.render:
        (RESULTS / "lineage.md").write_text(_page(ROWS.read()))
        return 0
    if arguments.folder is None:
        parser.error("FOLDER is missing, where the networks lie")
    torch.set_num_threads(1)
    base = BasePaths(arguments.folder / "base")
    if not base.weights.exists():
        run_alone("base", DIGITS, base.root, None)
    trials = {
        f"{way} {seed} {number}": (way, seed, number)
        for seed in range(arguments.seeds)
        for number in range(len(TARGETS))
        for way in ((FULL, SHORTENED) if number == 0 else (FULL, SHORTENED, LINEAGE))
    }
    source = source_hash(__file__)

    def measure(name: str) -> dict[str, Any]:
        way, seed, number = trials[name]
        folder = _folder(arguments.folder, way, seed, number)
        run_alone(folder.name, _config(arguments.folder, way, seed, number), folder, base.weights)
        rows = read_metrics(TrialPaths(folder).metrics)
        return {
            "model": name, "source": source, "target": TARGETS[number], "epochs": sum(not row["final"] for row in rows),
            "top1": rows[-1]["top1"], "macs_ratio": rows[-1]["macs_ratio"], "machine": machine(),
        }  # fmt: skip

    ROWS.fill(ROWS.missing(trials, source), arguments.seconds, measure, str)
    return 0


def _folder(root: Path, way: str, seed: int, number: int) -> Path:
    way = FULL if number == 0 and way == LINEAGE else way
    return root / f"{way}_{seed}_{number}"


def _config(root: Path, way: str, seed: int, number: int) -> TrialConfig:
    values = {"seed": seed, "gating.target_ratio": TARGETS[number]}
    config = with_values(DIGITS, values | (SHORT if way == SHORTENED else {}))
    if way != LINEAGE:
        return config
    return descend(config, TrialPaths(_folder(root, way, seed, number - 1)).cut.root, LINEAGE_SHARE)


def _page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    seeds = [seed for seed in range(100) if all(_rows(rows, way, seed) for way in NAMES)]
    sums = "\n".join(_line(NAMES[way], [_rows(rows, way, seed) for seed in seeds]) for way in NAMES)
    trials = "\n".join(
        f"| {target:g} | {' | '.join(_trial(rows, way, seeds, number) for way in NAMES)} |"
        for number, target in enumerate(TARGETS)
    )
    return (
        "# Trials that go on from one another\n\n"
        f"`python -m benchmarks.bench_lineage FOLDER --seeds {len(seeds)}`: four trials on digits (ResNet-14 of width 8) at falling "
        f"targets, the three ways in turns, n = {len(seeds)} seeds (of gates and data order; one base network). top1 in percent on the 359 "
        f"images of test; hypervolume of top1 against macs_ratio from {REFERENCE}; mean, and the smallest and the largest.\n\n"
        f"| trials | epochs | hypervolume | mean top1 |\n| --- | --- | --- | --- |\n{sums}\n\n"
        f"| target | top1: {' | top1: '.join(NAMES.values())} |\n| --- | --- | --- | --- |\n{trials}\n\n"
        f"{next(iter(rows.values()))['machine']}.\n"
    )


def _rows(rows: Mapping[str, Mapping[str, Any]], way: str, seed: int) -> list[Mapping[str, Any]]:
    """Return the rows of the four trials, none unless all are there."""
    names = [f"{FULL if way == LINEAGE and number == 0 else way} {seed} {number}" for number in range(len(TARGETS))]
    return [rows[name] for name in names] if all(name in rows for name in names) else []


def _line(name: str, by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    volumes = [
        hypervolume([(row["top1"], row["macs_ratio"]) for row in rows], ["max", "min"], REFERENCE) for rows in by_seed
    ]
    top1 = [statistics.mean(row["top1"] for row in rows) for rows in by_seed]
    return f"| {name} | {sum(row['epochs'] for row in by_seed[0])} | {_spread(volumes)} | {_spread(top1)} |"


def _trial(rows: Mapping[str, Mapping[str, Any]], way: str, seeds: Sequence[int], number: int) -> str:
    return _spread([_rows(rows, way, seed)[number]["top1"] for seed in seeds])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
