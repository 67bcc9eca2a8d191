"""What is recorded of every network of a search: that all four listeners hear of it, and of a trial that ends badly."""

import errno
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.cluster import waiting
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.errors import ClusterError, DataError, OrchestratorError, StorageError, TrialError, UserError
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import append_result, read_results
from orchestrator.trial.train_runs import TrainRuns
from orchestrator.tuning import driver, recorder, trainable
from orchestrator.tuning.baselines import run_baselines
from orchestrator.tuning.monitoring import Monitor
from orchestrator.tuning.recorder import Recorder, TuneListener
from tests.orchestrator import planted

anything = cast(Any, None)


class Heard:
    """Stands in for MLflow and the screen: keeps the ids of the networks that started and ended, and what was said."""

    def __init__(self) -> None:
        self.started_ids: list[str] = []
        self.ended_rows: list[dict[str, Any]] = []
        self.said: list[str] = []

    def trial_started(self, trial_id: str, params: Any, config: Any, kind: str) -> str:
        self.started_ids.append(trial_id)
        return f"run of {trial_id}"

    def trial_ended(self, trial_id: str, row: Any, status: str, error: str | None) -> None:
        self.ended_rows.append({**row, "status": status, "error": error})

    def started(self, trial_id: str, kind: str) -> None:
        self.started_ids.append(trial_id)

    def ended(self, row: Any) -> None:
        self.ended_rows.append(row)

    def say(self, text: str) -> None:
        """Keep what was said."""
        self.said.append(text)


def make_recorder(folder: Path, config: SearchConfig) -> tuple[Recorder, Heard, Heard]:
    mlflow, screen = Heard(), Heard()
    return (
        Recorder(RunPaths(folder), config, cast(Any, mlflow), cast(Any, screen), Monitor("planted", num_gpus=0)),
        mlflow,
        screen,
    )


def test_the_screen_hears_of_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = planted.search_config(
        references=[{"name": "other", "model": {"name": "resnet8_cifar", "num_classes": 10}}]
    )
    record, mlflow, screen = make_recorder(tmp_path, config)
    row = planted.unpruned() | {"trial_id": "other", "kind": "reference"}
    monkeypatch.setattr(driver, "measure_fixed", lambda *arguments, **options: row)
    plan: Any = SimpleNamespace(config=config, run=record.run, cluster=None)
    driver._measure_references(plan, record)
    assert mlflow.started_ids == screen.started_ids == ["other"]
    (shown,) = screen.ended_rows
    assert (shown["trial_id"], shown["mlflow_run_id"]) == ("other", "run of other")
    assert [row["mlflow_run_id"] for row in read_results(record.run.results)] == ["run of other"]


def test_mlflow_hears_of_a_baseline_that_cannot_be_made(tmp_path: Path) -> None:
    config = planted.search_config(baselines=["uniform"], search={"num_trials": 1, "algorithm": "random"})
    record, mlflow, screen = make_recorder(tmp_path, config)
    append_result(record.run.results, {"trial_id": "trial_0000", "kind": "trial", "status": "failed"})
    plan: Any = SimpleNamespace(config=config, run=record.run, cluster=None)
    run_baselines(cast(Any, SimpleNamespace(plan=plan, recorder=record)), tmp_path / "weights.safetensors")
    for listener in (mlflow, screen):
        assert listener.started_ids == ["uniform"]
        (row,) = listener.ended_rows
        assert (row["status"], row["error"]) == (
            "failed",
            "uniform: no trial has finished whose MACs a baseline could match",
        )
    assert read_results(record.run.results)[-1]["mlflow_run_id"] == "run of uniform"


def test_no_trial_has_failed_because_ray_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "answers", lambda: False)
    record, *_ = make_recorder(tmp_path, planted.search_config())
    trial = cast(Any, SimpleNamespace(config={"trial_id": "trial_0003"}, error_file=None))
    with pytest.raises(ClusterError, match=r"Ray is gone, and trial_0003 with it.*rerun the same command"):
        TuneListener(record, anything, anything, ClusterConfig()).on_trial_error(0, [], trial)
    assert not record.run.results.exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("1.jpg: repair it"), UserError),
        (StorageError("away"), OrchestratorError),
        (OSError(errno.ENOSPC, "disk"), OrchestratorError),  # of the trial's driver
        (TrialError("nan"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_fails_outside_a_trial_ends_the_search_and_leaves_no_row(
    error: Exception, expected: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, *_ = make_recorder(tmp_path, planted.search_config())
    listener = TuneListener(record, anything, anything, ClusterConfig())
    trial = cast(Any, SimpleNamespace(config={"trial_id": "trial_0003"}))
    monkeypatch.setattr(trainable.tune, "report", lambda result: listener.on_trial_result(0, [], trial, result))

    def run(config: dict[str, Any]) -> None:
        raise error

    trainable.run_or_report(trial.config, run)
    if expected is None:
        listener.on_step_end(0, [])  # the other trials go on
        return
    with pytest.raises(expected, match=re.escape(str(error))) as raised:
        listener.on_step_end(0, [])
    assert type(raised.value) is expected  # the exit code follows from it
    assert not record.run.results.exists()


@pytest.mark.parametrize("row", [planted.failed(3), planted.stopped(3, epoch=1)], ids=["failed", "stopped"])
def test_the_checkpoints_of_a_trial_go_when_it_has_its_row(row: dict[str, Any], tmp_path: Path) -> None:
    record, *_ = make_recorder(tmp_path / "run", planted.search_config())
    checkpoint = tmp_path / "train/trial_0003/checkpoint_0/state.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    replace(record, train_runs=TrainRuns(tmp_path / "train")).ended(row)
    assert not checkpoint.exists()


def test_a_trial_that_is_ended_before_its_first_epoch_has_failed(tmp_path: Path) -> None:
    record, *_ = make_recorder(tmp_path, planted.search_config())
    record.run.config.touch()
    searcher = SimpleNamespace(params={"trial_0003": {}}, parents={}, tell=lambda row: None)
    record.tracker.show = lambda read: None  # type: ignore[method-assign]
    listener = TuneListener(
        record, cast(Any, searcher), cast(Any, SimpleNamespace(stopped={"trial_0003": 0})), ClusterConfig()
    )
    listener.on_trial_complete(0, [], cast(Any, SimpleNamespace(config={"trial_id": "trial_0003"})))
    (row,) = read_results(record.run.results)
    assert (row["status"], row["error"]) == ("failed", "trial_0003: it was ended on request, before its first epoch")


def test_trial_whose_workers_have_not_started_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, _, screen = make_recorder(tmp_path, planted.search_config())
    record.run.config.touch()
    searcher = SimpleNamespace(params={"trial_0000": {}, "trial_0001": {}})
    listener = TuneListener(record, cast(Any, searcher), anything, ClusterConfig())
    monkeypatch.setattr(recorder, "has_nodes", lambda: True)
    monkeypatch.setattr(recorder, "NODES_CHECK_S", 0.0)
    monkeypatch.setattr(waiting, "REPORTED_AFTER_S", (0.0, 3600.0))
    monkeypatch.setattr(waiting, "present", lambda: "1 x {CPU: 1}")
    for trial_id in searcher.params:
        listener.on_trial_start(0, [], cast(Any, SimpleNamespace(config={"trial_id": trial_id})))
    log = record.run.trial("trial_0001").log
    log.parent.mkdir(parents=True)
    log.touch()  # its workers have started
    for _ in range(2):
        listener.on_step_begin(0, [])
    (said,) = screen.said
    assert said.startswith("trial_0000 waits for 2 workers with {CPU: 0.49} each; the nodes have 1 x {CPU: 1}, ")


def test_a_search_does_not_wait_for_a_place_on_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = TuneListener(make_recorder(tmp_path, planted.search_config())[0], anything, anything, ClusterConfig())
    monkeypatch.setattr(recorder, "has_nodes", lambda: True)
    monkeypatch.setattr(recorder, "NODES_CHECK_S", 0.0)
    listener.on_step_begin(0, [])
    monkeypatch.setattr(recorder, "has_nodes", lambda: False)
    with pytest.raises(ClusterError, match="no node left"):
        listener.on_step_begin(1, [])
