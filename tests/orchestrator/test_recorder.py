"""What is recorded of a trial that ends badly."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator import recorder
from orchestrator.errors import ClusterError
from orchestrator.paths import RunPaths
from orchestrator.recorder import TrialRecorder
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
