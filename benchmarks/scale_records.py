"""All that the search's own process does for a trial, without Ray: suggest, decide, record, MLflow, progress."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from rich.console import Console

from benchmarks.instant_trial import NUM_EPOCHS, made_up_result
from benchmarks.machine import machine
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.planning.space import load_space
from orchestrator.reporting.progress import Progress
from orchestrator.storage.paths import StoragePaths
from orchestrator.storage.run_dir import claim
from orchestrator.tracking.tracker import Tracker
from orchestrator.tuning.monitoring import Monitor
from orchestrator.tuning.recorder import Recorder, TuneListener
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.schedulers import make_scheduler
from orchestrator.tuning.searchers import OptunaSearcher


class Stopwatch:
    """CPU seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def time(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the call returns."""
        began = time.process_time()
        value = call(*arguments)
        self.seconds[name] += time.process_time() - began
        return value


def through_records(num_trials: int, block: int = 250) -> Iterator[dict[str, Any]]:
    """Run so many trials that end at once through the recorder, as Tune would call it; yield a row per block of trials."""
    config = load_space(
        "digits",
        [f"search.num_trials={num_trials}", "search.algorithm=random", "scheduler.grace_epochs=1", "base.gating.epochs=6",
         "base.finetuning.epochs=3"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
        storage = StoragePaths(Path(folder))
        with claim(storage.run(config.name), config):
            yield from _run(config, storage, num_trials, block, Console(file=nowhere))


def _run(
    config: SearchConfig, storage: StoragePaths, num_trials: int, block: int, console: Console
) -> Iterator[dict[str, Any]]:
    run = storage.run(config.name)
    tracker = Tracker.open(config, run, storage)
    searcher = OptunaSearcher(
        config, run.study, [], lambda trial_id, params, parent: {"trial_id": trial_id, "params": params}
    )
    scheduler = make_scheduler(config, ReportLog(run.reports))
    record = Recorder(run, config, tracker, Progress(config, console), Monitor(config.name, num_gpus=0))
    recorder = TuneListener(record, searcher, scheduler, ClusterConfig())
    for first in range(0, num_trials, block):
        watch, num_reports = Stopwatch(), 0
        for _ in range(block):
            suggestion = watch.time("suggest", searcher.suggest, "")
            trial = SimpleNamespace(config=suggestion, error_file=None)
            watch.time("record", recorder.on_trial_start, 0, [], trial)
            for epoch in range(1, NUM_EPOCHS + 2):
                result = made_up_result(suggestion["params"], min(epoch, NUM_EPOCHS), is_final=epoch > NUM_EPOCHS)
                num_reports += 1
                decision = watch.time("decide", scheduler.on_trial_result, None, trial, result)
                watch.time("record", recorder.on_trial_result, 0, [], trial, result)
                if decision == "STOP":
                    break
            watch.time("record", recorder.on_trial_complete, 0, [], trial)
        yield {
            "part": "records", "first": first, "num": block,
            **{f"{name}_ms": 1000 * seconds / block for name, seconds in watch.seconds.items()},
            "reports": num_reports / block, "memory_mib": psutil.Process().memory_info().rss / 2**20,
            "machine": machine("optuna", "mlflow", "ray", "pyarrow"),
        }  # fmt: skip
