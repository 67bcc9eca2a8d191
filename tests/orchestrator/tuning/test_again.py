"""What a search that is run again finds left to do; Ray and MLflow are stood in for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from orchestrator.config.cluster import ClusterConfig
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.progress import Progress
from orchestrator.storage.paths import StoragePaths
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.tuning import driver
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
