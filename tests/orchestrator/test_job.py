"""The search as a Ray job: `ray job submit --working-dir . -- python -m orchestrator.search`, on a Ray of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.records import read_results
from tests.orchestrator.servers import end, free_port, wait_for
from tests.orchestrator.test_search import PROJECT, SPACE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a user whose home is empty, so that no token and no running Ray is found."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "HOME": str(home), "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def dashboard(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """Yield the address of a Ray's job server; the Ray ends with the test, and no other Ray does."""
    port = free_port()
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=2", "--port", str(free_port()), "--dashboard-host=127.0.0.1",
        "--dashboard-port", str(port), "--node-ip-address=127.0.0.1", "--object-store-memory", str(150 * 2**20),
        "--temp-dir", f"/tmp/ray_{os.getpid()}",  # short: it holds Unix sockets, whose paths may have 107 characters
    ]  # fmt: skip
    with open(tmp_path / "ray.log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/api/version", head)
        wait_for_agent(address, environment)
        yield address
    finally:
        end(head, signal.SIGTERM)


def wait_for_agent(dashboard: str, environment: dict[str, str]) -> None:
    """Wait until a job runs: the server answers before, and refuses jobs then ("No available agent") or keeps them waiting."""
    command = [str(RAY), "job", "submit", "--address", dashboard, "--", "true"]
    while True:  # the test's own time limit ends it
        try:
            subprocess.run(command, env=environment, capture_output=True, check=True, timeout=20)
            return
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            time.sleep(1)


def submit(dashboard: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--address", dashboard, "--working-dir", ".", "--", "python", "-m"]
    return subprocess.run(
        [*command, "orchestrator.search", *arguments],
        cwd=PROJECT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_job_searches_into_the_home_folder_and_a_mistake_fails_it(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    space = tmp_path / "tiny.yaml"
    space.write_text(SPACE)
    result = submit(dashboard, environment, str(space))
    assert result.returncode == 0, result.stdout + result.stderr
    run = Path(environment["HOME"]) / "runs" / "tiny"
    assert {row["trial_id"]: row["status"] for row in read_results(run / "results.parquet")} == {
        "unpruned": "finished",
        "trial_0000": "finished",
        "trial_0001": "finished",
    }
    assert str(run / "report.html") in result.stdout
    refused = submit(dashboard, environment, str(space), "--set", "base.gating.epoch=2")
    assert refused.returncode == 1  # what Ray makes of the program's 2
    assert "did you mean epochs?" in refused.stdout + refused.stderr
