"""Does the gates' gradient rank channels by what closing them costs? At a trained network, next to scores that need no gates.

    apt-get install dataset-fashion-mnist
    python -m benchmarks.bench_gate_gradient resnet20          one network now
    python -m benchmarks.bench_gate_gradient --render          write the table, benchmarks/results/gate_gradient.md

Truth is measured: each channel is closed alone, and the mean loss of NUM_TRUTH training images compared with that of the whole
network, batch normalisation by the statistics of these images on both sides. The scores see other training images, NUM_BATCHES of
them, without the pressure. A score is good when its order is that of the truth: Spearman's rank correlation over all channels, and
the mean of the correlations within each group. Nothing is chosen here; test images are not read.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gator
from benchmarks.lab import Lab
from benchmarks.machine import machine
from benchmarks.row_file import RESULTS, RowFile, digest
from gator.pruning.baselines import relative_magnitudes
from orchestrator.datasets.loading import load_batches
from orchestrator.planning.space import load_space

ROWS = RowFile(RESULTS / "gate_gradient.jsonl")
TABLE = RESULTS / "gate_gradient.md"
NUM_TRUTH, NUM_BATCHES, BATCH = 1024, 30, 128
OPEN_LOGIT = 50.0
"""Noise lies within 17.4: such a gate is open in every draw."""
NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "resnet20": ("fashion_mnist", ("base.data.image_size=14", "base.data.num_train=24000")),
    "plain": (
        "fashion_mnist",
        (
            *("base.data.image_size=14", "base.data.num_train=24000"),
            "base.model={name: 'benchmarks.bench_gate_gradient:plain_network', num_classes: 10}",
        ),
    ),
    "digits": ("digits", ()),
}
"""Name -> search space and what is changed in it."""


def plain_network(num_classes: int) -> nn.Module:
    """Return six convolutions without a residual stream, for small images."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


@dataclass(frozen=True)
class Bench:
    """One trained network and the images that truth and scores are taken on."""

    lab: Lab

    @property
    def graph(self) -> gator.ChannelGraph:
        """Return the channel groups."""
        return self.lab.graph

    def gated(self, curvature: float = 0.0) -> gator.GatedModel:
        """Return a copy of the network under new gates, in training mode; its statistics may change, the network's do not."""
        config = gator.GateConfig(curvature=curvature, seed=self.lab.config.seed)
        return gator.GatedModel(copy.deepcopy(self.lab.base), self.graph, config).train()

    def batches(self, first: int, count: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return batches of training images: `count` from batch number `first` of a fixed order."""
        data = self.lab.splits.train
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(12345)).tolist()
        whole = [order[begin : begin + BATCH] for begin in range(0, len(order) - BATCH + 1, BATCH)]
        parts = [whole[number % len(whole)] for number in range(first, first + count)]
        return list(load_batches(data, parts, device=torch.device("cpu"), num_loader_workers=0))

    @torch.no_grad()
    def truth(self) -> Tensor:
        """Return (C,) float64: how much the mean loss rises when a channel is closed alone."""
        gated = self.gated()
        gates = gated.gates
        gates.logits_C.fill_(OPEN_LOGIT)
        images, labels = (torch.cat(parts) for parts in zip(*self.batches(0, NUM_TRUTH // BATCH), strict=True))
        whole = cross_entropy(gated(images).double(), labels)
        rises = torch.zeros(self.graph.num_channels, dtype=torch.float64)
        for channel in range(self.graph.num_channels):
            gates.keep_C[channel] = False
            rises[channel] = cross_entropy(gated(images).double(), labels) - whole
            gates.keep_C[channel] = True
        return rises

    def gate_score(self, curvature: float) -> Tensor:
        """Return (C,): minus the mean gradient of the logits of new gates; a channel stays when it is large."""
        gated = self.gated(curvature)
        return -self._mean_gradient(gated)

    def taylor_score(self) -> Tensor:
        """Return (C,): the absolute mean gradient of the mask with everything open: first-order Taylor."""
        gated = self.gated()
        gradients: list[Tensor] = []
        with torch.no_grad():
            gated.gates.logits_C.fill_(OPEN_LOGIT)
        for images, labels in self.batches(NUM_TRUTH // BATCH, NUM_BATCHES):
            loss = cross_entropy(gated(images), labels)
            gradients.append(torch.autograd.grad(loss, gated.mask_NC)[0].sum(0))
        return torch.stack(gradients).mean(0).abs()

    def cost_score(self) -> Tensor:
        """Return (C,): W of each channel's group, the share of the MACs that one channel costs."""
        weight_G = self.lab.macs.relative_gradient(self.gated().kept_widths())
        return weight_G[self.graph.group_of_channel()]

    def _mean_gradient(self, gated: gator.GatedModel) -> Tensor:
        for images, labels in self.batches(NUM_TRUTH // BATCH, NUM_BATCHES):
            cross_entropy(gated(images), labels).backward()
        gradient = gated.gates.logits_C.grad
        assert gradient is not None
        return gradient / NUM_BATCHES


SCORES: dict[str, Callable[[Bench], Tensor]] = {
    "gates, the paper's gradient": lambda bench: bench.gate_score(0.0),
    "gates, second order (K = 1)": lambda bench: bench.gate_score(1.0),
    "first-order Taylor": Bench.taylor_score,
    "magnitude": lambda bench: relative_magnitudes(bench.lab.base, bench.graph),
    "cost W alone": Bench.cost_score,
}


@dataclass(frozen=True)
class Row:
    """What one network gave."""

    model: str
    source: str
    num_channels: int
    unpruned_loss_rise: float
    """Median of the truth."""
    correlations: dict[str, tuple[float, float]]
    """Score -> rank correlation with the truth over all channels, and the mean of those within groups."""
    seconds: float


def measure(name: str) -> dict[str, Any]:
    """Return the row of a network."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    bench = Bench(Lab(load_space(NETWORKS[name][0], list(NETWORKS[name][1])).base))
    bench.lab.base  # noqa: B018  # trained here, or read from the cache
    truth = bench.truth()
    correlations = {score: _correlations(bench.graph, make(bench).double(), truth) for score, make in SCORES.items()}
    row = Row(name, source(), len(truth), float(truth.median()), correlations, round(time.perf_counter() - began, 1))
    return asdict(row)


def _correlations(graph: gator.ChannelGraph, score: Tensor, truth: Tensor) -> tuple[float, float]:
    sizes = [group.num_channels for group in graph.groups]
    groups = zip(score.split(sizes), truth.split(sizes), strict=True)
    within = [_rank_correlation(*pair) for pair in groups]
    return round(_rank_correlation(score, truth), 3), round(sum(within) / len(within), 3)


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation; 0 for a score that tells nothing apart."""
    return 0.0 if bool((one == one[0]).all()) else float(spearmanr(one.numpy(), other.numpy()).statistic)


def source() -> str:
    """Hash of what the rows depend on."""
    return digest([NETWORKS, NUM_TRUTH, NUM_BATCHES, BATCH, list(SCORES)])


def table_text() -> str:
    """Return the results as a Markdown page."""
    rows = [row for row in ROWS.read().values() if row["source"] == source()]
    heads = (f"{row['model']} ({row['num_channels']} channels)" for row in rows)
    page = [
        "# Rank correlation of channel scores with the measured rise of the loss",
        "",
        "Written by `python -m benchmarks.bench_gate_gradient --render`; [bench_gate_gradient.py](../bench_gate_gradient.py) says how.",
        "",
        f"{NUM_BATCHES} batches of {BATCH} training images for the scores, {NUM_TRUTH:,} other ones for the truth; one trained network "
        f"each (n = 1). All channels / mean within groups. {machine('torch')}.",
        "",
        f"| score | {' | '.join(heads)} |",
        f"| --- | {' | '.join('---:' for _ in rows)} |",
    ]
    for score in SCORES:
        cells = (" / ".join(f"{value:.2f}" for value in row["correlations"][score]) for row in rows)
        page.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(page) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], metavar="NETWORK")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    arguments = parser.parse_args(argv)
    ROWS.fill(arguments.networks, float("inf"), measure, json.dumps)
    if arguments.render:
        TABLE.write_text(table_text())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
