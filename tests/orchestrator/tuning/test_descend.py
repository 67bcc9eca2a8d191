"""search.descend: which trial a trial starts from, and that a continued search takes the same."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.rungs import num_concurrent
from orchestrator.config.trial import GatingConfig, TrialConfig
from orchestrator.planning.plan import SearchPlan
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import append_result, read_metrics, read_results
from orchestrator.trial.assignment import Assignment
from orchestrator.tuning.descend import choose_parent, descend, parent_chooser
from orchestrator.tuning.schedulers import NoRule, RuleScheduler
from orchestrator.tuning.trials import request_maker
from tests.orchestrator import planted
from tests.orchestrator.commands.test_search import COLUMNS_OF_THE_RUN, PROJECT, SPACE, command, search, table_without


def stage(**pressure: Any) -> GatingConfig:
    return GatingConfig(epochs=2, lr=0.1, **pressure)


EARLIER = {
    "trial_0000": stage(target_ratio=0.7),
    "trial_0001": stage(target_ratio=0.4),
    "trial_0002": stage(target_ratio=0.4),
    "trial_0003": stage(loss_weight=0.5),
    "trial_0004": stage(loss_weight=2.0),
    "trial_0005": stage(target_ratio=0.5, target_of="macs"),
}


@pytest.mark.parametrize(
    ("pressure", "parent"),
    [
        ({"target_ratio": 0.8}, None),
        ({"target_ratio": 0.7}, None),  # as much is not less
        ({"target_ratio": 0.5}, "trial_0000"),
        ({"target_ratio": 0.1}, "trial_0001"),  # the nearest, the first of equals
        ({"target_ratio": 0.1, "loss_weight": 4.0}, "trial_0001"),  # a target is what counts
        ({"target_ratio": 0.1, "target_of": "macs"}, "trial_0005"),
        ({"loss_weight": 0.5}, None),
        ({"loss_weight": 1.0}, "trial_0003"),
        ({"loss_weight": 8.0}, "trial_0004"),
    ],
)
def test_a_trial_starts_from_the_nearest_under_less_pressure(pressure: dict[str, Any], parent: str | None) -> None:
    assert choose_parent(stage(**pressure), EARLIER) == parent
    assert choose_parent(stage(**pressure), dict(reversed(EARLIER.items()))) == parent


def test_a_trial_with_a_parent_trains_for_a_share_of_the_epochs() -> None:
    config = planted.search_config().base  # 2 epochs under gates and 1 of fine-tuning
    child = descend(config, Path("/runs/a/trials/trial_0001/cut"), 0.5)
    assert (child.gating.epochs, child.finetuning.epochs) == (1, 1)
    assert child.gating.start_from == "/runs/a/trials/trial_0001/cut"


def with_parents(**search: Any) -> Any:
    given = {"algorithm": "random", "num_trials": 4, "descend": "nearest"} | search
    return planted.search_config(search=given, scheduler={"type": "pareto_asha", "grace_epochs": 2})


def plant(run: RunPaths, config: Any, number: int, weight: float, status: str | None, is_cut: bool = True) -> None:
    """Write what a trial leaves that was cut, or not yet; status None: it still runs."""
    paths = run.trial(f"trial_{number:04d}")
    base = config.base.model_dump()
    trial = TrialConfig.model_validate(base | {"gating": base["gating"] | {"loss_weight": weight}})
    write_atomic(paths.config, trial.to_json())
    if is_cut:
        write_atomic(paths.cut.gates, b"")
    if status is not None:
        append_result(run.results, {"trial_id": paths.root.name, "kind": "trial", "status": status})


def test_finished_and_promoted_trials_are_parents_once_they_are_cut(tmp_path: Path) -> None:
    storage = StoragePaths(tmp_path)
    config = with_parents()
    plan = SearchPlan(config=config, cluster=ClusterConfig(), storage=storage, run=storage.run("planted"))
    write_atomic(plan.run.config, config.to_json())
    scheduler = RuleScheduler(NoRule())
    choose = parent_chooser(plan, scheduler)
    assert choose is not None

    def parent() -> str | None:
        return choose("trial_0009", {"gating.loss_weight": 4.0})

    assert parent() is None
    plant(plan.run, config, 0, 0.25, "finished")
    plant(plan.run, config, 1, 0.5, None)
    plant(plan.run, config, 2, 1.0, "stopped")
    plant(plan.run, config, 3, 2.0, "failed")
    plant(plan.run, config, 4, 3.0, None, is_cut=False)
    scheduler.decide("trial_0001", {"epoch": 1})  # told to go on, but before its first rung
    scheduler.decide("trial_0004", {"epoch": 3})
    assert parent() == "trial_0000"
    scheduler.decide("trial_0001", {"epoch": 2})
    assert parent() == "trial_0001"
    assert (
        choose("trial_0009", {"gating.loss_weight": -1.0}) is None
    )  # not a config; that is told where one is made of it
    request = request_maker(plan, tmp_path / "weights.safetensors")("trial_0009", {}, "trial_0001")
    assignment = Assignment.from_dict(request["assignment"])
    assert assignment.config.gating.start_from == str(plan.run.trial("trial_0001").cut.root)
    assert assignment.keeps_cut


def test_trials_that_descend_keep_to_an_order_where_a_table_must_repeat() -> None:
    config = with_parents()
    base = config.base.model_dump() | {"profile": {"clock": "model"}}
    repeatable = config.model_validate(config.model_dump() | {"base": base, "scheduler": {"type": "none"}})
    assert num_concurrent(repeatable, capacity=4) == 1


SPACE_WITH_PARENTS = SPACE.replace(
    "search: {algorithm: random, num_trials: 2, seed: 0}",
    "search: {algorithm: random, num_trials: 4, seed: 0, descend: nearest, "
    "points_to_evaluate: [{gating.target_ratio: 0.7}, {gating.target_ratio: 0.35}, "
    "{gating.target_ratio: 0.5}, {gating.target_ratio: 0.3}]}",
)
PARENTS = {"trial_0000": None, "trial_0001": "trial_0000", "trial_0002": "trial_0000", "trial_0003": "trial_0001"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_with_parents_that_is_killed_takes_the_same_parents(tmp_path: Path) -> None:
    space = tmp_path / "tiny.yaml"
    space.write_text(SPACE_WITH_PARENTS)
    undisturbed, killed = RunPaths(tmp_path / "a" / "tiny"), RunPaths(tmp_path / "b" / "tiny")
    result = search(space, tmp_path / "a")
    assert result.returncode == 0, result.stderr
    rows = {row["trial_id"]: row for row in read_results(undisturbed.results) if row["kind"] == "trial"}
    assert {name: row.get("parent") for name, row in rows.items()} == PARENTS
    first = read_metrics(undisturbed.trial("trial_0003").metrics)[0]
    assert first["macs_ratio"] <= rows["trial_0001"]["macs_ratio"] * 1.01, "it did not start from the cut network"

    process = subprocess.Popen(
        command(space, tmp_path / "b"), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    _wait_for_epochs(killed, "trial_0003", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = search(space, tmp_path / "b", "--resume")
    assert result.returncode == 0, result.stderr
    assert table_without(killed, COLUMNS_OF_THE_RUN) == table_without(undisturbed, COLUMNS_OF_THE_RUN)


def _wait_for_epochs(run: RunPaths, trial_id: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while not run.trial(trial_id).metrics.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
