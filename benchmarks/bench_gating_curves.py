"""How does a gating stage towards half of the MACs go? Top-1 of the network as pruned after each epoch of the stage.

    apt-get install dataset-fashion-mnist
    python -m benchmarks.bench_gating_curves --all --seconds 600     what the results file lacks, by today's control
    python -m benchmarks.bench_gating_curves digits:today:0          one curve now: data set, label, seed
    python -m benchmarks.bench_gating_curves --render                draw docs/images/gating_*.png

The gating stages are those of the default search spaces, without gating.loss_weight; Fashion-MNIST has 21,600 images of 14 px.
BatchNorm's statistics are re-estimated before each top-1, which is of held-out images. The rows with the label "before" were made by
the same commands at commit 9f44a71 with gator/gating/loss.py of f863f70~1, which had no line of the cost, and today's search spaces.
"""

import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.cells import Cells
from benchmarks.lab import Lab
from benchmarks.row_file import PROJECT, RESULTS, RowFile, digest
from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.planning.space import load_space
from orchestrator.training.loop import Training

ROWS = RowFile(RESULTS / "gating_curves.jsonl")
PICTURES = PROJECT / "docs" / "images"
SPACES = {"digits": (), "fashion_mnist": ("base.data.image_size=14", "base.data.num_train=24000")}
"""Search space -> what is changed in it."""
TARGET_RATIO, NUM_SEEDS = 0.5, 3
COLORS = {"before": "#5b7fa6", "today": "#c2410c"}


def make_config(space: str, seed: int) -> TrialConfig:
    """Return the config of a curve."""
    config = load_space(space, [*SPACES[space], f"base.seed={seed}"]).base
    return with_values(config, {"gating.target_ratio": TARGET_RATIO})


def curve(config: TrialConfig) -> tuple[float, list[tuple[float, float]]]:
    """Return the top-1 of the unpruned network, and after each epoch the share of the MACs and the top-1 as pruned."""
    lab = Lab(config)
    gated, steps = lab.gated(config)
    training = Training(gated, "gate", lab.context(config), gates=steps)
    points = []
    for epoch in range(config.gating.epochs):
        training.run_epoch(epoch)
        share = lab.macs(gated.architecture()) / lab.macs.full
        points.append((round(share, 4), round(lab.top1(gated.prune(), lab.splits.validation), 2)))
    return round(lab.top1(lab.base, lab.splits.validation), 2), points


def measure(name: str) -> dict[str, Any]:
    """Return the row of a curve."""
    torch.set_num_threads(1)
    space, label, seed = name.split(":")
    unpruned, points = curve(make_config(space, int(seed)))
    return {
        "model": name,
        "source": source(space),
        "space": space,
        "label": label,
        "unpruned": unpruned,
        "points": points,
    }


def source(space: str) -> str:
    """Hash of the settings of a space's curves."""
    return digest(make_config(space, 0).model_dump(mode="json", exclude_defaults=True, exclude={"finetuning"}))


def render() -> None:
    """Draw a picture for each data set that has curves: top-1 against that of the unpruned network, mean over the seeds."""
    for space in SPACES:
        if not any(row["space"] == space for row in CELLS.present()):
            continue
        figure = Figure(figsize=(7, 3.4), dpi=130, layout="constrained")
        axis, shares = figure.subplots(1, 2)
        for label, color in COLORS.items():
            rows = [row for row in CELLS.present() if (row["space"], row["label"]) == (space, label)]
            if not rows:
                continue
            epochs = range(1, len(rows[0]["points"]) + 1)
            lost = [statistics.mean(row["points"][e - 1][1] - row["unpruned"] for row in rows) for e in epochs]
            left = [statistics.mean(row["points"][e - 1][0] for row in rows) for e in epochs]
            axis.plot(epochs, lost, marker="o", markersize=4, color=color, label=f"{label} (n = {len(rows)})")
            shares.plot(epochs, left, marker="o", markersize=4, color=color)
        axis.axhline(-3, color="#9ca3af", linewidth=0.8, linestyle="--")
        axis.set(xlabel="epoch of the gating stage", ylabel="top-1 as pruned, less unpruned (points)")
        shares.set(xlabel="epoch of the gating stage", ylabel="share of the MACs", ylim=(0, 1.05))
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(PICTURES / f"gating_{space}.png")


CELLS = Cells(
    rows=ROWS,
    names=lambda seeds: [f"{space}:today:{seed}" for space in SPACES for seed in range(seeds)],
    source=lambda name: source(name.split(":")[0]),
    measure=measure,
    line=lambda row: f"{row['model']}: unpruned {row['unpruned']}, {row['points']}",
    render=render,
    metavar="SPACE:LABEL:SEED",
    num_seeds=NUM_SEEDS,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    CELLS.main(argv, __doc__)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
