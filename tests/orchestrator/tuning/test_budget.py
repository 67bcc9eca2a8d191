from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchAlgorithmConfig
from orchestrator.errors import ClusterError
from orchestrator.storage.paths import RunPaths
from orchestrator.tuning.budget import Budget
from orchestrator.tuning.trials import budget_check
from tests.orchestrator import planted

TWO_GPUS = ClusterConfig(workers_per_trial=2, resources_per_worker={"CPU": 1, "GPU": 1})
HALF_AN_HOUR = {"train_s": 1500.0, "eval_s": 300.0, "measure_s": None}


def test_hours_are_counted_from_the_start() -> None:
    budget = Budget.of(SearchAlgorithmConfig(max_hours=2), ClusterConfig())
    assert budget.why_spent([], budget.began_s + 7199) is None
    assert budget.why_spent([], budget.began_s + 7201) == "search.max_hours 2 are spent"


def test_gpu_hours_are_those_of_the_trials_that_have_ended() -> None:
    budget = Budget.of(SearchAlgorithmConfig(max_gpu_hours=2), TWO_GPUS)
    assert budget.why_spent([HALF_AN_HOUR], 0.0) is None  # half an hour of two GPUs
    assert "2 of search.max_gpu_hours 2" in str(budget.why_spent([HALF_AN_HOUR] * 2, 0.0))


def test_gpu_hours_of_trials_under_way_count(tmp_path: Path) -> None:
    run, config = RunPaths(tmp_path / "run"), planted.search_config()
    planted.plant_trial(run, config, planted.finished(0, 90.0, 1.0))  # three epochs of 2.75 s, and no row
    plan = SimpleNamespace(config=config, run=run)
    tuning: Any = SimpleNamespace(plan=plan, recorder=SimpleNamespace(progress=SimpleNamespace(say=lambda text: None)))
    used_up, plenty = (
        Budget(hours=None, gpu_hours=2 * seconds / 3600, num_gpus=2) for seconds in (3 * 2.75, 3 * 2.75 + 1)
    )
    assert [budget_check(budget, tuning)() for budget in (used_up, plenty)] == [False, True]


def test_without_limits_nothing_is_spent() -> None:
    assert Budget.of(SearchAlgorithmConfig(), TWO_GPUS).why_spent([HALF_AN_HOUR] * 1000, 1e9) is None


def test_gpu_hours_without_gpus_are_refused() -> None:
    with pytest.raises(ClusterError, match="a trial has no GPU"):
        Budget.of(SearchAlgorithmConfig(max_gpu_hours=2), ClusterConfig())
