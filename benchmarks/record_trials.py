"""Record learning curves of real pruning trials on digits, which bench_search.py fits its surrogate to.

    python -m benchmarks.record_trials FOLDER [--num-trials 32] [--first 0]     runs what FOLDER does not hold yet
    python -m benchmarks.record_trials FOLDER --lineage 0.5 [...]               the same points, going on from one another
    python -m benchmarks.record_trials FOLDER [--lineage 0.5] --pack            FOLDER -> benchmarks/data/digits_curves.parquet

With --lineage a trial goes on from the nearest under less pressure (orchestrator/lineage.py) of those before it, and then trains
for that share of the epochs only; packed as digits_lineage_0.5.parquet, and compared with the others in results/lineage.md.

One process per call, without Ray; trial i has the i-th point of a scrambled Sobol sequence over SPACE. About a minute of
one core per trial. Latency is profile.clock "model", multiply-adds in other words: a curve has no noise of a clock.
"""

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.quasirandom import SobolEngine

from orchestrator.assignment import Assignment
from orchestrator.checkpoint import Checkpoint
from orchestrator.config import TrialConfig, with_values
from orchestrator.lineage import choose_parent, descend
from orchestrator.loop import Shard
from orchestrator.pareto import hypervolume
from orchestrator.paths import BasePaths, TrialPaths
from orchestrator.records import read_metrics
from orchestrator.worker import run_assignment

CURVES = Path(__file__).parent / "data" / "digits_curves.parquet"
SPACE = {  # dotted name -> (low, high); all on a logarithmic scale
    "gating.target_ratio": (0.05, 0.7),
    "gating.loss_weight": (1.0, 16.0),
    "gating.lr": (0.02, 0.4),
    "finetuning.lr": (0.002, 0.2),
}
BASE = TrialConfig.model_validate(
    {
        "model": {"name": "resnet14_cifar", "num_classes": 10, "kwargs": {"width": 8}},
        "data": {"name": "digits", "image_size": 32, "global_batch_size": 64},
        "pretraining": {"epochs": 5, "lr": 0.1},
        "gating": {"epochs": 6, "lr": 0.1, "init_keep_prob": 0.95, "target_ratio": 0.5},
        "finetuning": {"epochs": 6, "lr": 0.05},
        "evaluation": {"bn_batches": 1},
        "profile": {"clock": "model"},
    }
)
REFERENCE = (10.0, 1.0)
"""Guessing among ten digits, and the unpruned network's multiply-adds."""
COLUMNS = ("epoch", "stage", "top1", "latency_ms", "macs_ratio", "params", "final")


class OneProcess:
    """The session of a worker that is alone and starts from the beginning."""

    shard = Shard()

    def restore(self) -> Checkpoint | None:
        """Return None."""
        return None

    def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Does nothing: metrics.parquet is what is wanted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-trials", type=int, default=32)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--lineage", type=float, metavar="SHARE", help="of the epochs, for trials that go on from another"
    )
    parser.add_argument("--pack", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.pack:
        pack(arguments.folder, curves_file(arguments.lineage))
        if arguments.lineage is not None:
            (CURVES.parents[1] / "results" / "lineage.md").write_text(compared(arguments.lineage))
        return 0
    base = BasePaths(arguments.folder / "base")
    if not base.weights.exists():
        _run("base", BASE, base.root, None)
    for number in range(arguments.first, arguments.num_trials):
        folder = arguments.folder / f"trial_{number:04d}"
        if not (folder / "weights.safetensors").exists():
            config = with_values(BASE, values_of(number))
            if arguments.lineage is not None:
                config = _descended(config, arguments.folder, number, arguments.lineage)
            _run(folder.name, config, folder, base.weights)
            print(folder.name, read_metrics(folder / "metrics.parquet")[-1]["top1"], flush=True)
    return 0


def values_of(number: int) -> dict[str, float]:
    """Return the values of SPACE of the trial with this number."""
    point = SobolEngine(len(SPACE), scramble=True, seed=0).draw(number + 1)[number].tolist()
    return {
        name: math.exp(math.log(low) + share * math.log(high / low))
        for share, (name, (low, high)) in zip(point, SPACE.items(), strict=True)
    }


def curves_file(share: float | None = None) -> Path:
    """Return where the curves are packed to. share: --lineage."""
    return CURVES if share is None else CURVES.with_name(f"digits_lineage_{share:g}.parquet")


def _descended(config: TrialConfig, folder: Path, number: int, share: float) -> TrialConfig:
    """Return the config with the parent that a search would choose, and that share of the epochs if there is one."""
    earlier = {f"trial_{i:04d}": with_values(BASE, values_of(i)).gating for i in range(number)}
    parent = choose_parent(config.gating, earlier)
    config = with_values(config, {"pruning.keep_cut": True})
    return config if parent is None else descend(config, TrialPaths(folder / parent).cut.root, share)


def pack(folder: Path, curves: Path) -> None:
    """Write the curves of all finished trials in the folder into one Parquet file, a row per epoch."""
    rows = [
        {"trial": int(trial.name[-4:]), **values_of(int(trial.name[-4:])), **{name: row[name] for name in COLUMNS}}
        for trial in sorted(folder.glob("trial_*"))
        if (trial / "weights.safetensors").exists()
        for row in read_metrics(trial / "metrics.parquet")
    ]
    curves.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), curves)


def compared(share: float) -> str:
    """Return a page about the same trials without and with lineage, as far as both were packed. share: --lineage."""
    finals, spent = [], []
    for curves in (CURVES, curves_file(share)):
        rows = pq.read_table(curves).to_pylist()
        finals.append({row["trial"]: row for row in rows if row["final"]})
        spent.append(Counter(row["trial"] for row in rows if not row["final"]))
    numbers = sorted(finals[0].keys() & finals[1].keys())
    budget = sum(spent[1][number] for number in numbers)
    first = [
        number for place, number in enumerate(numbers, 1) if sum(spent[0][other] for other in numbers[:place]) <= budget
    ]
    from_unpruned, with_lineage = (
        "each from the unpruned network",
        f"with lineage, {share:g} of the epochs for a trial with a parent",
    )
    sums = [
        _sum(from_unpruned, finals[0], spent[0], numbers),
        _sum(f"{from_unpruned}, the first {len(first)} of them", finals[0], spent[0], first),
        _sum(with_lineage, finals[1], spent[1], numbers),
    ]
    trials = [
        [number, f"{values_of(number)['gating.target_ratio']:.3f}", *(text for final, epochs in zip(finals, spent, strict=True)
         for text in (f"{final[number]['macs_ratio']:.3f}", f"{final[number]['top1']:.1f}", epochs[number]))]
        for number in numbers
    ]  # fmt: skip
    return (
        f"# Trials that go on from one another\n\n`python -m benchmarks.record_trials FOLDER --lineage {share:g} --pack`: {len(numbers)} "
        "trials on digits (ResNet-14 of width 8), the same values in the same order, one after another, one seed; top1 in percent on val; "
        f"hypervolume of top1 against macs_ratio from {REFERENCE}. Those without lineage are the ones of "
        f"`data/{CURVES.name}`, recorded earlier the same day, by an earlier state of the code, from the same base network. A trial "
        "without a parent is the same in both but for that: trial 0 shows how large the noise is.\n\n"
        + _table(["trials", "epochs", "hypervolume", "mean top1"], sums)
        + "\n\n"
        + _table(
            ["trial", "target", "macs_ratio", "top1", "epochs", "with lineage: macs_ratio", "top1", "epochs"], trials
        )
        + "\n"
    )


def _sum(name: str, final: Mapping[int, Any], epochs: Mapping[int, int], numbers: Sequence[int]) -> list[str]:
    points = [(final[number]["top1"], final[number]["macs_ratio"]) for number in numbers]
    top1 = statistics.mean(point[0] for point in points)
    volume = hypervolume(points, ["max", "min"], REFERENCE)
    return [name, str(sum(epochs[number] for number in numbers)), f"{volume:.2f}", f"{top1:.1f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def _run(name: str, config: TrialConfig, folder: Path, base_weights: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    run_assignment(Assignment(name=name, config=config, folder=folder, base_weights=base_weights), OneProcess())


if __name__ == "__main__":
    sys.exit(main())
