"""How good a front a search has found after so many epochs, by scheduler and searcher.

    python -m benchmarks.bench_search [--seconds 200] [--syne-tune PYTHON]     what is not in search.jsonl yet, then search.md
    python -m benchmarks.bench_search --render                                search.md alone

No network is trained: trials read their curves off surrogates that are fitted to real pruning trials on digits and on
Fashion-MNIST (benchmarks/data, see record_trials.py), in virtual time on 8 workers. The schedulers, the samplers and the choice
of a parent are those of the search.

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
from scipy.stats import spearmanr
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from benchmarks.machine import machine
from benchmarks.record_trials import BASES, CURVES, DIGITS, SPACE, curves_file
from benchmarks.row_file import RESULTS, RowFile, source_hash
from orchestrator.config.rungs import rung_epochs
from orchestrator.config.search import SearchAlgorithmConfig
from orchestrator.config.trial import GatingConfig
from orchestrator.pareto.asha import ParetoASHA, is_judged, judged_epoch
from orchestrator.pareto.front import hypervolume
from orchestrator.tuning.descend import choose_parent
from orchestrator.tuning.samplers import make_sampler
from orchestrator.tuning.schedulers import NoRule, StoppingRule, asha

ROWS = RowFile(RESULTS / "search.jsonl")
TITLES = {"digits": "Digits", "fashion_mnist": "Fashion-MNIST"}
WITH_LINEAGE = "digits"
"""The data on which trials that go on from one another were recorded."""
NUM_SEEDS = 30
NUM_WORKERS = 8
NUM_TRIALS = 64
"""Trials of the full search, random and without stopping; every other row spends as many epochs."""
RUNGS = ((1, 3), (4, 3), (7, 2))
"""First rung and eta: as early as can be, towards the end of gating (6 of the 12 epochs), and the search's default, an epoch after
the cut."""
LINEAGE_SHARE = 0.5
"""Of the epochs, for a trial that goes on from another."""
REFERENCE = (10.0, 1.0)
"""Guessing among ten classes, and the unpruned network's latency, which is 1 here."""
NOISE = 0.8
"""Standard deviation of top1 on digits' 142 held-out images, where 97 % are right: 1.4, and on Fashion-MNIST's 500, where 85 %
are: 1.6; half of it is shared by all epochs."""
SHARES = (0.1, 0.25, 0.5, 1.0)
COMPARED_SHARES = (0.25, 0.5, 1.0)

Values = dict[str, float]


class Surrogate:
    """Learning curves over SPACE: a Gaussian process of each epoch's top1 (as log-odds) and macs_ratio."""

    def __init__(self, path: Path, num_epochs: int) -> None:
        """num_epochs: of the recorded trials that count."""
        curves = [curve for curve in _recorded(path) if len(curve) == num_epochs]
        self.num_trials, self.num_epochs = len(curves), num_epochs
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


def _recorded(path: Path, *, final: bool = False) -> list[list[dict[str, Any]]]:
    """Return the epochs of each recorded trial, or its final row alone, by the trials' numbers."""
    rows = [row for row in pq.read_table(path).to_pylist() if row["final"] == final]
    numbers = sorted({row["trial"] for row in rows})
    return [sorted((row for row in rows if row["trial"] == number), key=lambda row: row["epoch"]) for number in numbers]


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
        self._study.sampler = make_sampler(self._config, number, self._distributions)
        return self._study.ask(self._distributions).params

    def tell(self, number: int, point: tuple[float, float] | None) -> None:
        """Take note of a trial's end."""
        state = optuna.trial.TrialState.PRUNED if point is None else None
        self._study.tell(number, point, state=state)


class Scalarised:
    """Ray's ASHA on the mean of the two objectives, each as a share of its range up to the reference."""

    def __init__(self, grace_epochs: int, reduction_factor: int, max_epochs: int) -> None:
        self._rule = _asha(grace_epochs, reduction_factor, max_epochs, metric="mean")

    def report(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> str:
        """Report the mean."""
        mean = (metrics["top1"] / 100 - metrics["latency_ms"]) / 2
        return self._rule.report(trial_id, epoch, {**metrics, "mean": mean})


class SyneTune:
    """MOASHA of another process; see moasha_server.py."""

    def __init__(
        self, server: subprocess.Popen[str], grace_epochs: int, reduction_factor: int, max_epochs: int
    ) -> None:
        self._server = server
        self._ask({"new": [grace_epochs, reduction_factor, max_epochs]})

    def report(self, trial_id: str, epoch: int, metrics: dict[str, Any]) -> str:
        """Ask the other process, though not about a network that closed nothing yet: that is so for every row."""
        if not is_judged(metrics):
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
    make_rule: Callable[[int, int, int], Any]
    """(first rung, eta, epochs of a trial) -> its rule."""
    has_lineage: bool = False
    """Whether a trial goes on from the nearest finished one under less pressure, for LINEAGE_SHARE of the epochs."""


def _pareto_asha(grace_epochs: int, reduction_factor: int, max_epochs: int) -> StoppingRule:
    return ParetoASHA(
        [("top1", "max"), ("latency_ms", "min")],
        grace_epochs=grace_epochs,
        reduction_factor=reduction_factor,
        max_epochs=max_epochs,
    )


def _asha(grace_epochs: int, reduction_factor: int, max_epochs: int, metric: str = "top1") -> StoppingRule:
    return asha(metric, "max", grace_epochs=grace_epochs, reduction_factor=reduction_factor, max_epochs=max_epochs)


def _no_rule(grace_epochs: int, reduction_factor: int, max_epochs: int) -> StoppingRule:
    return NoRule()


UNSTOPPED = [Row("random, no stopping", "random", _no_rule), Row("TPE, no stopping", "tpe", _no_rule)]
FULL = UNSTOPPED[0].name


def rows_of(syne_tune: subprocess.Popen[str] | None) -> list[Row]:
    """Return what stops trials. syne_tune: the server; None leaves its row out."""
    rows = [
        Row("random, Ray's ASHA on top1", "random", _asha),
        Row("random, ASHA on the mean of both", "random", Scalarised),
        Row("random, ParetoASHA", "random", _pareto_asha),
        Row("TPE, ParetoASHA", "tpe", _pareto_asha),
        Row("random, ParetoASHA, lineage", "random", _pareto_asha, has_lineage=True),
    ]
    if syne_tune is not None:
        rows.insert(2, Row("random, Syne Tune's MOASHA", "random", partial(SyneTune, syne_tune)))
    return rows


class Trials:
    """The curves of one simulated search. Trial i has the same values in every random row of one seed, the same noise and speed."""

    def __init__(self, row: Row, surrogates: "Surrogates", seed: int) -> None:
        self.searcher = OptunaSuggestions(row.algorithm, seed)
        self.gating_epochs = DIGITS.gating.epochs  # as many on each data set
        self.curves: list[tuple[np.ndarray, np.ndarray]] = []
        self.speeds: list[float] = []
        self._row, self._surrogates, self._seed = row, surrogates, seed
        self._stages: dict[str, GatingConfig] = {}
        self._finished: set[str] = set()

    def start(self) -> int:
        """Suggest a trial and return its number."""
        number = len(self.curves)
        draw = np.random.default_rng([self._seed, number])
        self.speeds.append(draw.uniform(0.8, 1.25))
        values = self.searcher.suggest(number)
        surrogates = self._surrogates
        surrogate = surrogates.of_children if self._has_parent(number, values) else surrogates.of_trials
        assert surrogate is not None
        self.curves.append(surrogate.curve(values, draw))
        return number

    def num_epochs(self, number: int) -> int:
        """Return the epochs of a trial."""
        return len(self.curves[number][0])

    def stage(self, number: int, epoch: int) -> dict[str, Any]:
        """Return what a report says of the trial's stages; one with a parent has a share of the epochs of each."""
        gating_epochs = round(self.gating_epochs * self.num_epochs(number) / DIGITS.num_epochs)
        return {
            "epoch": epoch,
            "stage": "gate" if epoch <= gating_epochs else "finetune",
            "gating_epochs": gating_epochs,
        }

    def point(self, number: int, epoch: int) -> tuple[float, float]:
        """Return (top1, latency) after an epoch."""
        top1, macs = self.curves[number]
        return float(top1[epoch - 1]), float(macs[epoch - 1])

    def finish(self, number: int) -> None:
        """Take note of a trial that has run to its end."""
        self._finished.add(f"{number:04d}")
        self.searcher.tell(number, self.point(number, self.num_epochs(number)))

    def _has_parent(self, number: int, values: Values) -> bool:
        if not self._row.has_lineage:
            return False
        stage = DIGITS.gating.model_copy(update={"target_ratio": values["gating.target_ratio"]})
        self._stages[f"{number:04d}"] = stage
        return choose_parent(stage, {name: self._stages[name] for name in self._finished}) is not None


@dataclass(frozen=True)
class Surrogates:
    """Of trials that start from the unpruned network, and of those that go on from another trial."""

    of_trials: Surrogate
    of_children: Surrogate | None

    @classmethod
    def of(cls, data: str) -> "Surrogates":
        """Fit them to what was recorded on this data set."""
        num_epochs = BASES[data].num_epochs
        children = (
            Surrogate(curves_file(data, LINEAGE_SHARE), round(LINEAGE_SHARE * num_epochs))
            if data == WITH_LINEAGE
            else None
        )
        return cls(Surrogate(curves_file(data), num_epochs), children)


def simulate(
    row: Row, surrogates: Surrogates, rungs: tuple[int, int], seed: int
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yield (epochs spent so far, (top1, latency)) for each trial that finishes, until the budget is spent."""
    max_epochs = surrogates.of_trials.num_epochs
    trials, rule = Trials(row, surrogates, seed), row.make_rule(*rungs, max_epochs)
    running: list[tuple[float, int, int]] = []  # (time at which the epoch ends, trial, epoch)

    def start(now: float) -> None:
        number = trials.start()
        heapq.heappush(running, (now + trials.speeds[number], number, 1))

    for _ in range(NUM_WORKERS):
        start(0.0)
    for spent in range(1, NUM_TRIALS * max_epochs + 1):
        now, number, epoch = heapq.heappop(running)
        point = trials.point(number, epoch)
        metrics = {"top1": point[0], "latency_ms": point[1], "macs_ratio": point[1], **trials.stage(number, epoch)}
        if epoch == trials.num_epochs(number):
            trials.finish(number)
            yield spent, point
            start(now)
        elif rule.report(str(number), judged_epoch(metrics, trials.gating_epochs), metrics) == "stop":
            trials.searcher.tell(number, None)
            start(now)
        else:
            heapq.heappush(running, (now + trials.speeds[number], number, epoch + 1))


def volumes(row: Row, surrogates: Surrogates, rungs: tuple[int, int], seed: int) -> list[tuple[int, float]]:
    """Return (epochs spent, hypervolume of the finished networks) after each trial that finished."""
    points: list[tuple[float, float]] = []
    found = []
    for spent, point in simulate(row, surrogates, rungs, seed):
        points.append(point)
        found.append((spent, hypervolume(points, ["max", "min"], REFERENCE)))
    return found


def volume_at(found: Sequence[tuple[int, float]], num_epochs: float) -> float:
    """Return the hypervolume after so many epochs."""
    return max((volume for spent, volume in found if spent <= num_epochs), default=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate what has no result yet and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200, help="after which no further row is begun")
    parser.add_argument("--syne-tune", metavar="PYTHON", help="the Python of an environment that has syne-tune")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args(argv)
    if not arguments.render:
        _simulate_missing(arguments.seconds, arguments.syne_tune)
    (RESULTS / "search.md").write_text(_page(ROWS.read()))
    return 0


def _simulate_missing(seconds: float, syne_tune: str | None) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    server = None if syne_tune is None else _start(syne_tune)
    cases = _cases(server)
    ours = Path(__file__).parents[1] / "orchestrator"
    files = [
        *CURVES.glob("*.parquet"),
        *(ours / name for name in ("pareto/sorting.py", "pareto/asha.py", "tuning/descend.py")),
    ]
    source = source_hash(__file__, *sorted(files))
    surrogates = {data: Surrogates.of(data) for data in BASES}

    def measure(name: str) -> dict[str, Any]:
        began = time.process_time()
        case = cases[name]
        found = [volumes(case.row, surrogates[case.data], case.rungs, seed) for seed in range(NUM_SEEDS)]
        budget = NUM_TRIALS * BASES[case.data].num_epochs
        is_full = name == _name(case.data, FULL)
        full = [run[-1][1] for run in found] if is_full else ROWS.read()[_name(case.data, FULL)]["full"]
        return {
            "model": name, "source": source, "full": full if is_full else None,
            "percent": [[100 * volume_at(run, share * budget) / whole for share in SHARES]
                        for run, whole in zip(found, full, strict=True)],
            "needed": [next((100 * spent / budget for spent, volume in run if volume >= 0.95 * whole), 100.0)
                       for run, whole in zip(found, full, strict=True)],
            "finished": [len(run) for run in found],
            "cpu_s": time.process_time() - began,
            "machine": machine("optuna", "ray", "scikit-learn"),
        }  # fmt: skip

    ROWS.fill(ROWS.missing(cases, source), seconds, measure, lambda row: f"{row['model']}: {row['cpu_s']:.0f} CPU s")


@dataclass(frozen=True)
class Case:
    """What a row of the tables simulates."""

    data: str
    row: Row
    rungs: tuple[int, int]


def _cases(syne_tune: subprocess.Popen[str] | None) -> dict[str, Case]:
    """Return all, by name; the full search of each data set, which the others are compared with, before its others."""
    cases: dict[str, Case] = {}
    for data in BASES:
        cases |= {_name(data, row.name): Case(data, row, RUNGS[0]) for row in UNSTOPPED}
        for rungs in RUNGS:
            rows = [row for row in rows_of(syne_tune) if data == WITH_LINEAGE or not row.has_lineage]
            cases |= {_name(data, row.name, rungs): Case(data, row, rungs) for row in rows}
    return cases


def _name(data: str, name: str, rungs: tuple[int, int] | None = None) -> str:
    return f"{data}: {name}" if rungs is None else f"{data}: {name} @ {rungs[0]}, eta {rungs[1]}"


def _start(python: str) -> subprocess.Popen[str]:
    server = Path(__file__).with_name("moasha_server.py")
    return subprocess.Popen([python, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _table(rows: Sequence[tuple[str, dict[str, Any]]], full: dict[str, Any]) -> str:
    head = " | ".join(f"{share:.0%} of the epochs" for share in SHARES)
    lines = "\n".join(_line(name, row, full) for name, row in rows)
    differences = " | ".join(f"minus random, {share:.0%}" for share in COMPARED_SHARES)
    return (
        f"| search | {head} | {differences} | 95 % after | finished |\n"
        f"| --- |{' --- |' * (len(SHARES) + len(COMPARED_SHARES) + 2)}\n{lines}"
    )


def _line(name: str, row: dict[str, Any], full: dict[str, Any]) -> str:
    cells = []
    for ratios in zip(*row["percent"], strict=True):
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
    cells += [_difference(row, full, share) for share in COMPARED_SHARES]
    cells += [f"{statistics.median(row['needed']):.0f} %", f"{statistics.median(row['finished']):.0f}"]
    return f"| {name} | {' | '.join(cells)} |"


def _difference(row: dict[str, Any], other: dict[str, Any], share: float) -> str:
    """Return the mean difference after a share of the epochs, and its standard error."""
    place = SHARES.index(share)
    differences = np.array(row["percent"])[:, place] - np.array(other["percent"])[:, place]
    return f"{differences.mean():+.2f} ± {differences.std(ddof=1) / len(differences) ** 0.5:.2f}"


def _page(rows: dict[str, dict[str, Any]]) -> str:
    num_epochs = DIGITS.num_epochs
    parts = [
        "# The front found, by the epochs spent",
        f"`python -m benchmarks.bench_search --syne-tune PYTHON`, {sum(row['cpu_s'] for row in rows.values()):.0f} CPU seconds.",
        f"Hypervolume of the finished networks (top1 against latency, from {REFERENCE[0]:g} % and the unpruned network's latency), "
        "in percent of what random search without stopping has found in the end with the same seed; median and quartiles over "
        f'n = {NUM_SEEDS} seeds. "95 % after": share of the full search\'s epochs until 95 % of its hypervolume is found, '
        'median. "minus random": mean difference to random without stopping with the same seed, and its standard error. Every row '
        f"spends {NUM_TRIALS * num_epochs} epochs ({NUM_TRIALS} trials of {num_epochs}); those that stop trials start more.",
    ]
    for data in BASES:
        parts += [f"## {TITLES[data]}", *_tables(data, rows), _foreseen(data)]
    parts += [
        "## What was simulated",
        "Schedulers, samplers and the choice of a parent are real, trials are not: curves come from Gaussian processes over "
        f"{', '.join(SPACE)}, fitted to real trials (`benchmarks/data`, recorded with record_trials.py). "
        f"{' '.join(_fitted(data) for data in BASES)} Curves of trials with a parent come from another one, fitted to the "
        f"{_num_children()} of `{curves_file(WITH_LINEAGE, LINEAGE_SHARE).name}`; it does not know which parent a trial has. "
        "Latency is proportional to "
        f"MACs. {NUM_WORKERS} workers in virtual time, an epoch takes 0.8 to 1.25 by trial. A network with macs_ratio "
        "above 0.95 is judged in no row while its gates are trained.",
        f"{max(row['machine'] for row in rows.values())}, syne-tune 0.16.0.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tables(data: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the tables of one data set, each under a line that says what it is of."""
    full, num_epochs = rows[_name(data, FULL)], BASES[data].num_epochs
    names = [row.name for row in rows_of(None)]
    names.insert(2, "random, Syne Tune's MOASHA")
    parts = ["Without stopping:", _table([(row.name, rows[_name(data, row.name)]) for row in UNSTOPPED], full)]
    for rungs in RUNGS:
        epochs = ", ".join(map(str, rung_epochs(*rungs, num_epochs)))
        found = [(name, rows[_name(data, name, rungs)]) for name in names if _name(data, name, rungs) in rows]
        default = ", as a search does it unless told otherwise" if rungs == RUNGS[-1] else ""
        parts += [f"Rungs after epoch {epochs}, eta {rungs[1]}{default}:", _table(found, full)]
    unstopped = rows[_name(data, "TPE, no stopping")]
    differences = ", ".join(
        f"{_difference(dict(found)['TPE, ParetoASHA'], unstopped, share)} after {share:.0%}"
        for share in COMPARED_SHARES
    )
    return [
        *parts,
        f"TPE with ParetoASHA by these rungs, minus TPE without stopping with the same seed: {differences} of the epochs.",
    ]


def _fitted(data: str) -> str:
    """Return what the surrogate of one data set rests on."""
    surrogate = Surrogate(curves_file(data), BASES[data].num_epochs)
    top1_error, macs_error = surrogate.error
    return (
        f"{TITLES[data]}: {surrogate.num_trials} trials; for one left out the last epoch's top1 is missed by {top1_error:.1f} points "
        f"and macs_ratio by {macs_error:.3f} on average."
    )


def _num_children() -> int:
    curves = _recorded(curves_file(WITH_LINEAGE, LINEAGE_SHARE))
    return sum(len(curve) < BASES[WITH_LINEAGE].num_epochs for curve in curves)


def _foreseen(data: str) -> str:
    """Return how well each epoch of the recorded trials tells the order of their ends."""
    curves, base = _recorded(curves_file(data)), BASES[data]

    def correlations(metric: str) -> str:
        values = np.array([[row[metric] for row in curve] for curve in curves])
        return " | ".join(f"{spearmanr(column, values[:, -1]).statistic:.2f}" for column in values.T)

    epochs = range(1, base.num_epochs + 1)
    return (
        f"Why not earlier: rank correlation of what the {len(curves)} recorded trials report after an epoch with what they report "
        f"after the last one ({base.gating.epochs} epochs under gates, then fine-tuning). While gates close, a network has not the "
        "size that it is compared by; the cut costs accuracy, from which the next epoch recovers.\n\n"
        f"| after epoch | {' | '.join(map(str, epochs))} |\n| --- |{' --- |' * len(epochs)}\n"
        f"| MACs | {correlations('macs_ratio')} |\n| top1 | {correlations('top1')} |"
    )


if __name__ == "__main__":
    sys.exit(main())
