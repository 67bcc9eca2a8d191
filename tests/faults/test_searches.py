"""A real search under faults: the same command goes on, and the end is that of a search that nobody disturbed."""

import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.mlflow_store import sqlite_uri
from orchestrator.paths import StoragePaths
from tests.faults.harness import Search, check, disturbed, undisturbed
from tests.orchestrator.servers import free_port, mlflow_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_INSTANT = 6
ROUNDS = {
    "before and while trials train": ["measuring process", "train worker", "SIGINT", "train controller"],
    "drivers": ["trial driver", "search", "SIGTERM"],
    "the node": ["raylet", "SIGINT twice"],
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the undisturbed search ends with."""
    found = undisturbed("full", tmp_path_factory.mktemp("undisturbed"))
    assert {row["status"] for row in found["rows"]} == {"finished", "stopped"}, "both ends of a trial are to be seen"
    return found


@pytest.mark.parametrize("faults", ROUNDS.values(), ids=ROUNDS)
def test_a_disturbed_search_ends_like_an_undisturbed_one(
    faults: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    search = Search("full", tmp_path)
    hits = [line["fault"] for line in disturbed(search, faults, random.Random(0), longest_wait_s=3.0)]
    assert hits, "no fault has hit anything"
    check(search, expected)


@pytest.fixture(scope="module")
def expected_instant(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the same of the search whose trials only report."""
    return undisturbed("instant", tmp_path_factory.mktemp("undisturbed"), NUM_INSTANT)


def test_a_trial_that_goes_with_its_ray_has_not_failed(expected_instant: dict[str, Any], tmp_path: Path) -> None:
    """Its driver has just died and waits for a place when the raylet goes: Tune calls that a failed trial."""
    search = Search("instant", tmp_path / "storage", num_trials=NUM_INSTANT)
    faults = ["trial driver", "raylet"] * 2
    hits = [line["fault"] for line in disturbed(search, faults, random.Random(1), longest_wait_s=2.0)]
    assert set(hits) == {"trial driver", "raylet"}
    check(search, expected_instant)


def test_a_search_outlives_its_mlflow_server(expected_instant: dict[str, Any], tmp_path: Path) -> None:
    storage, port = StoragePaths(tmp_path / "storage"), free_port()
    storage.root.mkdir()
    with mlflow_server(sqlite_uri(storage), storage.mlartifacts, port) as uri:
        search = Search("instant", storage.root, num_trials=NUM_INSTANT, mlflow_uri=uri)
        search.start()
        search.wait_until_under_way()
    search.finish()  # the server has been killed
    assert not search.run.recorded.exists(), "MLflow lacks what it was not there for"
    with mlflow_server(sqlite_uri(storage), storage.mlartifacts, port):
        search.start()
        search.finish()
    assert search.run.recorded.exists()
    check(search, expected_instant)
