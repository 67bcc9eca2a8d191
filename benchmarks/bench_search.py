"""How good a front a search has found after so many epochs, by scheduler and searcher.

    python -m benchmarks.bench_search [--seeds 30] [--syne-tune PYTHON]

No network is trained: trials read their curves off a surrogate that is fitted to real pruning trials on digits
(benchmarks/data/digits_curves.parquet, see record_trials.py), in virtual time on 8 workers. The schedulers and samplers are
those of the search. Writes benchmarks/results/search.md.

Syne Tune pins other versions than ours, so it lives in an environment of its own:
    python -m venv /tmp/synetune && /tmp/synetune/bin/pip install syne-tune
    python -m benchmarks.bench_search --syne-tune /tmp/synetune/bin/python
"""

import argparse
import heapq
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import pyarrow.parquet as pq
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from benchmarks.machine import machine
from benchmarks.record_trials import CURVES, SPACE
from orchestrator.config import SearchAlgorithmConfig
from orchestrator.pareto import ParetoASHA, hypervolume
from orchestrator.pareto_asha import LARGEST_JUDGED_MACS_RATIO, rung_epochs
from orchestrator.schedulers import NoRule, StoppingRule, asha
from orchestrator.searchers import make_sampler

RESULT = Path(__file__).parent / "results" / "search.md"
NUM_WORKERS = 8
NUM_TRIALS = 64
"""Trials of the full search, random and without stopping; every other row spends as many epochs."""
REDUCTION_FACTOR = 3
GRACE_EPOCHS = (1, 4)
"""The first rung: as early as can be, and towards the end of gating (6 of the 12 epochs), where a search would put it."""
REFERENCE = (10.0, 1.0)
"""Guessing among ten digits, and the unpruned network's latency, which is 1 here."""
NOISE = 0.8
"""Standard deviation of top1 on the 142 held-out images, where 97 % are right: 1.4; half of it is shared by all epochs."""
SHARES = (0.1, 0.25, 0.5, 1.0)

Values = dict[str, float]


class Surrogate:
    """Learning curves over SPACE: a Gaussian process of each epoch's top1 (as log-odds) and macs_ratio."""

    def __init__(self, path: Path) -> None:
        rows = [row for row in pq.read_table(path).to_pylist() if not row["final"]]
        numbers = sorted({row["trial"] for row in rows})
        curves = [
            sorted((row for row in rows if row["trial"] == number), key=lambda row: row["epoch"]) for number in numbers
        ]
        self.num_trials, self.num_epochs = len(curves), len(curves[0])
        points = np.array([_scaled({name: curve[0][name] for name in SPACE}) for curve in curves])
        top1 = np.array([[_logit(row["top1"]) for row in curve] for curve in curves])
        macs = np.array([[row["macs_ratio"] for row in curve] for curve in curves])
        self._top1, self._macs = _fit(points, top1), _fit(points, macs)
        self.error = _leave_one_out(points, top1, macs)
        """Mean absolute error of the last epoch's top1 (percent) and macs_ratio for a trial that was left out."""

    def curve(self, values: Values, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs,) top1 in percent with noise, and macs_ratio, which never rises."""
        point = _scaled(values)[None]
        top1 = _percent(self._top1.predict(point)[0]) + NOISE * draw.standard_normal(self.num_epochs)
        macs = np.minimum.accumulate(np.clip(self._macs.predict(point)[0], 0.02, 1.0))
        return np.clip(top1, 0.0, 100.0), macs


def _fit(points: np.ndarray, outputs: np.ndarray) -> GaussianProcessRegressor:
    kernel = ConstantKernel(1.0) * RBF(np.ones(len(SPACE)), (0.1, 10.0)) + WhiteKernel(0.05)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(points, outputs)


def _leave_one_out(points: np.ndarray, top1: np.ndarray, macs: np.ndarray) -> tuple[float, float]:
    errors = []
    for left_out in range(len(points)):
        others = np.arange(len(points)) != left_out
        predicted_top1 = _percent(_fit(points[others], top1[others]).predict(points[~others])[0, -1])
        predicted_macs = _fit(points[others], macs[others]).predict(points[~others])[0, -1]
        errors.append((abs(predicted_top1 - _percent(top1[left_out, -1])), abs(predicted_macs - macs[left_out, -1])))
    return tuple(np.mean(errors, axis=0).tolist())


def _scaled(values: Values) -> np.ndarray:
    return np.array([np.log(values[name] / low) / np.log(high / low) for name, (low, high) in SPACE.items()])


def _logit(top1: float) -> float:
    share = min(max(top1 / 100, 0.005), 0.995)
    return float(np.log(share / (1 - share)))


def _percent(logits: Any) -> Any:
    return 100 / (1 + np.exp(-logits))


class Searcher(Protocol):
    """Suggests values and hears how trials ended."""

    def suggest(self, number: int) -> Values:
        """Return the values of the trial with this number."""

    def tell(self, number: int, point: tuple[float, float] | None) -> None:
        """Take note of a trial's end: (top1, latency), None if it was stopped."""


class OptunaSuggestions:
    """The search's own samplers."""

    def __init__(self, algorithm: str, seed: int) -> None:
        self._config = SearchAlgorithmConfig(algorithm=algorithm, num_trials=NUM_TRIALS, seed=seed)
        self._study = optuna.create_study(directions=["maximize", "minimize"])
        self._distributions = {
            name: optuna.distributions.FloatDistribution(low, high, log=True) for name, (low, high) in SPACE.items()
        }

    def suggest(self, number: int) -> Values:
        """Return the values of the trial with this number."""
        self._study.sampler = make_sampler(self._config, number)
        return self._study.ask(self._distributions).params

    def tell(self, number: int, point: tuple[float, float] | None) -> None:
        """Take note of a trial's end."""
        state = optuna.trial.TrialState.PRUNED if point is None else None
        self._study.tell(number, point, state=state)


class Scalarised:
    """Ray's ASHA on the mean of the two objectives, each as a share of its range up to the reference."""

    def __init__(self, grace_epochs: int, max_epochs: int) -> None:
        self._rule = _asha(grace_epochs, max_epochs, metric="mean")

    def report(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> str:
        """Report the mean."""
        mean = (metrics["top1"] / 100 - metrics["latency_ms"]) / 2
        return self._rule.report(trial_id, epoch, {**metrics, "mean": mean})


class SyneTune:
    """MOASHA of another process; see moasha_server.py."""

    def __init__(self, server: subprocess.Popen[str], grace_epochs: int, max_epochs: int) -> None:
        self._server = server
        self._ask({"new": [grace_epochs, REDUCTION_FACTOR, max_epochs]})

    def report(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> str:
        """Ask the other process, though not about a network that closed nothing yet: that is so for every row."""
        if metrics["macs_ratio"] > LARGEST_JUDGED_MACS_RATIO:
            return "continue"
        losses = [-metrics["top1"], metrics["latency_ms"]]
        return self._ask({"trial": int(trial_id), "epoch": epoch, "losses": losses})

    def _ask(self, message: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        if not (answer := self._server.stdout.readline().strip()):
            raise RuntimeError("Syne Tune's process has ended; run moasha_server.py by hand to see why")
        return answer


@dataclass(frozen=True)
class Row:
    """A way to search."""

    name: str
    algorithm: str
    make_rule: Callable[[int, int], Any]
    """(first rung, epochs of a trial) -> its rule."""


def _pareto_asha(grace_epochs: int, max_epochs: int) -> StoppingRule:
    return ParetoASHA(
        [("top1", "max"), ("latency_ms", "min")],
        grace_epochs=grace_epochs,
        reduction_factor=REDUCTION_FACTOR,
        max_epochs=max_epochs,
    )


def _asha(grace_epochs: int, max_epochs: int, metric: str = "top1") -> StoppingRule:
    return asha(metric, "max", grace_epochs=grace_epochs, reduction_factor=REDUCTION_FACTOR, max_epochs=max_epochs)


def _no_rule(grace_epochs: int, max_epochs: int) -> StoppingRule:
    return NoRule()


def rows_of(syne_tune: subprocess.Popen[str] | None) -> list[Row]:
    """Return what is compared, the full search first. syne_tune: the server; None leaves its row out."""
    rows = [
        Row("random, no stopping", "random", _no_rule),
        Row("random, Ray's ASHA on top1", "random", _asha),
        Row("random, ASHA on the mean of both", "random", Scalarised),
        Row("random, ParetoASHA", "random", _pareto_asha),
        Row("TPE, no stopping", "optuna", _no_rule),
        Row("TPE, ParetoASHA", "optuna", _pareto_asha),
    ]
    if syne_tune is not None:
        rows.insert(3, Row("random, Syne Tune's MOASHA", "random", partial(SyneTune, syne_tune)))
    return rows


def simulate(row: Row, surrogate: Surrogate, grace_epochs: int, seed: int) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yield (epochs spent so far, (top1, latency)) for each trial that finishes, until the budget is spent.

    Trial i has the same values in every random row of one seed, the same noise, and the same speed.
    """
    searcher, rule = OptunaSuggestions(row.algorithm, seed), row.make_rule(grace_epochs, surrogate.num_epochs)
    num_epochs_left, num_started, running = NUM_TRIALS * surrogate.num_epochs, 0, []
    curves: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    spent = 0

    def start(now: float) -> None:
        nonlocal num_started
        draw = np.random.default_rng([seed, num_started])
        speed = draw.uniform(0.8, 1.25)
        curves[num_started] = surrogate.curve(searcher.suggest(num_started), draw)
        heapq.heappush(running, (now + speed, num_started, 1, speed))
        num_started += 1

    for _ in range(NUM_WORKERS):
        start(0.0)
    while spent < num_epochs_left:
        now, number, epoch, speed = heapq.heappop(running)
        spent += 1
        top1, macs = curves[number]
        point = float(top1[epoch - 1]), float(macs[epoch - 1])
        metrics = {"top1": point[0], "latency_ms": point[1], "macs_ratio": point[1]}
        if epoch == surrogate.num_epochs:
            searcher.tell(number, point)
            yield spent, point
            start(now)
        elif rule.report(str(number), epoch, metrics) == "stop":
            searcher.tell(number, None)
            start(now)
        else:
            heapq.heappush(running, (now + speed, number, epoch + 1, speed))


def volumes(row: Row, surrogate: Surrogate, grace_epochs: int, seed: int) -> list[tuple[int, float]]:
    """Return (epochs spent, hypervolume of the finished networks) after each trial that finished."""
    points: list[tuple[float, float]] = []
    found = []
    for spent, point in simulate(row, surrogate, grace_epochs, seed):
        points.append(point)
        found.append((spent, hypervolume(points, ["max", "min"], REFERENCE)))
    return found


def volume_at(found: Sequence[tuple[int, float]], num_epochs: float) -> float:
    """Return the hypervolume after so many epochs."""
    return max((volume for spent, volume in found if spent <= num_epochs), default=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--syne-tune", metavar="PYTHON", help="the Python of an environment that has syne-tune")
    arguments = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    began = time.process_time()
    surrogate = Surrogate(CURVES)
    server = None if arguments.syne_tune is None else _start(arguments.syne_tune)
    tables = [_table(surrogate, rows_of(server), grace_epochs, range(arguments.seeds)) for grace_epochs in GRACE_EPOCHS]
    RESULT.write_text(_page(surrogate, tables, arguments, time.process_time() - began))
    print(RESULT.read_text())
    return 0


def _start(python: str) -> subprocess.Popen[str]:
    server = Path(__file__).with_name("moasha_server.py")
    return subprocess.Popen([python, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _table(surrogate: Surrogate, rows: Sequence[Row], grace_epochs: int, seeds: Sequence[int]) -> str:
    budget = NUM_TRIALS * surrogate.num_epochs
    found = {row.name: [volumes(row, surrogate, grace_epochs, seed) for seed in seeds] for row in rows}
    full = [volume_at(run, budget) for run in found[rows[0].name]]
    rungs = ", ".join(map(str, rung_epochs(grace_epochs, REDUCTION_FACTOR, surrogate.num_epochs)))
    head = " | ".join(f"{share:.0%} of the epochs" for share in SHARES)
    lines = "\n".join(_line(name, runs, full, budget) for name, runs in found.items())
    return (
        f"Rungs after epoch {rungs}:\n\n| search | {head} | 95 % after | finished |\n"
        f"| --- |{' --- |' * (len(SHARES) + 2)}\n{lines}"
    )


def _line(name: str, runs: Sequence[Sequence[tuple[int, float]]], full: Sequence[float], budget: int) -> str:
    cells = []
    for share in SHARES:
        ratios = [100 * volume_at(run, share * budget) / whole for run, whole in zip(runs, full, strict=True)]
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
    needed = [
        next((100 * spent / budget for spent, volume in run if volume >= 0.95 * whole), 100.0)
        for run, whole in zip(runs, full, strict=True)
    ]
    cells.append(f"{statistics.median(needed):.0f} %")
    cells.append(f"{statistics.median([len(run) for run in runs]):.0f}")
    return f"| {name} | {' | '.join(cells)} |"


def _page(surrogate: Surrogate, tables: Sequence[str], arguments: argparse.Namespace, cpu_s: float) -> str:
    syne_tune = "not run"
    if arguments.syne_tune is not None:
        script = "from importlib.metadata import version; print(version('syne-tune'))"
        syne_tune = subprocess.run(
            [arguments.syne_tune, "-c", script], capture_output=True, text=True, check=True
        ).stdout.strip()
    top1_error, macs_error = surrogate.error
    command = f"python -m benchmarks.bench_search --seeds {arguments.seeds}" + (
        " --syne-tune PYTHON" if arguments.syne_tune else ""
    )
    epochs = f"{NUM_TRIALS * surrogate.num_epochs} epochs ({NUM_TRIALS} trials of {surrogate.num_epochs})"
    parts = [
        "# The front found, by the epochs spent",
        f"`{command}`, {cpu_s:.0f} CPU seconds.",
        f"Hypervolume of the finished networks (top1 against latency, from {REFERENCE[0]:g} % and the unpruned network's latency), "
        "in percent of what random search without stopping has found in the end with the same seed; median and quartiles over "
        f'n = {arguments.seeds} seeds. "95 % after": share of the full search\'s epochs until 95 % of its hypervolume is found, '
        f"median. Every row spends {epochs}; those that stop trials start more of them.",
        *tables,
        f"Trials are simulated, schedulers and samplers are not: curves come from a Gaussian process over {', '.join(SPACE)}, fitted "
        f"to {surrogate.num_trials} real trials on digits (`benchmarks/data/digits_curves.parquet`, recorded with record_trials.py). "
        f"For a trial left out it misses the last epoch's top1 by {top1_error:.1f} points and macs_ratio by {macs_error:.3f} on "
        f"average. Latency is proportional to multiply-adds. {NUM_WORKERS} workers in virtual time, an epoch takes 0.8 to 1.25 by "
        f"trial, eta {REDUCTION_FACTOR}. A network with macs_ratio above 0.95 is judged in no row.",
        f"{machine('optuna', 'ray', 'scikit-learn')}, syne-tune {syne_tune}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
