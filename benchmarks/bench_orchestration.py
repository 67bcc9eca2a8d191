"""What orchestration adds to a training, beside the same training as a plain PyTorch loop.

    python -m benchmarks.bench_orchestration --turn fashion_mnist     one turn: bare loop, command train, command search; appends a row
    python -m benchmarks.bench_orchestration --turn digits            the same with epochs of about two seconds
    python -m benchmarks.bench_orchestration --turn digits --sides bare train     a turn of these sides only, one of them bare
    python -m benchmarks.bench_orchestration --render                 results/orchestration.md

Each side trains the same network on the same images in one process of one thread: epochs under gates, the cut, epochs of
fine-tuning; after each epoch BatchNorm is estimated again, the cut network judged on the held-out images, and all that the
next epoch depends on saved. The bare loop sees the images in the commands' order and its gates the commands' noise, so that all sides
cut the same channels: networks of equal MACs but other widths were seen to take 4 % more time a step. An epoch lasts
from the end of the one before it to its own, saving and reporting included; the first epoch of a stage, which has none before
it, is left out. The sides run one after another, in another order each turn.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import machine

PROJECT = Path(__file__).resolve().parents[1]
ROWS = PROJECT / "benchmarks" / "results" / "orchestration.jsonl"
TABLE = ROWS.with_suffix(".md")
SIDES = ("bare", "train", "search")
TRAININGS = {
    "fashion_mnist": {
        "model": {"name": "resnet20_cifar", "num_classes": 10, "kwargs": {"width": 8}},
        "data": {"name": "fashion_mnist", "image_size": 28, "global_batch_size": 128, "num_train": 5000},
    },
    "digits": {
        "model": {"name": "resnet14_cifar", "num_classes": 10, "kwargs": {"width": 8}},
        "data": {"name": "digits", "image_size": 32, "global_batch_size": 64},
    },
}
NUM_EPOCHS = {"fashion_mnist": 4, "digits": 8}
"""Of each of the two stages."""
CLUSTER = {"workers_per_trial": 1, "resources_per_worker": {"CPU": 1}}


def space_of(training: str, weights: Path) -> dict[str, Any]:
    """Return a search space with one trial, whose start is the file of weights."""
    base = TRAININGS[training]
    epochs = NUM_EPOCHS[training]
    return {
        "name": "orchestration",
        "base": {
            **base,
            "model": {**base["model"], "weights": str(weights)},
            "gating": {"epochs": epochs, "lr": 0.1, "target_ratio": 0.5},
            "finetuning": {"epochs": epochs, "lr": 0.02},
            "profile": {"clock": "model"},
        },
        "params": {"gating.loss_weight": {"type": "float", "low": 1.0, "high": 16.0, "log": True}},
        "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "macs", "mode": "min"}],
        "search": {"num_trials": 1, "points": [{"gating.loss_weight": 4.0}]},
        "scheduler": {"type": "none"},
    }


# --- the sides, each in a process of its own, which prints what it has seen as JSON -----------------------------------------


def run_bare(space: str, folder: Path) -> dict[str, Any]:
    """Train as one would by hand with gator and a DataLoader."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader

    import gator
    from orchestrator.datasets import splits as datasets
    from orchestrator.datasets.seeds import mix_seed
    from orchestrator.models import networks as models
    from orchestrator.planning.space import load_space, one_trial
    from orchestrator.training.loaders import num_samples

    config = one_trial(load_space(space))
    marks = {"prepares": time.time()}
    splits = datasets.load(config.data, config.seed)
    network = models.build(config.model)
    graph = gator.trace(network, torch.randn(2, *splits.input_shape))
    size, batch_size = config.evaluation.batch_size, config.data.global_batch_size
    num_images = num_samples(splits.train)
    steps_per_epoch = num_images // batch_size
    some = [images for images, _ in DataLoader(splits.train, batch_size=size)][: config.evaluation.bn_batches]
    epochs: list[dict[str, Any]] = []

    def batches(stage: str, epoch: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(mix_seed(config.seed, stage) + epoch)
        order = torch.randperm(num_images, generator=generator)[: steps_per_epoch * batch_size]
        return DataLoader(splits.train, batch_sampler=[part.tolist() for part in order.split(batch_size)])

    def end_epoch(stage: str, pruned: nn.Module, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        gator.reestimate_batchnorm(pruned, iter(some))
        accuracy = top1(pruned, splits.validation, size)
        state = {"network": trained.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "checkpoint.pt.new")
        os.replace(folder / "checkpoint.pt.new", folder / "checkpoint.pt")
        epochs.append({"stage": stage, "ended": time.time(), "cpu_s": time.process_time(), "top1": accuracy})

    gating = config.gating
    gated = gator.GatedModel(network, graph, gator.GateConfig(init_keep_prob=gating.init_keep_prob, seed=config.seed))
    cost = gator.MacsCost(graph)
    groups = gated.param_groups(gating.lr, gating.gate_lr_scale, cost, gating.weight_decay)
    optimizer = torch.optim.SGD(groups, momentum=gating.momentum)
    gate_loss = gator.GateLoss(cost, gating.loss_weight, target_ratio=gating.target_ratio)
    marks["first epoch"] = time.time()
    num_steps, step = gating.epochs * steps_per_epoch, 0
    for epoch in range(gating.epochs):
        gated.train()
        for images, labels in batches("gate", epoch):
            gated.seek(epoch=epoch, position=step % steps_per_epoch * batch_size)
            loss = cross_entropy(gated(images), labels) + gate_loss(gated, step / (num_steps - 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        end_epoch("gate", gated.prune(), gated, optimizer)

    finetuning, architecture = config.finetuning, gated.architecture()
    pruned = gated.prune()
    optimizer = torch.optim.SGD(
        pruned.parameters(), finetuning.lr, momentum=finetuning.momentum, weight_decay=finetuning.weight_decay
    )
    num_steps, step = finetuning.epochs * steps_per_epoch, 0
    for epoch in range(finetuning.epochs):
        pruned.train()
        for images, labels in batches("finetune", epoch):
            optimizer.param_groups[0]["lr"] = finetuning.lr * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / num_steps))
            cross_entropy(pruned(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        end_epoch("finetune", pruned, pruned, optimizer)
    accuracy = top1(pruned, splits.test, size)
    gator.save_pruned(pruned, architecture, folder / "pruned")
    marks["judged"] = time.time()
    return {"marks": marks, "epochs": epochs, "top1": accuracy, "macs_ratio": cost(architecture) / cost.full}


def top1(network: Any, split: Any, batch_size: int) -> float:
    """Return the percentage of images that the network names rightly."""
    import torch
    from torch.utils.data import DataLoader

    network.eval()
    with torch.inference_mode():
        hits = [
            (network(images).argmax(1) == labels).sum().item()
            for images, labels in DataLoader(split, batch_size=batch_size)
        ]
    return 100 * sum(hits) / len(split)


def run_command(command: str, space: str, folder: Path) -> dict[str, Any]:
    """Run the command in this process, and watch from a thread what its worker leaves behind."""
    from orchestrator import search, train
    from orchestrator.cluster import connection as cluster
    from orchestrator.storage.paths import TrialPaths
    from orchestrator.trial import base_network as base
    from orchestrator.tuning import tuner as driver

    marks: dict[str, float] = {}

    def mark(owner: Any, name: str, when: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            marks.setdefault(when, time.time())
            result = function(*args, **kwargs)
            marks.setdefault(f"{when}, done", time.time())
            return result

        setattr(owner, name, marked)

    mark(cluster, "connect", "connects")
    for owner in (base, driver):
        mark(owner, "ensure_base", "base")
    mark(driver, "measure_fixed", "unpruned")
    mark(driver.Tuning, "run", "tunes")
    root = folder / ("orchestration-train" if command == "train" else "orchestration/trials/trial_0000")
    watcher = _Watcher(TrialPaths(root))
    (folder / "cluster.yaml").write_text(json.dumps(CLUSTER))
    arguments = [space, "--run-dir", str(folder), "--cluster", str(folder / "cluster.yaml")]
    code = (train if command == "train" else search).main(arguments)
    assert code == 0, f"{command} ended with {code}"
    *epochs, final = watcher.epochs()
    marks |= {"worker begins": watcher.begun, "judged": final["ended"]}
    spent = sum(epochs[0][name] for name in ("train_s", "eval_s", "measure_s"))
    marks["first epoch"] = epochs[0]["ended"] - spent
    return {"marks": marks, "epochs": epochs, "top1": final["top1"], "macs_ratio": final["macs_ratio"]}


class _Watcher(threading.Thread):
    """Notes when the worker's log appears, and the worker's CPU time whenever metrics.parquet changes."""

    def __init__(self, paths: Any) -> None:
        super().__init__(daemon=True)
        self.paths = paths
        self.begun = math.nan
        self.cpu_s: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        while not self.paths.log.exists():
            time.sleep(0.02)
        self.begun = time.time()
        worker = _worker()
        changed = 0
        while worker.is_running():
            now = self.paths.metrics.stat().st_mtime_ns if self.paths.metrics.exists() else 0
            if now != changed:
                changed = now
                self.cpu_s.append((time.time(), sum(worker.cpu_times()[:2])))
            time.sleep(0.02)

    def epochs(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.parquet with the time and the worker's CPU seconds at their ends."""
        from orchestrator.storage.records import read_metrics

        def cpu_s(ended: float) -> float:
            return min(self.cpu_s, key=lambda noted: abs(noted[0] - ended))[1]

        rows = [row | {"ended": row["timestamp_ms"] / 1000} for row in read_metrics(self.paths.metrics)]
        kept = ("stage", "ended", "top1", "macs_ratio", "train_s", "eval_s", "measure_s")
        return [{name: row[name] for name in kept} | {"cpu_s": cpu_s(row["ended"])} for row in rows]


def _worker() -> Any:
    """Return the process of the one Train worker below this one."""
    import psutil

    (worker,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if "ray::RayTrainWorker" in " ".join(process.cmdline())
    ]
    return worker


# --- a turn, and the table ------------------------------------------------------------------------------------------------


def run_turn(training: str, sides: Sequence[str]) -> dict[str, Any]:
    """Run the sides, beginning with another one than the last turn of this training did."""
    num_before = sum(row["training"] == training for row in read_rows())
    row: dict[str, Any] = {"training": training, "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="orch") as name:
        weights = write_weights(training, Path(name) / "base.safetensors")
        space = Path(name) / "orchestration.yaml"
        space.write_text(json.dumps(space_of(training, weights)))
        for position in range(len(sides)):
            side = sides[(position + num_before) % len(sides)]
            folder = Path(name) / side
            folder.mkdir()
            row[side] = _in_own_process(side, space, folder)
    return row


def write_weights(training: str, path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    from orchestrator.config.trial import ModelConfig
    from orchestrator.models import networks as models

    torch.manual_seed(0)
    network = models.build(ModelConfig.model_validate(TRAININGS[training]["model"]))
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


def _in_own_process(side: str, space: Path, folder: Path) -> dict[str, Any]:
    """Return what the side saw, with the times at which its process was started and had ended."""
    command = [sys.executable, "-m", "benchmarks.bench_orchestration", "--side", side, str(space), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.time()
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    ended = time.time()
    assert done.returncode == 0, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen | {"started": started, "left": ended}


def read_rows() -> list[dict[str, Any]]:
    """Return the turns that were run."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def is_alike(turn: dict[str, Any]) -> bool:
    """Return whether all sides of the turn cut the same channels, so that their epochs may be compared."""
    return len({turn[side]["macs_ratio"] for side in SIDES if side in turn}) == 1


def epoch_times(seen: dict[str, Any], name: str = "ended") -> list[float]:
    """Return how long each epoch took that has another one of its stage before it; name: ended or cpu_s."""
    epochs = seen["epochs"]
    return [after[name] - before[name] for before, after in pairwise(epochs) if before["stage"] == after["stage"]]


def saving_s(seen: dict[str, Any]) -> list[float]:
    """Return what saving and reporting took after each epoch that has another one of its stage behind it; of a command."""
    return [
        after["ended"] - before["ended"] - sum(after[name] for name in ("train_s", "eval_s", "measure_s"))
        for before, after in pairwise(seen["epochs"])
        if before["stage"] == after["stage"]
    ]


PIECES: dict[str, list[tuple[str, str, str]]] = {
    "bare": [
        ("Python, imports, config", "started", "prepares"),
        ("images, network, trace", "prepares", "first epoch"),
        ("test images, saving", "last epoch", "judged"),
        ("end of the process", "judged", "left"),
    ],
    "train": [
        ("Python, imports, config", "started", "connects"),
        ("Ray starts", "connects", "connects, done"),
        ("base network: built and saved", "connects, done", "base, done"),
        ("Ray Train: controller, placement, worker process, its imports", "base, done", "worker begins"),
        ("images, network, trace", "worker begins", "first epoch"),
        ("test images, saving", "last epoch", "judged"),
        ("last checkpoint, end of Ray and the process", "judged", "left"),
    ],
    "search": [
        ("Python, imports, config", "started", "connects"),
        ("Ray starts", "connects", "connects, done"),
        ("MLflow's store, base network", "connects, done", "base, done"),
        ("the unpruned network is measured", "base, done", "tunes"),
        ("Tune, the trial's driver, Ray Train, worker process, its imports", "tunes", "worker begins"),
        ("images, network, trace", "worker begins", "first epoch"),
        ("test images, saving", "last epoch", "judged"),
        ("last checkpoint, results, MLflow, report, end of Ray and the process", "judged", "left"),
    ],
}


def piece_seconds(side: str, seen: dict[str, Any]) -> dict[str, float]:
    """Return what the time outside of the epochs was spent on."""
    marks = {
        **seen["marks"],
        "started": seen["started"],
        "left": seen["left"],
        "last epoch": seen["epochs"][-1]["ended"],
    }
    return {what: marks[end] - marks[begin] for what, begin, end in PIECES[side]}


def render() -> str:
    """Return the tables as Markdown."""
    rows = read_rows()
    parts = [_HEAD.format(machine=machine("torch", "ray", "mlflow"))]
    for training in TRAININGS:
        turns = [row for row in rows if row["training"] == training]
        if turns:
            parts += [
                f"## {training}, {len(turns)} turn{'s' * (len(turns) > 1)}",
                _epoch_table(turns),
                _start_table(turns),
            ]
    return "\n\n".join(parts) + "\n"


_HEAD = """# What orchestration adds to a training

Written by `python -m benchmarks.bench_orchestration --render`; what is timed stands in [bench_orchestration.py](../bench_orchestration.py).
Machine: {machine}. One worker of one thread on every side; medians over turns
(least-most). A ratio is that of the same turn's sums.

- An epoch through `orchestrator.train` and as a trial runs the same worker code: what lies between the two is noise.
- What an epoch has that the bare loop has not: an order that can be gone on with, a seed for each batch's draws, losses that are
  looked at, a row of metrics.parquet, and a checkpoint that is digested and copied by Ray Train to the run's storage.
- A turn whose sides cut other channels counts for the start-up only: in the first turns the bare loop drew other images and other
  noise in its gates, and its network, of equal MACs but other widths, took 4 % less time a step (one pair, timed apart).
- Beside the turn of fashion_mnist that is compared and two of digits' three other jobs ran: their CPU seconds count, not the wall time.
- The start-up is Ray's and Python's: imports in the command, the trial's driver, the controller and the worker, one after the other."""


def _epoch_table(turns: Sequence[dict[str, Any]]) -> str:
    turns = [turn for turn in turns if is_alike(turn)]
    if not turns:
        return "No turn yet whose sides cut the same channels; epochs are not compared."
    lines = [
        "| side | turns | epoch, wall s | beside bare | epoch, CPU s of the training process | beside bare | top-1 | of the MACs |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for side in SIDES:
        ran = [turn for turn in turns if side in turn]
        if not ran:
            continue
        cells = [side, str(len(ran))]
        for name in ("ended", "cpu_s"):
            cells.append(_spread([median(epoch_times(turn[side], name)) for turn in ran], ".2f"))
            ratios = [sum(epoch_times(turn[side], name)) / sum(epoch_times(turn["bare"], name)) for turn in ran]
            cells.append(_spread(ratios, ".3f"))
        cells += [_spread([turn[side][metric] for turn in ran], ".2f") for metric in ("top1", "macs_ratio")]
        lines.append(f"| {' | '.join(cells)} |")
    num = len(epoch_times(turns[0]["bare"]))
    commands = [turn[side] for turn in turns for side in ("train", "search") if side in turn]
    saving_ms = [1000 * seconds for seen in commands for seconds in saving_s(seen)]
    spent = f"Saving and reporting, part of an epoch of train and search: {_spread(saving_ms, '.0f')} ms."
    return "\n".join([f"{num} epochs a turn and side count. {spent}", "", *lines])


def _start_table(turns: Sequence[dict[str, Any]]) -> str:
    lines = ["| side | outside of the epochs | s |", "| --- | --- | ---: |"]
    for side in SIDES:
        pieces = [piece_seconds(side, turn[side]) for turn in turns if side in turn]
        if not pieces:
            continue
        lines += [f"| {side} | {what} | {_spread([piece[what] for piece in pieces], '.1f')} |" for what in pieces[0]]
        lines.append(f"| {side} | **together** | {_spread([sum(piece.values()) for piece in pieces], '.1f')} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    spread = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
    return f"{median(values):{form}}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turn", choices=TRAININGS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "SPACE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.side:
        side, space, folder = arguments.side
        seen = run_bare(space, Path(folder)) if side == "bare" else run_command(side, space, Path(folder))
        print(json.dumps(seen))
    if arguments.turn:
        row = run_turn(arguments.turn, arguments.sides)
        with open(ROWS, "a") as file:
            file.write(json.dumps(row) + "\n")
    if arguments.render:
        TABLE.write_text(render())
        print(TABLE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
