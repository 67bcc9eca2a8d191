import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import StoragePaths
from orchestrator.tracking import system_metrics
from orchestrator.tracking.store import sqlite_uri
from orchestrator.tracking.tracker import Tracker
from tests.orchestrator import planted


def test_node_is_sampled_into_the_run_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "INTERVAL_S", 0.2)
    storage, config = StoragePaths(tmp_path), planted.search_config()
    run = storage.run(config.name)
    write_atomic(run.config, config.model_dump_json())
    tracker, client = Tracker.open(config, run, storage), MlflowClient(sqlite_uri(storage))
    with system_metrics.system_metrics(tracker.parent_id, tracker.uri):
        deadline = time.monotonic() + 30
        while "system/driver/system_memory_usage_megabytes" not in client.get_run(tracker.parent_id).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert client.get_run(tracker.parent_id).data.metrics["system/driver/system_memory_usage_megabytes"] > 0
