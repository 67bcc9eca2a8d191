"""The paper's chain of pruned networks on Fashion-MNIST: accuracy against MACs, beside uniform and random.

    make reproduce-fashion-mnist                                              the cells that the results file lacks, table and picture
    python -m benchmarks.reproduce_fashion_mnist chain:0.3:0                  one cell now: method, share of the MACs, seed
    python -m benchmarks.reproduce_fashion_mnist --all --seconds 600          start no cell after ten minutes; the same command goes on
    python -m benchmarks.reproduce_fashion_mnist --render                     table and picture alone

Needs `apt-get install dataset-fashion-mnist`. The network is a CIFAR ResNet-20 of width 8, trained for 8 epochs on 21,600 images.

    chain     gates press to 0.5 of the MACs, the network is cut and goes on from there to 0.3, and on to 0.15, two epochs
              each, gates kept; every link is then fine-tuned without gates for 6 epochs. What the paper does, by share, not by weight
    uniform, random    cut at once to what the link has come to, and fine-tuned for as many epochs as the link was trained in all:
              8, 10, 12

What cells share (the unpruned network, the links before fine-tuning) is made once, under runs/. Top-1 is that of the 10,000 test
images after the last epoch; no epoch is chosen.
"""

import copy
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import gator
from benchmarks.cells import Cells, top1_text
from benchmarks.lab import Lab, count_macs
from benchmarks.machine import machine
from benchmarks.row_file import PROJECT, RESULTS, RowFile, digest
from gator.pruning.baselines import baseline
from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.models import networks as models
from orchestrator.models import start_from as chain
from orchestrator.planning.space import load_space
from orchestrator.storage.paths import TrialPaths
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.gating_stage import GatedSteps

ROWS = RowFile(RESULTS / "fashion_mnist_chain.jsonl")
TABLE = RESULTS / "fashion_mnist_chain.md"
PICTURE = PROJECT / "docs" / "images" / "fashion_mnist_chain.png"
CACHE = PROJECT / "runs" / "fashion_mnist_chain"
RATIOS = (0.5, 0.3, 0.15)
"""The links of the chain, shares of the unpruned network's MACs; each goes on from the one before it."""
METHODS = {"chain": "gates, the paper's chain", "uniform": "uniform widths", "random": "random channels"}
SETTINGS = (
    "base.data.num_train=24000",
    "base.gating.epochs=2",
    "base.finetuning.epochs=6",
    "base.finetuning.lr=0.05",
    "base.finetuning.distillation.weight=0",
)
"""What sets a cell apart from search_spaces/fashion_mnist.yaml: so few images and epochs that it takes minutes of one core."""
COLORS = {"chain": "#c2410c", "uniform": "#5b7fa6", "random": "#7c3aed"}
TEST_IMAGES = 10_000


def measure(name: str) -> dict[str, Any]:
    """Return the row of a cell "method:ratio:seed"."""
    method, ratio_text, seed = name.split(":")
    torch.set_num_threads(1)
    began = time.process_time()
    lab, ratio = Lab(make_config(int(seed))), float(ratio_text)
    network = _chain(lab, ratio) if method == "chain" else _plain(method, lab, ratio)
    return {
        "model": name,
        "source": source(method),
        "method": method,
        "ratio": ratio,
        "seed": int(seed),
        "top1": round(lab.top1(network), 2),
        "unpruned_top1": round(lab.top1(lab.base), 2),
        "macs": count_macs(network, lab.splits.input_shape),
        "unpruned_macs": round(lab.macs.full),
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "epochs": num_epochs(lab.config, ratio),
        "cpu_s": round(time.process_time() - began),
        "torch": torch.__version__,
        "day": date.today().isoformat(),
    }


def make_config(seed: int) -> TrialConfig:
    """Return the search space's config with this reproduction's settings."""
    return load_space("fashion_mnist", [*SETTINGS, f"base.seed={seed}"]).base


def num_epochs(config: TrialConfig, ratio: float) -> int:
    """Return the epochs after the unpruned network: those of all links up to this one, and the fine-tuning."""
    return (RATIOS.index(ratio) + 1) * config.gating.epochs + config.finetuning.epochs


def source(method: str) -> str:
    """Hash of the settings that a method's cells depend on.

    Not of the code: an hour of cells outlives a change that leaves the numbers as they are.
    """
    config = make_config(0)
    # Without defaults, so that a new field of the config leaves the hash as it is.
    shared = config.model_dump(mode="json", exclude={"gating": True, "finetuning": {"epochs"}}, exclude_defaults=True)
    own = config.gating.model_dump(mode="json", exclude_defaults=True) if method == "chain" else "plain"
    return digest([shared, own, [num_epochs(config, ratio) for ratio in RATIOS]])


def _chain(lab: Lab, ratio: float) -> nn.Module:
    folder = _link(lab, RATIOS.index(ratio))
    pruned = gator.load_pruned(folder, build=lambda: models.build(lab.config.model))
    return lab.finetune(pruned, lab.config.finetuning.epochs)


def _plain(method: Any, lab: Lab, ratio: float) -> nn.Module:
    architecture = baseline(method, lab.base, lab.macs, ratio, seed=lab.config.seed)
    return lab.finetune(gator.prune(lab.base, lab.graph, architecture), num_epochs(lab.config, ratio))


def _link(lab: Lab, position: int) -> Path:
    """Return the folder of a link of the chain, cut and not fine-tuned; trains it, and those before it, unless it is there."""
    paths = TrialPaths(CACHE / f"{RATIOS[position]}-{source('chain')}-{lab.config.seed}")
    if paths.weights.is_file():
        return paths.root
    network, gating = copy.deepcopy(lab.base), lab.config.gating
    gate_config = gator.GateConfig(
        init_keep_prob=gating.init_keep_prob,
        magnitude_spread=gating.magnitude_spread,
        curvature=gating.curvature,
        seed=lab.config.seed,
    )
    gated = gator.GatedModel(network, lab.graph, gate_config)
    if position > 0:
        chain.start(gated, network, lab.config.model, TrialPaths(_link(lab, position - 1)))
    config = with_values(lab.config, {"gating.target_ratio": RATIOS[position]})
    lab.train(gated, "gate", config, gates=GatedSteps(gated, TrialCosts(config, lab.graph, torch.device("cpu"))))
    paths.root.mkdir(parents=True, exist_ok=True)
    architecture = gated.architecture()
    chain.save_gates(gated, paths)
    gator.save_pruned(gator.prune(network, lab.graph, architecture), architecture, paths.root)
    return paths.root


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown page."""
    config = make_config(0)
    num_images = round((config.data.num_train or 60_000) * (1 - config.data.validation_share))
    page = [
        "# The paper's chain on Fashion-MNIST",
        "",
        "Written by `make reproduce-fashion-mnist`; what is compared stands in "
        "[reproduce_fashion_mnist.py](../reproduce_fashion_mnist.py).",
        "",
        f"CIFAR ResNet-20 of width 8, {num_images:,} training images of 28 px, {config.pretraining.epochs} epochs for the unpruned "
        f"network; top-1 on the {TEST_IMAGES:,} test images, in float32. {machine('torch')}.",
        "",
        "![Accuracy against MACs](../../docs/images/fashion_mnist_chain.png)",
        "",
        f"Noise: the standard error of one top-1 on {TEST_IMAGES:,} images is {_standard_error(rows):.2f} points, that of the "
        f"difference of two networks at most {2**0.5 * _standard_error(rows):.2f}; what another seed changes comes on top of it.",
        "",
        "| share | method | top-1 | against the unpruned | MACs | parameters | epochs | CPU s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ratio in RATIOS:
        for method in METHODS:
            found = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
            page += [_line(found)] if found else []
    present = {(row["method"], row["ratio"]) for row in rows}
    missing = [f"{method} at {ratio:g}" for ratio in RATIOS for method in METHODS if (method, ratio) not in present]
    if missing:
        page += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(page) + "\n"


def _standard_error(rows: Sequence[dict[str, Any]]) -> float:
    share = statistics.mean(row["top1"] for row in rows) / 100
    return 100 * float((share * (1 - share) / TEST_IMAGES) ** 0.5)


def _line(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table's line of one method at one share, over its seeds."""
    texts = [
        f"{rows[0]['ratio']:g}",
        METHODS[rows[0]["method"]],
        top1_text(rows),
        f"{statistics.mean(row['top1'] - row['unpruned_top1'] for row in rows):+.2f}",
        f"{statistics.mean(row['macs'] / row['unpruned_macs'] for row in rows):.3f}",
        f"{statistics.mean(row['params'] for row in rows):,.0f}",
        f"{rows[0]['epochs']}",
        f"{statistics.mean(row['cpu_s'] for row in rows):.0f}",
    ]
    return f"| {' | '.join(texts)} |"


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Return the curve: top-1 against the share of the MACs, a line for each method, mean over the seeds."""
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    unpruned = statistics.mean(row["unpruned_top1"] for row in rows)
    axis.scatter([1.0], [unpruned], s=50, marker="D", color="#1f2937", label="unpruned network", zorder=3)
    for method, label in METHODS.items():
        points = [[row for row in rows if (row["method"], row["ratio"]) == (method, ratio)] for ratio in RATIOS]
        points = [found for found in points if found]
        axis.errorbar(
            [statistics.mean(row["macs"] / row["unpruned_macs"] for row in found) for found in points],
            [statistics.mean(row["top1"] for row in found) for found in points],
            yerr=_standard_error(rows),
            marker="o",
            markersize=5,
            capsize=3,
            linewidth=1.3,
            color=COLORS[method],
            label=label,
        )
    axis.set(xlabel="MACs, share of the unpruned network", ylabel="top-1 on Fashion-MNIST (%)", xlim=(0, 1.05))
    axis.grid(color="#e5e7eb", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure


def render() -> None:
    """Write the table and the picture."""
    rows = cells().present()
    TABLE.write_text(table_text(rows))
    picture(rows).savefig(PICTURE)


def cells() -> Cells:
    """Return the cells of the reproduction."""
    return Cells(
        rows=ROWS,
        names=lambda seeds: [f"{m}:{ratio}:{seed}" for seed in range(seeds) for ratio in RATIOS for m in METHODS],
        source=lambda name: source(name.split(":")[0]),
        measure=measure,
        line=lambda row: f"{row['model']}: top1 {row['top1']}, {row['cpu_s']} CPU s",
        render=render,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the reproduction's command line."""
    cells().main(argv, __doc__)


if __name__ == "__main__":
    main()
