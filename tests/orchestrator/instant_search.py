"""A whole search whose trials only report: real Tune, real scheduler, searcher, records and MLflow, no network.

python -m tests.orchestrator.instant_search STORAGE SECONDS_PER_EPOCH [NUM_TRIALS, 6] [MLFLOW_URI, SQLite in STORAGE] [ALGORITHM, optuna]
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from orchestrator.cli import run_command
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.progress import Progress
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import read_metrics, write_metrics
from orchestrator.storage.run_dir import claim
from orchestrator.trial.assignment import Assignment
from orchestrator.tuning import driver as driver_driver
from orchestrator.tuning.trainable import run_or_report
from tests.orchestrator import planted

NUM_GATING, NUM_FINETUNING = 3, 3
UNPRUNED = {
    "trial_id": "unpruned", "kind": "unpruned", "status": "finished", "top1": 99.0, "top5": 100.0, "latency_ms": 10.0,
    "macs": 1000, "macs_ratio": 1.0, "params": 500,
}  # fmt: skip


def config_of(num_trials: int, algorithm: str = "tpe") -> SearchConfig:
    """Return the search: one trial at a time, for the model clock promises that the same seed gives the same table."""
    return SearchConfig.model_validate(
        {
            "name": "instant",
            "base": planted.tiny_base(NUM_GATING, NUM_FINETUNING, profile={"clock": "model"}),
            "params": {
                "gating.loss_weight": {"type": "float", "low": 0.1, "high": 4.0},
                "finetuning.lr": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
            },
            "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
            "search": {"algorithm": algorithm, "num_trials": num_trials, "seed": 0},
            "scheduler": {"type": "pareto_asha", "grace_epochs": 1, "reduction_factor": 2},
        }
    )


def report_epochs(config: dict[str, Any]) -> None:
    """Report the epochs that metrics.parquet holds, add those it lacks, then report the end: what a trial's driver does."""
    assignment = Assignment.from_dict(config["assignment"])
    trial_id, run, trial = assignment.name, RunPaths(assignment.folder.parents[1]), assignment.config
    with open(run.root / "starts.txt", "a") as file:
        file.write(f"{trial_id}\n")
    seconds_per_epoch = float((run.root.parent / "seconds_per_epoch").read_text())
    path = run.trial(trial_id).metrics
    rows = read_metrics(path) if path.exists() else []
    for row in rows:  # the driver before may have died before it told the last one
        tune.report(row)
    for epoch in range(len(rows) + 1, NUM_GATING + NUM_FINETUNING + 1):
        time.sleep(seconds_per_epoch)
        wait_until_reachable(run.config)
        rows.append(_metrics(trial, epoch))
        write_metrics(path, rows)
        tune.report(rows[-1])
    tune.report({**rows[-1], "latency_p10_ms": 1.0, "latency_p90_ms": 2.0, "latency_device": "none", "final": True})


def _metrics(trial: TrialConfig, epoch: int) -> dict[str, Any]:
    weight, lr = trial.gating.loss_weight or 0.0, trial.finetuning.lr
    return {
        "epoch": epoch, "stage": "gate" if epoch <= NUM_GATING else "finetune", "timestamp_ms": time.time_ns() // 1_000_000,
        "loss": 0.5, "top1": 90.0 - weight - 40 * abs(math.log10(10 * lr)) + epoch, "top5": 99.5, "latency_ms": 10.0 - 2 * weight,
        "macs": 100, "macs_ratio": 0.5, "params": 50, "open_channels": 8, "loss_weight": weight, "train_s": 1.0,
        "eval_s": 0.5, "measure_s": 0.25, "final": False,
    }  # fmt: skip


def main(
    folder: str, seconds_per_epoch: str, num_trials: str = "6", mlflow_uri: str = "", algorithm: str = "tpe"
) -> int:
    """Run the search, or go on with it, and return the exit code."""
    storage = StoragePaths(Path(folder))
    storage.root.mkdir(parents=True, exist_ok=True)
    (storage.root / "seconds_per_epoch").write_text(seconds_per_epoch)
    driver_driver.ensure_base = lambda config, storage, cluster, stop_files: storage.root / "weights.safetensors"
    driver_driver.measure_fixed = lambda *_, **files: dict(UNPRUNED)
    config = config_of(int(num_trials), algorithm)
    cluster = ClusterConfig(storage=folder, mlflow_uri=mlflow_uri or None)
    plan = SearchPlan(config=config, cluster=cluster, storage=storage, run=storage.run(config.name))

    def body() -> int:
        with claim(plan.run, config), Progress(config, Console(stderr=True)) as progress:
            driver_driver.run_search(plan, progress, lambda config: run_or_report(config, report_epochs))
        return 0

    return run_command("search", None, body)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
