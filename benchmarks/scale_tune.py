"""Trials that end at once through the whole path: Tune, a driver process for each, scheduler, searcher, records, MLflow."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.instant_trial import instant
from benchmarks.machine import machine
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.planning.plan import SearchPlan
from orchestrator.planning.space import load_space
from orchestrator.reporting.progress import Progress
from orchestrator.storage.paths import StoragePaths
from orchestrator.storage.records import read_results
from orchestrator.storage.run_dir import claim
from orchestrator.tuning import driver
from orchestrator.tuning.recorder import TuneListener
from orchestrator.tuning.schedulers import RuleScheduler
from orchestrator.tuning.searchers import OptunaSearcher

NUM_CONCURRENT = 4
UNPRUNED = {
    "trial_id": "unpruned", "kind": "unpruned", "status": "finished", "top1": 99.0, "top5": 100.0, "latency_ms": 1.0,
    "macs": 1_000_000, "macs_ratio": 1.0, "params": 1000,
}  # fmt: skip
OURS = (
    (OptunaSearcher, "suggest"),
    (RuleScheduler, "on_trial_result"),
    (TuneListener, "on_trial_start"),
    (TuneListener, "on_trial_result"),
    (TuneListener, "on_trial_complete"),
)
"""What Tune calls of ours for each trial."""


def config_of(num_trials: int, minutes: float) -> SearchConfig:
    """Return the search; no trial starts after so many minutes, and the same call goes on with the rest."""
    return load_space(
        "digits",
        [f"search.num_trials={num_trials}", "search.algorithm=random", f"search.max_concurrent={NUM_CONCURRENT}",
         f"search.max_hours={minutes / 60}", "scheduler.grace_epochs=1", "base.gating.epochs=6", "base.finetuning.epochs=3"],
    )  # fmt: skip


def through_tune(storage: Path, num_trials: int, minutes: float) -> dict[str, Any]:
    """Run trials for so many minutes, or the rest of them; return the row of this piece."""
    driver.ensure_base = lambda config, storage, cluster, stop_files: storage.root / "weights.safetensors"
    driver.measure_fixed = lambda *_, **files: dict(UNPRUNED)
    for step in ("_remeasure", "_register_front"):  # both are about networks, and there are none
        setattr(driver, step, lambda *arguments: None)
    config, paths = config_of(num_trials, minutes), StoragePaths(storage)
    share = 0.95 * (os.cpu_count() or 1) / NUM_CONCURRENT
    cluster = ClusterConfig(storage=str(storage), workers_per_trial=1, resources_per_worker={"CPU": share})
    plan = SearchPlan(config=config, cluster=cluster, storage=paths, run=paths.run(config.name))
    clock = _Clock()
    with open("/dev/null", "w") as nowhere, claim(plan.run, config):
        first = len(read_results(plan.run.results)) - 1 if plan.run.results.exists() else 0
        with _timed(clock), Progress(config, Console(file=nowhere)) as progress:
            driver.run_search(plan, progress, instant)
        rows = read_results(plan.run.results)
    num = len(rows) - 1 - first
    process = psutil.Process()
    return {
        "part": "tune", "first": first, "num": num, "seconds_per_trial": clock.seconds_of_trials / num,
        "ours_ms": 1000 * clock.ours_s / num, "process_ms": 1000 * clock.process_s / num,
        "by_call_ms": {name: 1000 * seconds / num for name, seconds in clock.by_call.items()},
        "memory_mib": process.memory_info().rss / 2**20,
        "ray_mib": sum(child.memory_info().rss for child in process.children(recursive=True)) / 2**20,
        "statuses": Counter(row["status"] for row in rows[1:]), "machine": machine("optuna", "mlflow", "ray", "pyarrow"),
    }  # fmt: skip


class _Clock:
    """Seconds of the search's process while trials ran: on the wall, of its CPU, and of its CPU in calls of ours."""

    def __init__(self) -> None:
        self.by_call: Counter[str] = Counter()
        self._began: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)

    def call(self, name: str, seconds: float) -> None:
        """Take note of a call of ours; the first one starts the clock."""
        now = time.monotonic(), time.process_time()
        self._began = self._began or now
        self._ended = now
        self.by_call[name] += seconds

    @property
    def ours_s(self) -> float:
        """CPU seconds in calls of ours."""
        return sum(self.by_call.values())

    @property
    def seconds_of_trials(self) -> float:
        """Seconds from the first call of ours to the last one."""
        return self._ended[0] - self._began[0] if self._began else 0.0

    @property
    def process_s(self) -> float:
        """CPU seconds of this process over that time: Tune's and ours."""
        return self._ended[1] - self._began[1] if self._began else 0.0


@contextmanager
def _timed(clock: _Clock) -> Iterator[None]:
    """Time the calls of OURS, those of them that are made within another one left out."""
    depth = threading.local()
    originals = [(kind, name, getattr(kind, name)) for kind, name in OURS]

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            depth.level = getattr(depth, "level", 0) + 1
            began = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                depth.level -= 1
                if depth.level == 0:
                    clock.call(label, time.thread_time() - began)

        return call

    for kind, name, function in originals:
        setattr(kind, name, timed(f"{kind.__name__}.{name}", function))
    try:
        yield
    finally:
        for kind, name, function in originals:
            setattr(kind, name, function)
