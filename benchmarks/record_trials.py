"""Record learning curves of real pruning trials, which bench_search.py fits its surrogates to.

    python -m benchmarks.record_trials FOLDER [--num-trials 32] [--first 0]     runs what FOLDER does not hold yet, on digits
    python -m benchmarks.record_trials FOLDER --data fashion_mnist [...]        on 5,000 images of Fashion-MNIST
    python -m benchmarks.record_trials FOLDER --lineage 0.5 [...]               the same points, going on from one another
    python -m benchmarks.record_trials FOLDER [the same options] --pack         FOLDER -> benchmarks/data/digits_curves.parquet

With --lineage a trial goes on from the nearest under less pressure (orchestrator/tuning/descend.py) of those before it, and then trains
for that share of the epochs only; packed as digits_lineage_0.5.parquet.

One process per call, without Ray; trial i has the i-th point of a scrambled Sobol sequence over SPACE. About a minute of
one core per trial. Latency is profile.clock "model", MACs in other words: a curve has no noise of a clock.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.quasirandom import SobolEngine

from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.storage.paths import BasePaths, TrialPaths
from orchestrator.storage.records import read_metrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.ranks import Ranks
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.worker import run_assignment
from orchestrator.tuning.descend import choose_parent, descend

CURVES = Path(__file__).parent / "data"
SPACE = {  # dotted name -> (low, high); all on a logarithmic scale
    "gating.target_ratio": (0.05, 0.7),
    "gating.loss_weight": (1.0, 16.0),
    "gating.lr": (0.02, 0.4),
    "finetuning.lr": (0.002, 0.2),
}
DIGITS = TrialConfig.model_validate(
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
BASES = {
    "digits": DIGITS,
    "fashion_mnist": with_values(
        DIGITS,
        {"data.name": "fashion_mnist", "data.image_size": 28, "data.global_batch_size": 128, "data.num_train": 5000},
    ),
}
REFERENCE = (10.0, 1.0)
"""Guessing among ten classes, and the unpruned network's MACs."""
COLUMNS = ("epoch", "stage", "top1", "latency_ms", "macs_ratio", "params", "final")


class OneProcess:
    """The session of a worker that is alone and starts from the beginning."""

    ranks = Ranks()
    is_restart = False

    def restore(self) -> Checkpoint | None:
        """Return None."""
        return None

    def leaving_nodes(self) -> tuple[str, ...]:
        """Return none."""
        return ()

    def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Does nothing: metrics.parquet is what is wanted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=BASES, default="digits")
    parser.add_argument("--num-trials", type=int, default=32)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--lineage", type=float, metavar="SHARE", help="of the epochs, for trials that go on from another"
    )
    parser.add_argument("--pack", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.pack:
        pack(arguments.folder, curves_file(arguments.data, arguments.lineage))
        return 0
    start, base = BASES[arguments.data], BasePaths(arguments.folder / "base")
    if not base.weights.exists():
        run_alone("base", start, base.root, None)
    for number in range(arguments.first, arguments.num_trials):
        folder = arguments.folder / f"trial_{number:04d}"
        if not (folder / "weights.safetensors").exists():
            config = with_values(start, values_of(number))
            if arguments.lineage is not None:
                config = _descended(config, arguments.folder, number, arguments.lineage)
            run_alone(folder.name, config, folder, base.weights)
            print(folder.name, read_metrics(folder / "metrics.parquet")[-1]["top1"], flush=True)
    return 0


def values_of(number: int) -> dict[str, float]:
    """Return the values of SPACE of the trial with this number."""
    point = SobolEngine(len(SPACE), scramble=True, seed=0).draw(number + 1)[number].tolist()
    return {
        name: math.exp(math.log(low) + share * math.log(high / low))
        for share, (name, (low, high)) in zip(point, SPACE.items(), strict=True)
    }


def curves_file(data: str, share: float | None = None) -> Path:
    """Return where the curves are packed to. share: --lineage."""
    return CURVES / f"{data}_{'curves' if share is None else f'lineage_{share:g}'}.parquet"


def _descended(config: TrialConfig, folder: Path, number: int, share: float) -> TrialConfig:
    """Return the config with the parent that a search would choose, and that share of the epochs if there is one."""
    earlier = {f"trial_{i:04d}": with_values(DIGITS, values_of(i)).gating for i in range(number)}
    parent = choose_parent(config.gating, earlier)
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


def run_alone(name: str, config: TrialConfig, folder: Path, base_weights: Path | None) -> None:
    """Run one trial in this process, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())
    assignment = Assignment.of(config, name=name, folder=folder, base_weights=base_weights, keeps_cut=True)
    run_assignment(assignment, OneProcess())


if __name__ == "__main__":
    sys.exit(main())
