"""A real search under faults: the same command goes on, and the end is that of a search that nobody disturbed."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Search, check, disturbed, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

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


def test_a_trial_that_goes_with_its_ray_has_not_failed(tmp_path: Path) -> None:
    """Its driver has just died and waits for a place when the raylet goes: Tune calls that a failed trial."""
    expected = undisturbed("instant", tmp_path / "undisturbed")
    search = Search("instant", tmp_path / "disturbed")
    hits = [
        line["fault"]
        for line in disturbed(search, ["trial driver", "raylet"] * 2, random.Random(1), longest_wait_s=2.0)
    ]
    assert set(hits) == {"trial driver", "raylet"}
    check(search, expected)
