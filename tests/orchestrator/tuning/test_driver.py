"""Searches under real Tune and real MLflow, with trials that only report."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from rich.console import Console

from orchestrator import steer
from orchestrator.cluster import connection
from orchestrator.cluster.interrupts import Interrupted
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import DataError, TrialError, UserError
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.progress import Progress
from orchestrator.storage.paths import StoragePaths
from orchestrator.storage.records import read_results
from orchestrator.storage.run_dir import claim
from orchestrator.tracking.store import sqlite_uri
from orchestrator.tuning import driver
from orchestrator.tuning.driver import run_search
from orchestrator.tuning.trainable import run_or_report
from orchestrator.tuning.trials import request_maker
from tests.orchestrator import planted

# Each trial starts a process of its own: seconds on a machine that does nothing else, ten times that on a busy one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_EPOCHS = 3


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    os.environ.update({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"})
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        num_cpus=2, object_store_memory=150 * 2**20, log_to_driver=False, logging_level=logging.ERROR,
        dashboard_host="127.0.0.1", include_dashboard=True,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> StoragePaths:
    """One for all tests: MLflow takes seconds to make its store."""
    return StoragePaths(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def no_training(ray_here: None, storage: StoragePaths, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The base network and the unpruned one are given; signals are put back, since the driver takes them over."""
    monkeypatch.setattr(
        driver, "ensure_base", lambda config, storage, cluster, stop_files: storage.root / "weights.safetensors"
    )
    monkeypatch.setattr(driver, "measure_fixed", lambda *_, **files: dict(UNPRUNED))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


UNPRUNED = {
    "trial_id": "unpruned",
    "kind": "unpruned",
    "status": "finished",
    "top1": 99.0,
    "top5": 100.0,
    "latency_ms": 10.0,
    "macs": 1000,
    "macs_ratio": 1.0,
    "params": 500,
}


def make_plan(storage: StoragePaths, name: str, **search: Any) -> SearchPlan:
    config = SearchConfig.model_validate(
        {
            "name": name,
            "base": planted.tiny_base(profile={"clock": "model"}),
            "params": {"gating.loss_weight": {"type": "float", "low": 0.1, "high": 4.0}},
            "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
            "search": {"algorithm": "random", "num_trials": 3, "seed": 0, **search},
            "scheduler": {"type": "none"},
        }
    )
    return SearchPlan(config=config, cluster=ClusterConfig(), storage=storage, run=storage.run(name))


def make_trainable(**at: Any) -> Callable[[dict[str, Any]], None]:
    """Return a trial that reports as the real one does, and what goes wrong with it.

    fail: trial that raises TrialError.    starve: trial that asks for more memory than there is.    crash: trial that raises
    what no trial should.    wait: trials that wait after
    their first epoch.    dominated: trial that is worse than all others.
    """

    def trainable(config: dict[str, Any]) -> None:
        import torch
        from ray import tune

        from orchestrator.storage.paths import RunPaths, TrialPaths
        from orchestrator.storage.records import read_metrics, write_metrics
        from orchestrator.training.out_of_memory import lack_of_memory_named
        from orchestrator.training.ranks import Ranks
        from orchestrator.trial.assignment import Assignment

        assignment = Assignment.from_dict(config["assignment"])
        trial_id, run, paths = assignment.name, RunPaths(assignment.folder.parents[1]), TrialPaths(assignment.folder)
        weight = assignment.config.gating.loss_weight
        with open(run.root / "starts.txt", "a") as file:
            file.write(f"{trial_id} {weight!r}\n")
        rows = read_metrics(paths.metrics) if paths.metrics.exists() else []
        for epoch in range(len(rows) + 1, NUM_EPOCHS + 1):
            penalty = 50.0 if trial_id == at.get("dominated") else 0.0
            metrics = {
                "epoch": epoch, "stage": "gate" if epoch < NUM_EPOCHS else "finetune", "timestamp_ms": 1000 * epoch,
                "loss": 0.5, "top1": 99.0 - weight - penalty, "top5": 99.5, "latency_ms": 10.0 - weight + penalty,
                "macs": 100, "macs_ratio": 0.5, "params": 50, "open_channels": 8, "loss_weight": weight,
                "train_s": 1.0, "eval_s": 0.5, "measure_s": 0.25, "final": False,
            }  # fmt: skip
            rows.append(metrics)
            write_metrics(paths.metrics, rows)
            tune.report(metrics)
            if trial_id == at.get("fail"):
                raise TrialError(f"{trial_id}: the loss is nan in epoch {epoch}")
            if trial_id == at.get("starve"):
                with lack_of_memory_named(assignment.config, Ranks()):
                    torch.empty(10**15)
            if trial_id == at.get("crash"):
                raise ZeroDivisionError("a bug")
            while trial_id in at.get("wait", ()) and (run.root / "wait").exists():
                time.sleep(0.05)
        tune.report({**rows[-1], "latency_p10_ms": 1.0, "latency_p90_ms": 2.0, "latency_device": "test", "final": True})

    def reporting(config: dict[str, Any]) -> None:
        run_or_report(config, run=trainable)

    return reporting


def run(plan: SearchPlan, trainable: Callable[[dict[str, Any]], None]) -> tuple[Outcome, str]:
    with claim(plan.run, plan.config), Progress(plan.config, Console(stderr=True)) as progress:
        return run_search(plan, progress, trainable)


def statuses(plan: SearchPlan) -> dict[str, str]:
    return {row["trial_id"]: row["status"] for row in read_results(plan.run.results) if row["kind"] == "trial"}


def starts(plan: SearchPlan) -> list[str]:
    return sorted(line.split()[0] for line in (plan.run.root / "starts.txt").read_text().splitlines())


def test_a_search_records_every_trial(storage: StoragePaths, capsys: pytest.CaptureFixture[str]):
    plan = make_plan(storage, "plain", num_trials=5, max_concurrent=2)
    outcome, how_to_open = run(plan, make_trainable(fail="trial_0001", crash="trial_0002", starve="trial_0003"))
    assert statuses(plan) == {
        "trial_0000": "finished",
        "trial_0001": "failed",
        "trial_0002": "failed",
        "trial_0003": "failed",
        "trial_0004": "finished",
    }
    row = next(row for row in outcome.rows if row["trial_id"] == "trial_0000")
    assert row["top1"] == 99.0 - row["gating.loss_weight"]
    assert (row["latency_p90_ms"], row["latency_device"], row["train_s"]) == (2.0, "test", 3.0)
    assert row["mlflow_run_id"]
    assert plan.run.pareto.exists()
    assert plan.run.report.exists()
    # what the trial found wrong is not tried again; a bug is, once, since it looks like a driver that died
    assert starts(plan) == ["trial_0000", "trial_0001", "trial_0002", "trial_0002", "trial_0003", "trial_0004"]
    printed = capsys.readouterr()
    assert "trial_0001 failed: trial_0001: the loss is nan in epoch 1" in printed.err
    assert "trial_0002 failed: trial_0002: ZeroDivisionError: a bug" in printed.err
    assert "trial_0003 failed: out of memory on cpu" in printed.err
    assert printed.out == ""  # Ray is silent, and results are the caller's to print
    assert "mlflow ui" in how_to_open


def test_a_trial_whose_data_are_damaged_resumes_once_they_are_repaired(storage: StoragePaths):
    plan = make_plan(storage, "damaged_data", num_trials=2, max_concurrent=1)

    def damaged(config: dict[str, Any]) -> None:
        raise DataError("1.jpg cannot be decoded; repair or remove it")

    with pytest.raises(UserError, match=r"1\.jpg cannot be decoded"):
        run(plan, lambda config: run_or_report(config, run=damaged))
    assert statuses(plan) == {}
    run(plan, make_trainable())
    assert statuses(plan) == {"trial_0000": "finished", "trial_0001": "finished"}


def test_a_search_that_has_ended_may_get_more_trials(storage: StoragePaths):
    run(make_plan(storage, "more", num_trials=1), make_trainable())
    plan = make_plan(storage, "more", num_trials=3)
    report = plan.run.report.read_text()
    outcome, _ = run(plan, make_trainable())
    assert statuses(plan) == dict.fromkeys(("trial_0000", "trial_0001", "trial_0002"), "finished")
    assert starts(plan) == ["trial_0000", "trial_0001", "trial_0002"]
    assert len(outcome.trials) == 3
    assert "trial_0002" in plan.run.report.read_text()
    assert "trial_0002" not in report
    client = MlflowClient(sqlite_uri(storage))
    experiment = client.get_experiment_by_name("more")
    parents = client.search_runs([experiment.experiment_id], "tags.`gator.kind` = 'search'")
    assert [parent.data.tags["gator.num_trials"] for parent in parents] == ["3"]


def test_a_stopped_trial_is_a_row_with_its_epoch(storage: StoragePaths):
    plan = make_plan(storage, "stopping", num_trials=2, max_concurrent=1)
    config = plan.config.model_validate(
        plan.config.model_dump() | {"scheduler": {"type": "pareto_asha", "grace_epochs": 1, "reduction_factor": 3}}
    )
    plan = SearchPlan(config=config, cluster=plan.cluster, storage=storage, run=plan.run)
    outcome, _ = run(plan, make_trainable(dominated="trial_0001"))
    assert statuses(plan) == {"trial_0000": "finished", "trial_0001": "stopped"}
    stopped = next(row for row in outcome.rows if row["status"] == "stopped")
    assert stopped["stopped_epoch"] == 1
    assert stopped["trial_id"] not in [row["trial_id"] for row in outcome.front]


def test_baselines_follow_the_trials_and_match_the_best(storage: StoragePaths):
    plan = make_plan(storage, "baselines", num_trials=2, max_concurrent=1)
    config = plan.config.model_validate(plan.config.model_dump() | {"baselines": ["random", "uniform"]})
    plan = SearchPlan(config=config, cluster=plan.cluster, storage=storage, run=plan.run)
    outcome, _ = run(plan, make_trainable())
    kinds = {row["trial_id"]: row["kind"] for row in outcome.rows}
    assert kinds == {
        "unpruned": "unpruned",
        "trial_0000": "trial",
        "trial_0001": "trial",
        "random": "random",
        "uniform": "uniform",
    }
    order = [line.split()[0] for line in (plan.run.root / "starts.txt").read_text().splitlines()]
    assert order == ["trial_0000", "trial_0001", "random", "uniform"]
    asked = TrialConfig.model_validate_json(plan.run.trial("uniform").config.read_bytes())
    assert (asked.pruning.choice, asked.pruning.macs_ratio, asked.num_epochs) == ("uniform", 0.5, NUM_EPOCHS)
    assert all(row["mlflow_run_id"] for row in outcome.rows)
    run(plan, make_trainable())
    assert len(starts(plan)) == 4  # nothing is run again


def test_an_interrupted_search_goes_on_where_it_stood(storage: StoragePaths):
    plan = make_plan(storage, "interrupted", num_trials=2, max_concurrent=1)
    plan.run.root.mkdir()
    waiting = make_trainable(wait=["trial_0001"])

    class InterruptingProgress(Progress):
        def epoch(self, trial_id: str, metrics: Any) -> None:
            super().epoch(trial_id, metrics)
            if trial_id == "trial_0001":
                os.kill(os.getpid(), signal.SIGTERM)

    with claim(plan.run, plan.config):
        (plan.run.root / "wait").touch()
        with pytest.raises(Interrupted) as interrupt:
            run_search(plan, InterruptingProgress(plan.config, Console(stderr=True)), waiting)
    assert interrupt.value.exit_code == 143
    assert statuses(plan) == {"trial_0000": "finished"}
    (plan.run.root / "wait").unlink()
    run(plan, waiting)
    assert statuses(plan) == {"trial_0000": "finished", "trial_0001": "finished"}
    assert starts(plan) == ["trial_0000", "trial_0001", "trial_0001"]
    first, again = [line for line in (plan.run.root / "starts.txt").read_text().splitlines() if "trial_0001" in line]
    assert first == again  # under its old values


class SteeringProgress(Progress):
    """Asks the search for something when a trial has reported its first epoch."""

    def __init__(self, plan: SearchPlan, requests: dict[str, list[str]]) -> None:
        super().__init__(plan.config, Console(stderr=True))
        self.root = plan.run.root
        self.requests = requests

    def epoch(self, trial_id: str, metrics: Any) -> None:
        super().epoch(trial_id, metrics)
        if request := self.requests.pop(trial_id, None):
            assert steer.main([str(self.root), *request]) == 0

    def say(self, text: str) -> None:
        super().say(text)
        if "no further trial starts" in text:
            (self.root / "wait").unlink()


def test_a_trial_of_a_running_search_is_ended(storage: StoragePaths, capsys: pytest.CaptureFixture[str]):
    plan = make_plan(storage, "ended", num_trials=2, max_concurrent=1)
    with claim(plan.run, plan.config):
        (plan.run.root / "wait").touch()  # without the request trial_0000 would run forever
        progress = SteeringProgress(plan, {"trial_0000": ["--end", "trial_0000"]})
        outcome, _ = run_search(plan, progress, make_trainable(wait=["trial_0000"]))
    assert statuses(plan) == {"trial_0000": "stopped", "trial_0001": "finished"}
    assert [row["stopped_epoch"] for row in outcome.rows if row["status"] == "stopped"] == [1]
    assert "Asked for: trial_0000 ends" in capsys.readouterr().err


def test_a_running_search_runs_more_at_once_then_is_drained(storage: StoragePaths, capsys: pytest.CaptureFixture[str]):
    plan = make_plan(storage, "drained", num_trials=4, max_concurrent=1)
    with claim(plan.run, plan.config):
        (plan.run.root / "wait").touch()  # both wait until the search has read the last request
        requests = {"trial_0000": ["--max-concurrent", "2"], "trial_0001": ["--drain"]}
        run_search(plan, SteeringProgress(plan, requests), make_trainable(wait=["trial_0000", "trial_0001"]))
    assert statuses(plan) == {"trial_0000": "finished", "trial_0001": "finished"}
    assert "no further trial starts; rerun the same command" in capsys.readouterr().err
    run(plan, make_trainable())
    assert starts(plan) == ["trial_0000", "trial_0001", "trial_0002", "trial_0003"]


def test_values_that_do_not_fit_together_fail_their_trial_alone(storage: StoragePaths):
    plan = make_plan(storage, "clash")
    planted.plant(plan.run, plan.config, [])
    make = request_maker(plan, storage.root / "weights.safetensors")
    assert "error" not in make("trial_0000", {"gating.epochs": 2, "gating.warmup_epochs": 2.0}, None)
    config = make("trial_0001", {"gating.epochs": 1, "gating.warmup_epochs": 2.0}, None)
    assert config["trial_id"] == "trial_0001"
    assert "warmup_epochs 2 exceeds epochs 1" in config["error"]


def test_a_search_whose_report_is_missing_needs_no_ray_to_end(storage: StoragePaths, monkeypatch: pytest.MonkeyPatch):
    plan = make_plan(storage, "unreported", num_trials=1)
    planted.plant(plan.run, plan.config, [planted.unpruned(), planted.stopped(0, epoch=1)])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "connect", lambda cluster: pytest.fail("connects to Ray"))
    outcome, _ = run(plan, make_trainable())
    assert plan.run.report.exists()
    assert [row["trial_id"] for row in outcome.rows] == ["unpruned", "trial_0000"]
