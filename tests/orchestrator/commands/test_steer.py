"""What `steer` writes for a running search, and refuses. A search that is steered: tests/orchestrator/tuning/test_driver.py."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import steer
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.requests import Request, Requests
from orchestrator.storage.run_dir import claim
from tests.orchestrator import planted


@pytest.fixture
def idle(tmp_path: Path) -> RunPaths:
    """A search that has two results, and one trial without any; no process works in it."""
    run = RunPaths(tmp_path / "planted")
    config = planted.search_config()
    planted.plant(run, config, [planted.unpruned(), planted.finished(0, 97.0, 2.0)])
    planted.plant_trial(run, config, planted.stopped(1, epoch=2))
    return run


@pytest.fixture
def run(idle: RunPaths) -> Iterator[RunPaths]:
    """The same, while this process works in it."""
    with claim(idle, planted.search_config()):
        yield idle


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["--end", "trial_0001"], Request(end="trial_0001")),
        (["--drain"], Request(drain=True)),
        (["--max-concurrent", "3"], Request(max_concurrent=3)),
    ],
    ids=["end", "drain", "max-concurrent"],
)
def test_a_running_search_is_asked(run: RunPaths, arguments: list[str], request_: Request) -> None:
    requests = Requests(run)
    assert steer.main([str(run.root), *arguments]) == 0
    assert requests.read() == [request_]
    assert requests.read() == [], "a request is read once"


@pytest.mark.parametrize(
    ("trial_id", "message"),
    [
        ("trial_0000", "trial_0000 does not run in .*; expected one of: trial_0001"),
        ("trial_0007", "trial_0007 does not run in .*; expected one of: trial_0001"),
    ],
    ids=["has ended", "unknown"],
)
def test_a_trial_that_does_not_run_is_refused(
    run: RunPaths, capsys: pytest.CaptureFixture[str], trial_id: str, message: str
) -> None:
    assert steer.main([str(run.root), "--end", trial_id]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not run.requests.exists()


def test_a_search_that_does_not_run_is_refused(idle: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer.main([str(idle.root), "--drain"]) == 2
    assert "no search runs in" in capsys.readouterr().err
    assert not idle.requests.exists()


@pytest.mark.parametrize("arguments", [[], ["--max-concurrent", "0"], ["--drain", "--end", "trial_0001"]], ids=str)
def test_one_valid_request_is_expected(run: RunPaths, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        steer.main([str(run.root), *arguments])
    assert not run.requests.exists()


def test_a_folder_that_is_no_run_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer.main([str(tmp_path), "--drain"]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_what_is_not_a_request_is_logged_and_half_a_line_waits(run: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    requests = Requests(run)
    run.requests.write_bytes(b'{"end": 3}\n\xff\n{"drain": true}\n{"max_conc')
    assert requests.read() == [Request(drain=True)]
    assert caplog.text.count("is not a request") == 2
    with open(run.requests, "ab") as file:
        file.write(b'urrent": 2}\n')
    assert requests.read() == [Request(max_concurrent=2)]


def test_requests_to_an_earlier_process_are_void(idle: RunPaths) -> None:
    Requests(idle).add(Request(drain=True))
    with claim(idle, planted.search_config()):
        assert Requests(idle).read() == []
