from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.rungs import expected_num_epochs, max_num_epochs, num_concurrent, num_grace_epochs, rung_epochs
from orchestrator.config.search import SearchConfig
from orchestrator.planning.plan import SearchPlan
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import StoragePaths
from tests.orchestrator import planted


def make_config(
    clock: str = "wall", algorithm: str = "random", scheduler: str = "pareto_asha", **more: Any
) -> SearchConfig:
    return SearchConfig.model_validate(
        {
            "name": "test",
            "base": planted.tiny_base(profile={"clock": clock}),
            "objectives": [{"metric": "top1", "mode": "max"}],
            "search": {"algorithm": algorithm, "num_trials": 6, "max_concurrent": 4},
            "scheduler": {"type": scheduler},
            **more,
        }
    )


@pytest.mark.parametrize(
    ("grace", "factor", "epochs", "rungs"),
    [(1, 3, 27, [1, 3, 9]), (2, 2, 9, [2, 4, 8]), (5, 3, 5, []), (1, 3, 1, [])],
    ids=["last-epoch-is-no-rung", "factor-2", "grace-is-all", "one-epoch"],
)
def test_rungs_grow_by_the_reduction_factor(grace: int, factor: int, epochs: int, rungs: list[int]):
    assert rung_epochs(grace, factor, epochs) == rungs


def test_the_longest_trial_counts_the_searched_epochs():
    assert max_num_epochs(make_config()) == 2 + 1
    params = {
        "gating.epochs": {"type": "int", "low": 1, "high": 8},
        "finetuning.epochs": {"type": "categorical", "choices": [4, 0]},
    }
    assert max_num_epochs(make_config(params=params)) == 8 + 4


def test_trials_are_first_judged_an_epoch_after_the_longest_gating_stage_unless_told_otherwise():
    assert num_grace_epochs(make_config()) == 2 + 1
    assert num_grace_epochs(make_config(params={"gating.epochs": {"type": "int", "low": 1, "high": 8}})) == 8 + 1
    config = make_config()
    told = config.model_validate(config.model_dump() | {"scheduler": {"type": "pareto_asha", "grace_epochs": 2}})
    assert num_grace_epochs(told) == 2


@pytest.mark.parametrize(("capacity", "expected"), [(2, 2), (5, 4), (100, 4)], ids=["cluster", "config", "config-2"])
def test_trials_at_once_fit_the_cluster_and_the_config(capacity: int, expected: int):
    assert num_concurrent(make_config(), capacity) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make_config("model"), 1),
        (make_config("model", "tpe", "none"), 1),
        (make_config("model", "sobol", "none"), 4),
        (make_config("wall", "tpe", "pareto_asha"), 4),
    ],
    ids=["stopping-depends-on-order", "tpe-depends-on-order", "nothing-does", "nothing-is-promised"],
)
def test_a_repeatable_table_needs_one_trial_at_a_time_where_order_decides(config: SearchConfig, expected: int):
    assert num_concurrent(config, capacity=8) == expected


def test_the_forecast_counts_what_each_rung_keeps():
    epochs = {"gating.epochs": {"type": "int", "low": 1, "high": 8}}
    config = make_config(params=epochs)  # 9 epochs at most
    config = config.model_validate(
        config.model_dump() | {"scheduler": {"type": "pareto_asha", "grace_epochs": 1, "reduction_factor": 3}}
    )
    assert expected_num_epochs(config) == pytest.approx(1 + 2 / 3 + 6 / 9)
    assert expected_num_epochs(make_config(scheduler="none", params=epochs)) == 9


def test_a_run_from_before_weights_had_a_digest_resumes_on_its_base_network(tmp_path: Path):
    """A new run is known by the digest; what an earlier version saved has none, and its rows are of the network with the old hash."""
    storage, config = StoragePaths(tmp_path), make_config()

    def known(digest: str | None) -> SearchConfig:
        weights = {"weights": "net.safetensors", "weights_sha256": digest}
        return config.with_models({name: one.model_copy(update=weights) for name, one in config.models.items()})

    def planned() -> SearchConfig:
        return SearchPlan(
            config=known("0" * 64), cluster=ClusterConfig(), storage=storage, run=storage.run("test")
        ).config

    assert planned() == known("0" * 64)
    write_atomic(storage.run("test").config, known(None).to_json())
    assert planned() == known(None)
    assert planned().base.base_hash() == known(None).base.base_hash() != known("0" * 64).base.base_hash()
    write_atomic(storage.run("test").config, known("1" * 64).to_json())
    assert planned() == known("0" * 64), "which is refused"


def test_the_plan_tells_trials_epochs_hours_and_budget(tmp_path: Path):
    config = make_config(scheduler="none", search={"num_trials": 6, "algorithm": "sobol", "max_hours": 2})
    cluster = ClusterConfig(max_concurrent=2, address="head:6379")
    plan = SearchPlan(
        config=config, cluster=cluster, storage=StoragePaths(tmp_path), run=StoragePaths(tmp_path).run("test")
    )
    text = plan.text(num_ended=2, seconds_per_epoch=600.0)
    assert "no trial starts after 2 hours" in text
    assert "4 trials, 12 epochs in 2 rounds of trials or more; about 1 hours, at 600.0 s per epoch" in text
    assert "unknown until the first epoch has run" in plan.text()
    growing = replace(
        plan, cluster=cluster.model_copy(update={"address": "auto", "grows_to": 3, "max_concurrent": None})
    )
    assert "at most 3 trials, 2 workers each; nodes are added when trials ask for them" in growing.text()
