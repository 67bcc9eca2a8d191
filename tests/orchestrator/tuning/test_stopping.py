"""Stopped means gone: a real search whose trials are mostly stopped, on a cluster that has room for one trial only."""

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors
from rich.console import Console

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.models import networks as models
from orchestrator.models.saved import save_base
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.progress import Progress
from orchestrator.storage.paths import BasePaths, StoragePaths
from orchestrator.storage.run_dir import claim
from orchestrator.tuning import driver
from orchestrator.tuning.driver import run_search
from tests.orchestrator.tiny_trial import TINY
from tests.orchestrator.tuning.test_driver import UNPRUNED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ENDLESS = 100_000
"""Epochs of a trial that ends only because it is stopped."""
RATIOS = (0.2, 0.5, 0.8)
"""Targets of the trials in their order: after the first, each is the largest at its rung."""
GONE_S = 10.0
"""Ray Train frees a stopped trial's placement group within a second or two of an idle machine; the rest is for a busy one."""


@pytest.fixture
def ray_of_the_search() -> Iterator[None]:
    """Leave Ray to the search: how it is started decides whether a stopped trial's resources are freed."""
    yield
    ray.shutdown()


def make_plan(storage: StoragePaths) -> SearchPlan:
    config = SearchConfig.model_validate(
        {
            "name": "stopping",
            "base": TINY.model_dump(),
            "params": {
                "gating.target_ratio": {"type": "float", "low": 0.1, "high": 0.9},
                "finetuning.epochs": {"type": "int", "low": 1, "high": ENDLESS},
            },
            "objectives": [{"metric": "macs", "mode": "min"}],
            "search": {
                "algorithm": "random",
                "num_trials": len(RATIOS),
                "points_to_evaluate": [
                    {"gating.target_ratio": ratio, "finetuning.epochs": 1 if number == 0 else ENDLESS}
                    for number, ratio in enumerate(RATIOS)
                ],
            },
            "scheduler": {"type": "pareto_asha", "grace_epochs": TINY.gating.epochs, "reduction_factor": 3},
        }
    )
    nearly_all = 0.98 * (os.cpu_count() or 1)  # beside a worker there is room for drivers only
    cluster = ClusterConfig(storage=str(storage.root), workers_per_trial=1, resources_per_worker={"CPU": nearly_all})
    return SearchPlan(config=config, cluster=cluster, storage=storage, run=storage.run(config.name))


class Cluster(threading.Thread):
    """Looks at the cluster several times a second: which workers and placement groups are alive."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, set[str]]] = []
        """(time, ids), oldest first."""
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(0.25):
            alive = _alive()
            self.seen.append((time.monotonic(), alive))  # read before that time: what is seen gone was gone

    def end(self) -> None:
        """Look until nothing is alive any more, GONE_S at most."""
        deadline = time.monotonic() + GONE_S
        while self.seen[-1][1] and time.monotonic() < deadline:
            time.sleep(0.25)
        self._is_over.set()
        self.join()


def _alive() -> set[str]:
    groups = {f"group {group_id}" for group_id, group in placement_group_table().items() if group["state"] != "REMOVED"}
    address = ray.get_runtime_context().gcs_address  # there may be other Rays on this machine
    workers = list_actors(address, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return groups | {f"worker {worker.actor_id}" for worker in workers}


class StopWatch(Progress):
    """Takes the time at which each trial was stopped, and has the cluster watched from the first trial on."""

    def __init__(self, config: SearchConfig, cluster: Cluster) -> None:
        super().__init__(config, Console(stderr=True))
        self.cluster = cluster
        self.stopped_at: dict[str, float] = {}

    def started(self, trial_id: str, kind: str) -> None:
        super().started(trial_id, kind)
        if kind == "trial" and not self.cluster.is_alive():
            self.cluster.start()

    def ended(self, row: Mapping[str, Any]) -> None:
        super().ended(row)
        if row["status"] == "stopped":
            self.stopped_at[row["trial_id"]] = time.monotonic()


def seconds_until_gone(seen: list[tuple[float, set[str]]], stopped_at: float) -> float:
    """Return how long anything lived on that was alive when the trial was stopped."""
    alive_then = [alive for at, alive in seen if at <= stopped_at][-1]
    assert len(alive_then) > 2, f"{alive_then}: expected the trial's worker, its group, and the driver's"
    return next((at - stopped_at for at, alive in seen if at > stopped_at and not alive & alive_then), math.inf)


def test_workers_and_placement_group_of_a_stopped_trial_are_gone_and_the_next_takes_their_place(
    ray_of_the_search: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = StoragePaths(tmp_path)
    base = BasePaths(tmp_path / "base")
    save_base(models.build(TINY.model), base)
    monkeypatch.setattr(driver, "ensure_base", lambda config, storage, cluster, stop_files: base.weights)
    monkeypatch.setattr(driver, "measure_fixed", lambda *_, **files: dict(UNPRUNED))
    plan, cluster = make_plan(storage), Cluster()
    with claim(plan.run, plan.config), StopWatch(plan.config, cluster) as progress:
        outcome, _ = run_search(plan, progress)
    cluster.end()
    statuses = {row["trial_id"]: row["status"] for row in outcome.rows if row["kind"] == "trial"}
    assert statuses == {f"trial_{i:04d}": "finished" if i == 0 else "stopped" for i in range(len(RATIOS))}
    gone_s = {name: seconds_until_gone(cluster.seen, at) for name, at in progress.stopped_at.items()}
    print(gone_s)
    assert all(seconds < GONE_S for seconds in gone_s.values()), gone_s
    assert cluster.seen[-1][1] == set()
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
