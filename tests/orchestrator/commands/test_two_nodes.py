"""clusters/two_nodes_one_machine as its page says: two real Ray nodes, a search whose trials span both, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.orchestrator.commands.test_search import PROJECT, SPACE
from tests.orchestrator.servers import end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
START = PROJECT / "clusters" / "two_nodes_one_machine" / "start.sh"


def test_search_over_two_nodes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(home), "RAY_AUTH_MODE": "disabled", "DASHBOARD_PORT": "8299"}
    environment["RAY"] = str(Path(sys.executable).with_name("ray"))
    (tmp_path / "tiny.yaml").write_text(SPACE)
    with open(tmp_path / "nodes.log", "w") as log:
        nodes = subprocess.Popen([START], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_text(tmp_path / "nodes.log", "two nodes at 127.0.0.1:6399", nodes)
        command = [
            sys.executable,
            "-m",
            "orchestrator.search",
            str(tmp_path / "tiny.yaml"),
            "--run-dir",
            str(tmp_path / "runs"),
        ]
        command += ["--cluster", "two_nodes_one_machine", "--set", "search.num_trials=1"]
        result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        rows = pq.read_table(tmp_path / "runs" / "tiny" / "results.parquet").to_pylist()
        assert {row["status"] for row in rows} == {"finished"}
    finally:
        left_over = end(nodes, signal.SIGINT)
    assert not left_over


def _wait_for_text(path: Path, text: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 180
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        assert process.poll() is None, path.read_text()
        time.sleep(0.5)
