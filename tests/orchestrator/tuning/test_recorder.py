"""What is recorded of a trial that ends badly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.errors import ClusterError
from orchestrator.storage.paths import RunPaths
from orchestrator.tuning import recorder
from orchestrator.tuning.recorder import TrialRecorder
from tests.orchestrator import planted


def test_no_trial_has_failed_because_ray_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "answers", lambda: False)
    run = RunPaths(tmp_path)
    anything = cast(Any, None)
    listener = TrialRecorder(run, planted.search_config(), anything, anything, anything, anything)
    trial = cast(Any, SimpleNamespace(config={"trial_id": "trial_0003"}, error_file=None))
    with pytest.raises(ClusterError, match=r"Ray has gone, and trial_0003 with it.*the same command goes on"):
        listener.on_trial_error(0, [], trial)
    assert not run.results.exists()


def test_a_search_does_not_wait_for_a_place_on_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anything = cast(Any, None)
    listener = TrialRecorder(RunPaths(tmp_path), planted.search_config(), anything, anything, anything, anything)
    monkeypatch.setattr(recorder, "has_nodes", lambda: True)
    monkeypatch.setattr(recorder, "NODES_CHECK_S", 0.0)
    listener.on_step_begin(0, [])
    monkeypatch.setattr(recorder, "has_nodes", lambda: False)
    with pytest.raises(ClusterError, match="no node left"):
        listener.on_step_begin(1, [])
