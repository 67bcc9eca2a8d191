"""`ray job submit -- python -m orchestrator.train digits` on two Ray nodes, one of which is killed in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from orchestrator.paths import TrainPaths
from orchestrator.records import read_metrics
from tests.orchestrator.servers import end, free_port, wait_for
from tests.orchestrator.test_search import PROJECT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
RAY = Path(sys.executable).with_name("ray")
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
"""A dead node is noticed after seconds instead of 12 and more."""


class Nodes:
    """Two Ray nodes of one CPU each: the head at 127.0.0.1, and others at addresses of their own."""

    def __init__(self, folder: Path) -> None:
        (folder / "home").mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**kept, **QUICK_TO_NOTICE, "HOME": str(folder / "home"), "PATH": path}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.log = folder / "nodes.log"
        self.sessions = tempfile.mkdtemp(prefix="nodes", dir="/tmp")  # short: Unix sockets lie in it
        self.port, dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.processes = [
            self._start(
                "--head", "--node-ip-address=127.0.0.1", "--port", str(self.port), "--dashboard-host=127.0.0.1",
                "--dashboard-port", str(dashboard), "--temp-dir", self.sessions,
            )
        ]  # fmt: skip
        wait_for(f"{self.dashboard}/api/version", self.processes[0])
        while subprocess.run(
            self._submission("true"), env=self.environment, capture_output=True, check=False
        ).returncode:
            time.sleep(1)  # "No available agent": the job server answers before it can run jobs

    def add(self, address: str) -> "subprocess.Popen[bytes]":
        """Start a node and return when the cluster counts on it; a job that begins before would find too little room."""
        node = self._start("--address", f"127.0.0.1:{self.port}", f"--node-ip-address={address}")
        self.processes.append(node)
        while address not in self._alive():
            assert node.poll() is None, self.log.read_text()
            time.sleep(0.5)
        return node

    def kill(self, node: "subprocess.Popen[bytes]") -> None:
        """SIGKILL for all of the node's processes, as when its machine vanishes."""
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            process.kill()
        node.wait()

    def train(self, *arguments: str) -> "subprocess.Popen[str]":
        command = self._submission("python", "-m", "orchestrator.train", "digits", *arguments)
        return subprocess.Popen(
            command,
            cwd=PROJECT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _alive(self) -> set[str]:
        """Return the addresses of the nodes that the cluster holds for alive."""
        with urlopen(f"{self.dashboard}/api/v0/nodes", timeout=30) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}

    def _submission(self, *command: str) -> list[str]:
        return [str(RAY), "job", "submit", "--address", self.dashboard, "--working-dir", str(PROJECT), "--", *command]

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [str(RAY), "start", "--block", "--num-cpus=1", "--object-store-memory", str(150 * 2**20), *arguments]
        with open(self.log, "a") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    for process in reversed(nodes.processes):
        if process.poll() is None:
            end(process, signal.SIGTERM)
    shutil.rmtree(nodes.sessions, ignore_errors=True)


def test_training_survives_the_death_of_a_node_and_ends_with_the_same_weights(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        f"storage: {tmp_path / 'store'}\nworkers_per_trial: 2\nresources_per_worker: {{CPU: 0.9}}\n"
    )
    options = ["--cluster", str(tmp_path / "cluster.yaml"), "--set", "base.training.checkpoint_every_s=0.5"]
    options += ["--set", "base.data.global_batch_size=16"]  # 80 steps an epoch: saved in their middle, too
    runs = [TrainPaths(tmp_path / "store" / f"{name}-train") for name in ("disturbed", "calm")]
    second = nodes.add("127.0.0.2")
    job = nodes.train(*options, "--set", "name=disturbed")
    while not (runs[0].metrics.exists() and len(read_metrics(runs[0].metrics)) >= 2):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    nodes.kill(second)
    nodes.add("127.0.0.3")
    told = job.communicate()[0]
    assert job.returncode == 0, told
    assert "goes on after" in runs[0].log.read_text()
    calm = nodes.train(*options, "--set", "name=calm")
    told = calm.communicate()[0]
    assert calm.returncode == 0, told
    results = [json.loads(run.result.read_text()) for run in runs]
    assert results[0]["top1"] == results[1]["top1"]
    assert runs[0].weights.read_bytes() == runs[1].weights.read_bytes()
