"""Top-1 on Fashion-MNIST at equal MACs and epochs: learned gates, Torch-Pruning, Group Fisher and three plain choices.

    pip install '.[bench]'; apt-get install dataset-fashion-mnist
    python -m benchmarks.bench_accuracy --forecast                 how long the cells that the results file lacks will take
    python -m benchmarks.bench_accuracy --all --seconds 3600       run them, the most telling first; start none after an hour
    python -m benchmarks.bench_accuracy ours:0.3:0:short           one cell now: method, share of the MACs, seed, setting
    python -m benchmarks.bench_accuracy --render                   write the table, benchmarks/results/accuracy.md

Several processes may run --all at once. SETTINGS has networks, image sizes and epochs. All cells of a seed start from one network,
which no other seed shares, and train it for as many epochs:

    ours             the default gates under a target, cut, fine-tuned
    paper            the same with the paper's gradient (curvature 0)
    group_fisher     Group Fisher without gates, closing while it trains, fine-tuned
    tp_taylor, tp_hessian    Torch-Pruning's scores, cutting in ten bursts while it trains, fine-tuned
    tp_group_norm    Torch-Pruning's regulariser while it trains, cut by group norms, fine-tuned
    magnitude, uniform, random    cut at once by gator.pruning.baselines, fine-tuned for all epochs

A tenth of the training images is held out. They choose each method's learning rate, regulariser and scope, from GRID, at TUNING's
share, on a seed that no other cell has, and the best method next to gates. Test images are looked at once, after the last epoch.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

import gator
from benchmarks import rivals
from benchmarks.cells import Cells, top1_text
from benchmarks.lab import Lab, count_macs
from benchmarks.machine import machine
from benchmarks.row_file import RESULTS, RowFile, digest
from gator.pruning.baselines import BaselineKind, baseline
from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.planning.space import load_space

ROWS = RowFile(RESULTS / "accuracy.jsonl")
TABLE = RESULTS / "accuracy.md"
FIRST = ("ours", "paper", "magnitude", "group_fisher", "tp_taylor")
"""The methods that are run first."""
METHODS = (*FIRST, "tp_group_norm", "tp_hessian", "uniform", "random")
ONE_SHOT = ("magnitude", "uniform", "random")
PLAIN = ("base.model={name: 'benchmarks.bench_gate_gradient:plain_network', num_classes: 10}",)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What cells are run on."""

    name: str
    ratios: tuple[float, ...]
    num_seeds: int
    gating_epochs: int = 2
    finetuning_epochs: int = 6
    image_size: int = 14
    changes: tuple[str, ...] = ()
    cpu_s_of_epoch: float = 14.0
    """For the forecast, until cells of the setting have been measured."""


SETTINGS = {
    "short": Setting(name="ResNet-20 of width 8, 14 px", ratios=(0.15, 0.08, 0.3, 0.5), num_seeds=5),
    "long": Setting(
        name="the same network, long stages", ratios=(0.15, 0.08), num_seeds=5, gating_epochs=8, finetuning_epochs=8
    ),
    "plain": Setting(
        name="six convolutions without a residual stream, 14 px", ratios=(0.15, 0.3), num_seeds=3, changes=PLAIN
    ),
    "large": Setting(
        name="ResNet-20 of width 8, 28 px", ratios=(0.15,), num_seeds=3, image_size=28, cpu_s_of_epoch=45.0
    ),
}
SHARED = ("base.data.num_train=24000",)
TUNING_SETTING, TUNING_RATIO, TUNING_SEED = "short", 0.15, 100
LEARNING_RATES = (0.05, 0.1, 0.02)


class Tuned(NamedTuple):
    """What is chosen for a method."""

    lr: float
    """Of both stages."""
    reg: float = 0.0
    """Coefficient of the regulariser; 5e-4 is Torch-Pruning's own for CIFAR."""
    scope: str = ""
    """One of Torch-Pruning's SCOPES."""


def _scoped(reg: float = 0.0) -> list[Tuned]:
    return [
        *(Tuned(lr, reg, "isomorphic") for lr in LEARNING_RATES),
        *(Tuned(LEARNING_RATES[0], reg, scope) for scope in ("local", "global")),
    ]


GRID: dict[str, list[Tuned]] = {
    **{method: [Tuned(lr) for lr in LEARNING_RATES] for method in METHODS},
    "tp_taylor": _scoped(),
    "tp_hessian": _scoped(),
    "tp_group_norm": [*_scoped(5e-4), Tuned(0.05, 1e-4, "isomorphic"), Tuned(0.05, 2.5e-3, "isomorphic")],
}
"""Method -> what is tried for it."""


@dataclass(frozen=True)
class Cell:
    """One training, whose name is method:ratio:seed:setting, or method:ratio:seed:setting:lr:reg[:scope] while tuning."""

    method: str
    ratio: float
    seed: int
    setting: str
    tuning: Tuned | None = None

    @classmethod
    def named(cls, name: str) -> "Cell":
        """Return the cell of a name."""
        method, ratio, seed, setting, *tuning = name.split(":")
        tried = Tuned(float(tuning[0]), float(tuning[1]), *tuning[2:]) if tuning else None
        return cls(method, float(ratio), int(seed), setting, tried)

    def __str__(self) -> str:
        parts = [self.method, self.ratio, self.seed, self.setting, *(self.tuning or ())]
        return ":".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts if part != "")

    @property
    def num_epochs(self) -> int:
        """Epochs after the unpruned network's."""
        setting = SETTINGS[self.setting]
        return setting.gating_epochs + setting.finetuning_epochs


@cache
def make_config(setting: Setting, seed: int, lr: float) -> TrialConfig:
    """Return the config of the trainings at a learning rate; that of the gates is the weights'."""
    own = (f"base.data.image_size={setting.image_size}", f"base.seed={seed}", *SHARED, *setting.changes)
    epochs = (f"base.gating.epochs={setting.gating_epochs}", f"base.finetuning.epochs={setting.finetuning_epochs}")
    return load_space("fashion_mnist", [*own, *epochs, f"base.gating.lr={lr}", f"base.finetuning.lr={lr}"]).base


def tuning_cells(method: str) -> list[Cell]:
    """Return the cells that choose for a method."""
    return [Cell(method, TUNING_RATIO, TUNING_SEED, TUNING_SETTING, tried) for tried in GRID[method]]


def tuned(method: str, rows: dict[str, dict[str, Any]]) -> Tuned | None:
    """Return what has the best held-out top-1; None until all have been run."""
    cells = [cell for cell in tuning_cells(method) if _is_current(cell, rows)]
    if len(cells) < len(GRID[method]):
        return None
    return max(cells, key=lambda cell: float(rows[str(cell)]["validation_top1"])).tuning


def best_other(rows: dict[str, dict[str, Any]]) -> str | None:
    """Return the method, neither of gates nor magnitude, of the best held-out top-1 in short stages at 0.15; None until all are run."""
    found = {
        method: [rows[str(cell)]["validation_top1"] for cell in _grid([method], "short", (0.15,)) if str(cell) in rows]
        for method in METHODS
        if method not in ("ours", "paper", "magnitude")
    }
    if any(len(top1) < SETTINGS["short"].num_seeds for top1 in found.values()):
        return None
    return max(found, key=lambda method: statistics.mean(found[method]))


def _grid(methods: Iterable[str], setting: str, ratios: Iterable[float]) -> list[Cell]:
    seeds = range(SETTINGS[setting].num_seeds)
    return [Cell(method, ratio, seed, setting) for seed in seeds for ratio in ratios for method in methods]


def plan(other: str | None) -> list[Cell]:
    """Return all cells, the most telling first, and of the rest a seed of everything before the next.

    other: the best other method, None while it is unknown.
    """
    late = tuple(method for method in METHODS if method not in FIRST)
    others = () if other is None else (other,)
    parts = [
        [cell for method in FIRST for cell in tuning_cells(method)],
        _grid(FIRST, "short", (0.15, 0.08)),
        [cell for method in late for cell in tuning_cells(method)],
        _grid(late, "short", (0.15, 0.08)),
    ]
    rest = [
        *_grid(METHODS, "short", (0.3, 0.5)),
        *_grid(("ours", "paper", "magnitude", *others), "long", SETTINGS["long"].ratios),
        *_grid(METHODS, "plain", SETTINGS["plain"].ratios),
        *_grid(("ours", *others), "large", SETTINGS["large"].ratios),
    ]
    return [*(cell for part in parts for cell in part), *sorted(rest, key=lambda cell: cell.seed)]


def runnable() -> list[str]:
    """Return the names of the cells whose learning rate is known."""
    rows = ROWS.read()
    is_tuned = {method: tuned(method, rows) is not None for method in METHODS}
    return [str(cell) for cell in plan(best_other(rows)) if cell.tuning or is_tuned[cell.method]]


def forecast() -> str:
    """Return what the cells that have no row will take."""
    rows = ROWS.read()
    left = [cell for cell in plan(best_other(rows) or FIRST[-1]) if str(cell) not in rows]
    return f"{len(left)} cells are left, about {sum(map(_forecast_cpu_s, left)) / 3600:.1f} hours of one core"


def _forecast_cpu_s(cell: Cell) -> float:
    found = [row["cpu_s"] for row in ROWS.read().values() if row["setting"] == cell.setting]
    return statistics.mean(found) if found else SETTINGS[cell.setting].cpu_s_of_epoch * cell.num_epochs


def source(cell: Cell, rows: dict[str, dict[str, Any]]) -> str:
    """Hash of the settings that a cell depends on.

    Not of the code: hours of cells outlive a change that leaves the numbers as they are.
    """
    return _source(cell.method, SETTINGS[cell.setting], cell.tuning or tuned(cell.method, rows) or Tuned(0.0))


@cache
def _source(method: str, setting: Setting, chosen: Tuned) -> str:
    config = make_config(setting, 0, chosen.lr)
    # Without defaults, so that a new field of the config leaves the hash as it is.
    settings: list[Any] = [config.model_dump(mode="json", exclude_defaults=True), chosen.reg]
    if method in ("ours", "paper"):
        settings.append([config.gating.init_keep_prob, config.gating.magnitude_spread, config.gating.curvature])
    if method.startswith("tp_"):
        settings.append([rivals.NUM_BURSTS, rivals.SMALL_STEPS, rivals.TAYLOR_IMAGES, rivals.HESSIAN_IMAGES])
        settings.append(chosen.scope)
    return digest(settings)


def _is_current(cell: Cell, rows: dict[str, dict[str, Any]]) -> bool:
    return rows.get(str(cell), {}).get("source") == source(cell, rows)


def _gates(changes: dict[str, Any], lab: Lab, ratio: float, _: Tuned) -> nn.Module:
    config = with_values(lab.config, {"gating.target_ratio": ratio, **changes})
    gated, steps = lab.gated(config)
    lab.train(gated, "gate", config, gates=steps)
    return gated.prune()


def _one_shot(kind: BaselineKind, lab: Lab, ratio: float, _: Tuned) -> nn.Module:
    return gator.prune(lab.base, lab.graph, baseline(kind, lab.base, lab.macs, ratio, seed=lab.config.seed))


CUT: dict[str, Callable[[Lab, float, Tuned], nn.Module]] = {
    "ours": partial(_gates, {}),
    "paper": partial(_gates, {"gating.curvature": 0.0, "gating.magnitude_spread": 0.0}),
    "group_fisher": lambda lab, ratio, _: rivals.group_fisher(lab, ratio),
    "tp_taylor": lambda lab, ratio, chosen: rivals.in_bursts("taylor", lab, ratio, chosen.scope),
    "tp_hessian": lambda lab, ratio, chosen: rivals.in_bursts("hessian", lab, ratio, chosen.scope),
    "tp_group_norm": lambda lab, ratio, chosen: rivals.group_norm(lab, ratio, chosen.reg, chosen.scope),
    "magnitude": partial(_one_shot, "magnitude"),
    "uniform": partial(_one_shot, "uniform"),
    "random": partial(_one_shot, "random"),
}
"""Method -> the network cut to a share of the MACs, from the lab, the share and what is chosen for the method."""


def measure(name: str) -> dict[str, Any]:
    """Return the row of a cell."""
    torch.set_num_threads(1)
    cell, rows = Cell.named(name), ROWS.read()
    chosen = cell.tuning or tuned(cell.method, rows)
    if chosen is None:
        raise SystemExit(
            f"{name}: run {', '.join(map(str, tuning_cells(cell.method)))} first, they choose its learning rate"
        )
    lab = Lab(make_config(SETTINGS[cell.setting], cell.seed, chosen.lr))
    _ = lab.macs  # the unpruned network is trained, or read, before the clock starts
    began = time.process_time()
    network = CUT[cell.method](lab, cell.ratio, chosen)
    as_cut = lab.top1(network, lab.splits.validation)
    lab.finetune(network, cell.num_epochs if cell.method in ONE_SHOT else SETTINGS[cell.setting].finetuning_epochs)
    cpu_s = time.process_time() - began
    return {
        "model": str(cell),
        "source": source(cell, rows),
        "method": cell.method,
        "ratio": cell.ratio,
        "seed": cell.seed,
        "setting": cell.setting,
        **{key: value for key, value in chosen._asdict().items() if value != ""},
        "cut_validation_top1": round(as_cut, 2),
        "validation_top1": round(lab.top1(network, lab.splits.validation), 2),
        "unpruned_validation_top1": round(lab.top1(lab.base, lab.splits.validation), 2),
        "top1": None if cell.tuning else round(lab.top1(network), 2),
        "unpruned_top1": None if cell.tuning else round(lab.top1(lab.base), 2),
        "macs": count_macs(network, lab.splits.input_shape),
        "unpruned_macs": round(lab.macs.full),
        "cpu_s": round(cpu_s),
        "torch": torch.__version__,
        "day": date.today().isoformat(),
    }


def table_text() -> str:
    """Return the results as a Markdown page, a table for each setting and share."""
    rows = CELLS.present()
    page = [
        "# Top-1 on Fashion-MNIST at equal MACs and epochs",
        "",
        "Written by `python -m benchmarks.bench_accuracy --render`; what is compared is in [bench_accuracy.py](../bench_accuracy.py).",
        "",
        "21,600 training images, 2,400 held out, 8 epochs for the unpruned network; top-1 in percent on the 10,000 test images, mean and "
        "standard deviation over seeds with unpruned networks of their own. Ahead: top-1 of `ours` less the method's, mean over the "
        "seeds that both have, with its standard error. CPU s: of the method's trainings, on cores that other programs used too. "
        f"{machine('torch', 'torch-pruning')}.",
        "",
        f"{len(rows)} cells are here, {len(CELLS.missing(0))} of those that can be run now are missing"
        f"{'' if best_other(ROWS.read()) else '; some follow once the best other method is known'}. The same command runs them.",
    ]
    for key, setting in SETTINGS.items():
        for ratio in sorted(setting.ratios, reverse=True):
            found = [row for row in rows if (row["setting"], row["ratio"]) == (key, ratio) and row["top1"] is not None]
            epochs = f"{setting.gating_epochs} + {setting.finetuning_epochs} epochs"
            page += ["", f"## {setting.name}, {epochs}, {ratio} of the MACs", "", *_table(found)]
    page += ["", "## Learning rates, regularisers and scopes, by held-out top-1", "", *_tuning_table(rows)]
    return "\n".join(page) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["Not run yet."]
    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    present = {method: found for method, found in by_method.items() if found}
    best_first = sorted(present, key=lambda method: -statistics.mean(row["top1"] for row in present[method]))
    lines = ["| method | top-1 | ahead | against the unpruned | held-out, as cut | MACs | CPU s |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method in best_first:
        found = present[method]
        cells = [
            f"`{method}`",
            top1_text(found),
            ahead_text(present.get("ours", []), found) if method != "ours" else "",
            f"{_mean(row['top1'] - row['unpruned_top1'] for row in found):+.2f}",
            f"{_mean(row['cut_validation_top1'] for row in found):.1f}",
            f"{_mean(row['macs'] / row['unpruned_macs'] for row in found):.4f}",
            f"{_mean(row['cpu_s'] for row in found):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ahead_text(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Return the mean of the differences at equal seeds, its standard error and the number of pairs."""
    top1 = {row["seed"]: row["top1"] for row in ours}
    differences = [top1[row["seed"]] - row["top1"] for row in others if row["seed"] in top1]
    if not differences:
        return ""
    error = f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.2f}{error} (n = {len(differences)})"


def _tuning_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| method | learning rate | regulariser | scope | held-out top-1 |", "| --- | ---: | ---: | --- | ---: |"]
    for row in (row for method in METHODS for row in rows if row["method"] == method and row["top1"] is None):
        lines.append(
            f"| `{row['method']}` | {row['lr']:g} | {row['reg']:g} | {row.get('scope', '')} | {row['validation_top1']:.2f} |"
        )
    return lines


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


CELLS = Cells(
    rows=ROWS,
    names=lambda _: runnable(),
    source=lambda name: source(Cell.named(name), ROWS.read()),
    measure=measure,
    line=lambda row: (
        f"{row['model']}: held-out {row['validation_top1']}, top1 {row['top1']}, macs {row['macs']:,}, {row['cpu_s']} CPU s"
    ),
    render=lambda: TABLE.write_text(table_text()),
    metavar="METHOD:RATIO:SEED:SETTING",
    forecast=forecast,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark's command line."""
    CELLS.main(argv, __doc__)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
