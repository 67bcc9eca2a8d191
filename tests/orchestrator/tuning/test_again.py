"""What a search that is run again finds left to do; Ray and MLflow are stood in for."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray import tune
from rich.console import Console

from orchestrator import search
from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import MeasurerError
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.progress import Progress
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import read_results, update_results
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.tuning import driver
from orchestrator.tuning.tuner import own_error
from tests.orchestrator import planted


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchPlan:
    """A search whose run directory holds no row yet."""

    @contextmanager
    def connected(*arguments: object) -> Iterator[MagicMock]:
        yield MagicMock()

    tracker = MagicMock(**{"register_front.return_value": [], "how_to_open.return_value": "MLflow"})
    monkeypatch.setattr(driver, "session", connected)
    monkeypatch.setattr(driver.Tracker, "open", lambda *arguments: tracker)
    monkeypatch.setattr(driver, "shape", dict)
    monkeypatch.setattr(driver, "Monitor", MagicMock())
    storage = StoragePaths(tmp_path)
    config = planted.search_config(search={"num_trials": 2, "algorithm": "random"})
    return SearchPlan(config=config, cluster=ClusterConfig(), storage=storage, run=storage.run("planted"))


def run(plan: SearchPlan) -> None:
    with Progress(plan.config, Console(stderr=True)) as progress:
        driver.run_search(plan, progress)


def test_a_failed_trial_of_other_workers_holds_up_no_search(plan: SearchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.plant(plan.run, plan.config, [planted.unpruned(), planted.failed(0)])
    folder = plan.run.train / "trial_0000" / "checkpoint_0"
    folder.mkdir(parents=True)
    Checkpoint(stage="gate", epochs_done=2, world_size=4).save(folder)
    monkeypatch.setattr(driver, "check_start", lambda *_: None)
    monkeypatch.setattr(driver, "capacity", lambda *_: None)
    monkeypatch.setattr(driver, "ensure_base", lambda *_: None)
    left: list[Any] = []
    monkeypatch.setattr(driver, "run_trials", lambda tuning, base: left.extend(folder.parent.iterdir()))
    monkeypatch.setattr(driver, "_remeasure", lambda *_: None)
    run(plan)
    assert left == []


def test_networks_whose_measurement_crashed_are_measured_by_the_same_command(
    plan: SearchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [planted.unpruned(), planted.finished(0, 97.0, 2.0), planted.finished(1, 90.0, 1.0)]
    planted.plant(plan.run, plan.config, [{**row, "latency_source": "estimated"} for row in rows])
    num_tries = 0

    def remeasure(run: RunPaths, *_: object) -> list[Any]:
        nonlocal num_tries
        num_tries += 1
        if num_tries == 1:
            raise MeasurerError("crashed twice; rerun the same command to resume")
        update_results(run.results, [{**row, "latency_source": "measured"} for row in read_results(run.results)])
        return []

    monkeypatch.setattr(driver, "remeasure", remeasure)
    run(plan)
    assert (num_tries, plan.run.report.exists()) == (1, True)
    write_atomic(plan.run.recorded, "MLflow")
    for _ in range(2):  # the first finishes it, the second only prints the table
        assert search._search(plan, Console(stderr=True)) == 0
    assert num_tries == 2


def test_what_mlflow_had_of_an_earlier_process_says_nothing_of_this_one(plan: SearchPlan) -> None:
    planted.plant(
        plan.run, plan.config, [planted.unpruned(), planted.finished(0, 97.0, 2.0), planted.stopped(1, epoch=1)]
    )
    write_atomic(plan.run.report, "page")
    write_atomic(plan.run.recorded, "MLflow had the first trial when the search was drained")
    run(plan)  # MLflow, which is stood in for, confirms nothing
    assert not plan.run.recorded.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MeasurerError("no answer")], ids=["disk", "own"])
def test_an_error_in_a_callback_of_tune_is_raised_as_it_is(error: Exception) -> None:
    assert own_error(wrapped(wrapped(error))) is error


def test_an_error_of_tune_stays_one() -> None:
    found = wrapped(ValueError("a bug"))
    assert own_error(found) is found


def wrapped(error: Exception) -> tune.TuneError:
    """Return an error as Tune raises it: the traceback is its message."""
    try:
        try:
            raise error
        except Exception:
            raise tune.TuneError("traceback")  # noqa: B904  # as Tune does
    except tune.TuneError as outer:
        return outer
