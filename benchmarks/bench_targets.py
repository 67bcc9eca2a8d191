"""Does a gating stage end at the target it was given? Digits and Fashion-MNIST, four targets, three seeds: 24 runs.

    apt-get install dataset-fashion-mnist
    python -m benchmarks.bench_targets digits:0.5:0               one run now: data set, target, seed
    python -m benchmarks.bench_targets digits:0.3:0:per_batch     with one mask for a whole batch
    python -m benchmarks.bench_targets --all --seconds 600        what the results file lacks; start none after ten minutes
    python -m benchmarks.bench_targets --render                   write the table, benchmarks/results/targets.md

The network is the CIFAR ResNet-20 of width 16 on images of 16 pixels, trained for a few epochs without gates and then under them.
A run holds when its MACs end within 1 % of the target, relative to the target. No run is left out or repeated.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gator
from benchmarks.machine import machine
from benchmarks.row_file import RESULTS, RowFile
from orchestrator.config.trial import (
    DataConfig,
    FinetuningConfig,
    GatingConfig,
    ModelConfig,
    Stage,
    StageConfig,
    TrialConfig,
)
from orchestrator.datasets import splits as datasets
from orchestrator.models import networks as models
from orchestrator.storage.paths import TrialPaths
from orchestrator.training.context import Context
from orchestrator.training.evaluation import evaluate, reestimate_batchnorm
from orchestrator.training.loop import GateSteps, Training
from orchestrator.training.ranks import Ranks
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.gating_stage import GatedSteps

ROWS = RowFile(RESULTS / "targets.jsonl")
TABLE = RESULTS / "targets.md"
TARGETS = (0.7, 0.5, 0.3, 0.15)
SEEDS = (0, 1, 2)
TOLERANCE = 0.01
MODEL = ModelConfig(name="resnet20_cifar", num_classes=10, kwargs={"width": 16})
DATA = {
    "digits": DataConfig(name="digits", image_size=16, global_batch_size=32),
    "fashion_mnist": DataConfig(name="fashion_mnist", image_size=16, global_batch_size=64, num_train=3000),
}
PRETRAINING = StageConfig(epochs=3, lr=0.05)
GATING = GatingConfig(epochs=6, lr=0.05, init_keep_prob=0.95, target_ratio=0.5)


def measure(name: str) -> dict[str, Any]:
    """Return the row of a run "data set:target:seed", or "data set:target:seed:per_batch"."""
    torch.set_num_threads(1)
    data, target, seed, sampling = f"{name}:per_sample".split(":")[:4]
    began = time.process_time()
    run = Run(DATA[data], float(target), int(seed), sampling)
    before = run.top1(run.train("pretrain", run.network))
    run.train("gate", run.gated, GatedSteps(run.gated, TrialCosts(run.config, run.gated.graph, Ranks().device)))
    architecture = run.gated.architecture()
    ratio = run.cost(architecture) / run.cost.full
    return {
        "model": name,
        "source": source(),
        "ratio": ratio,
        "holds": abs(ratio / run.target - 1) <= TOLERANCE,
        "smallest_channel": smallest_channel(run.cost, architecture),
        "top1_before": round(before, 2),
        "top1_pruned": round(run.top1(run.gated.prune()), 2),
        "cpu_s": round(time.process_time() - began),
    }


class Run:
    """A network, its data and its gates."""

    def __init__(self, data: DataConfig, target: float, seed: int, sampling: Any) -> None:
        torch.manual_seed(seed)
        self.target = target
        self.config = TrialConfig(
            model=MODEL,
            data=data,
            pretraining=PRETRAINING,
            gating=GATING.model_copy(update={"target_ratio": target}),
            finetuning=FinetuningConfig(epochs=0, lr=0.05),
            evaluation={"bn_batches": 4, "batch_size": 256},
            seed=seed,
        )
        self.splits = datasets.load(data, seed)
        self.context = Context(  # nothing is saved
            config=self.config, paths=TrialPaths(Path("nowhere")), splits=self.splits, ranks=Ranks(), saver=None
        )
        self.network = models.build(MODEL).to(memory_format=torch.channels_last)
        graph = gator.trace(self.network, torch.zeros(1, *self.splits.input_shape))
        self.cost = gator.MacsCost(graph)
        gate_config = gator.GateConfig(init_keep_prob=GATING.init_keep_prob, seed=seed, sampling=sampling)
        self.gated = gator.GatedModel(self.network, graph, gate_config)

    def train(self, stage: Stage, network: nn.Module, gates: GateSteps | None = None) -> nn.Module:
        """Train for all epochs of a stage."""
        training = Training(network, stage, self.context, gates=gates)
        for epoch in range(training.config.epochs):
            training.run_epoch(epoch)
        return network

    def top1(self, network: nn.Module) -> float:
        """Return the percentage of held-out images that the network gets right."""
        reestimate_batchnorm(network, self.context)
        return evaluate(network, self.splits.validation, self.config, Ranks())["top1"]


def smallest_channel(cost: gator.CostModel, architecture: gator.Architecture) -> float:
    """Return what the cheapest single channel that could still close takes, as a share of the architecture's cost."""
    now = cost(architecture)
    prices = []
    for group in cost.graph.groups:
        kept = architecture.keep[group.name]
        if len(kept) > 1 or (kept and group.block):
            keep = {**architecture.keep, group.name: kept[1:]}
            prices.append(now - cost(gator.Architecture.from_keep(cost.graph, keep)))
    return min(prices) / now


def source() -> str:
    """Hash of all settings. Not of the code: the runs outlive a change that leaves the numbers as they are."""
    configs = [MODEL, *DATA.values(), PRETRAINING, GATING]
    return hashlib.sha256(json.dumps([config.model_dump(mode="json") for config in configs]).encode()).hexdigest()[:12]


def render() -> None:
    """Write the table."""
    rows = ROWS.read()
    lines = [
        "# Does a gating stage end at its target?",
        "",
        f"`python -m benchmarks.bench_targets --all`, {machine('torch')}. {sum(row['holds'] for row in rows.values())} of "
        f"{len(rows)} runs end within 1 % of the target (relative). CIFAR ResNet-20, width 16, 16 px, {PRETRAINING.epochs} epochs "
        f"without and {GATING.epochs} with gates; top-1 on held-out images before gating, and of the network as cut, without "
        "fine-tuning. The smallest channel is what the cheapest one that could still close takes of what remains.",
        "",
        "| data | target | seed | masks | MACs | off by | within 1 % | smallest channel | top-1 before | as cut | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(rows, key=lambda name: (name.split(":")[0], -float(name.split(":")[1]), name)):
        row, (data, target, seed, sampling) = rows[name], f"{name}:per_sample".split(":")[:4]
        cells = [data.replace("_", "-"), target, seed, sampling.replace("_", " "), f"{row['ratio']:.4f}"]
        cells += [f"{row['ratio'] / float(target) - 1:+.2%}", "yes" if row["holds"] else "no"]
        cells += [f"{row['smallest_channel']:.2%}", row["top1_before"], row["top1_pruned"], row["cpu_s"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="DATA:TARGET:SEED[:per_batch]")
    parser.add_argument("--all", action="store_true", help="every run that the results file lacks")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    arguments = parser.parse_args(argv)
    runs = arguments.runs
    if arguments.all:
        runs = ROWS.missing([f"{d}:{t}:{s}" for s in SEEDS for t in TARGETS for d in DATA], source())
    ROWS.fill(
        runs, arguments.seconds, measure, lambda row: f"{row['model']}: {row['ratio']:.4f} in {row['cpu_s']} cpu s"
    )
    if arguments.render:
        render()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
