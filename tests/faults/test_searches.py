"""A real search under faults: the same command goes on, and the end is that of a search that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage.paths import StoragePaths
from orchestrator.storage.records import read_results
from orchestrator.tracking.store import sqlite_uri
from tests.faults.disks import RemovableDisk, fill
from tests.faults.harness import HEAD, SEARCH, Search, check, disturbed, inject, running_trial, undisturbed, wait_until
from tests.faults.networks import NO_MEMORY_WHILE
from tests.orchestrator.servers import end, free_port, mlflow_server, object_store, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_INSTANT = 6
OF_REAL_TRIALS = ["measuring process", "train worker", "SIGINT", "train controller"]
OF_ANY_TRIALS = ["trial driver", "search", "SIGTERM", "SIGINT twice"]


def test_a_disturbed_search_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    expected = undisturbed("full", tmp_path / "undisturbed")
    assert {row["status"] for row in expected["rows"]} == {"finished", "stopped"}, "both ends of a trial are to be seen"
    search = Search("full", tmp_path / "storage")
    hits = [line["fault"] for line in disturbed(search, OF_REAL_TRIALS, random.Random(0), longest_wait_s=3.0)]
    assert hits[-3:] == OF_REAL_TRIALS[1:], "the unpruned network may have been measured before its process was hit"
    check(search, expected)


def test_a_search_whose_heads_are_lost_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("moto", reason="needs the test extra")
    expected = undisturbed("full", tmp_path / "undisturbed")
    search = Search("store", tmp_path / "storage", address="s3://bucket/runs")
    with object_store(tmp_path / "store.txt") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        hits = list(disturbed(search, [HEAD] * 3, random.Random(0), longest_wait_s=3.0))
        assert hits, "a fast machine may end the search before the third"
        check(search, expected)


@pytest.fixture(scope="module")
def expected_instant(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the undisturbed search ends with whose trials only report."""
    return undisturbed("instant", tmp_path_factory.mktemp("undisturbed"), NUM_INSTANT)


def test_a_search_of_instant_trials_under_faults_ends_like_an_undisturbed_one(
    expected_instant: dict[str, Any], tmp_path: Path
) -> None:
    search = Search("instant", tmp_path / "storage", num_trials=NUM_INSTANT)
    hits = [line["fault"] for line in disturbed(search, OF_ANY_TRIALS, random.Random(2), longest_wait_s=2.0)]
    assert hits == OF_ANY_TRIALS
    check(search, expected_instant)


def test_a_trial_that_goes_with_its_ray_has_not_failed(expected_instant: dict[str, Any], tmp_path: Path) -> None:
    """Its driver has just died and waits for a place when the raylet goes: Tune calls that a failed trial."""
    search = Search("instant", tmp_path / "storage", num_trials=NUM_INSTANT)
    faults = ["trial driver", "raylet"]
    hits = [line["fault"] for line in disturbed(search, faults, random.Random(1), longest_wait_s=2.0)]
    assert hits == faults
    check(search, expected_instant)


def test_a_search_outlives_its_mlflow_server(expected_instant: dict[str, Any], tmp_path: Path) -> None:
    storage, port = StoragePaths(tmp_path / "storage"), free_port()
    storage.root.mkdir()
    with mlflow_server(sqlite_uri(storage), storage.mlartifacts, port) as uri:
        search = Search("instant", storage.root, num_trials=NUM_INSTANT, mlflow_uri=uri)
        search.start()
        search.wait_until_under_way()
    search.hurry()
    search.finish()  # the server has been killed
    assert not search.run.recorded.exists(), "MLflow lacks what it was not there for"
    with mlflow_server(sqlite_uri(storage), storage.mlartifacts, port):
        search.start()
        search.finish()
    assert search.run.recorded.exists()
    check(search, expected_instant)


@contextmanager
def ray_that_stays(folder: Path) -> Iterator[tuple[str, str]]:
    """Run a Ray that no search has started; yield its address and that of its dashboard."""
    port, dashboard = free_port(), free_port()
    sockets = Path(f"/tmp/ray_{os.getpid()}")  # their paths end at 107 characters
    command = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", "--port", str(port),
        "--dashboard-host=127.0.0.1", "--dashboard-port", str(dashboard), "--node-ip-address=127.0.0.1",
        "--object-store-memory", str(150 * 2**20), "--temp-dir", sockets,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    with open(folder / "ray.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"{url}/api/version", process)
        yield f"127.0.0.1:{port}", url
    finally:
        end(process, signal.SIGTERM)
        shutil.rmtree(sockets, ignore_errors=True)


OF_THE_CLUSTER = "_AutoscalingCoordinatorActor"
"""Ray Train starts one on a cluster, for all that comes; it asks for no resources."""


def left_on(dashboard: str) -> list[str]:
    """Return the actors that searches have on a Ray, and the placement groups that hold some of it."""
    actors = listed(dashboard, "actors", gone="DEAD")
    groups = listed(dashboard, "placement_groups", gone="REMOVED")
    names = [actor["class_name"] for actor in actors if actor["class_name"] != OF_THE_CLUSTER]
    return names + [group["placement_group_id"] for group in groups]


def listed(dashboard: str, kind: str, gone: str) -> list[dict[str, str]]:
    """Return what a Ray has of a kind. ray.util.state leaves a client behind that ends this process a minute after that Ray."""
    with urllib.request.urlopen(f"{dashboard}/api/v0/{kind}?limit=1000", timeout=60) as answer:
        found = json.load(answer)["data"]["result"]["result"]
    return [one for one in found if one["state"] != gone]


def test_a_killed_search_leaves_nothing_on_a_ray_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with ray_that_stays(tmp_path) as (address, dashboard):
        monkeypatch.setenv("RAY_ADDRESS", address)
        search = Search("full", tmp_path / "storage")
        search.start()
        metrics = search.run.trial("trial_0000").metrics
        wait_until(lambda: metrics.exists())
        assert {"RayTrainWorker", "PlacementGroupCleaner"} <= set(left_on(dashboard))
        inject(search, SEARCH, random.Random(0))
        wait_until(lambda: left_on(dashboard) == [])


@pytest.mark.parametrize("small_disk", ["128m"], indirect=True)
def test_a_search_ends_on_a_full_disk_and_goes_on_once_there_is_room(
    expected_instant: dict[str, Any], small_disk: Path
) -> None:
    search = Search("instant", small_disk, num_trials=NUM_INSTANT)
    search.start()
    search.wait_until_under_way()
    filler = fill(small_disk)
    assert search.process is not None
    assert search.process.wait(timeout=300) == 1, search.last_words()
    assert "No space left on device" in search.last_words()
    assert "Traceback" not in search.last_words()
    search.wait_for_the_end_of_all()
    filler.unlink()
    search.hurry()
    search.start()
    search.finish()
    check(search, expected_instant)


def test_a_search_waits_for_a_storage_that_is_away(
    expected_instant: dict[str, Any], removable_disk: RemovableDisk
) -> None:
    search = Search("instant", removable_disk.mount_point, num_trials=NUM_INSTANT)
    search.start()
    wait_until(lambda: running_trial(search.run) == "trial_0001")
    removable_disk.unmount()
    time.sleep(60)
    made_meanwhile = sorted(removable_disk.mount_point.rglob("*"))
    removable_disk.mount()
    assert made_meanwhile == []
    search.hurry()
    search.finish()
    check(search, expected_instant)


def test_a_trial_that_fails_leaves_the_search_to_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory = tmp_path / "no_memory"
    monkeypatch.setenv(NO_MEMORY_WHILE, str(no_memory))
    search = Search("full", tmp_path / "storage", space="failing")
    search.start()
    wait_until(lambda: running_trial(search.run) == "trial_0001")
    no_memory.touch()
    wait_until(lambda: "trial_0001" in {row["trial_id"] for row in read_results(search.run.results)})
    no_memory.unlink()
    search.finish()
    rows = {row["trial_id"]: row for row in read_results(search.run.results)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "unpruned": "finished",
        "trial_0000": "failed",
        "trial_0001": "failed",
        "trial_0002": "finished",
    }
    assert "the loss is" in rows["trial_0000"]["error"]
    assert "out of memory on cpu" in rows["trial_0001"]["error"]
    assert "--set base.training.micro_batch_size=16" in rows["trial_0001"]["error"]
