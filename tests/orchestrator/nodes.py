"""Two Ray nodes on this machine for tests, with a job server; no other Ray is touched, and all of it ends with the test."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.util import get_node_ip_address

from tests.orchestrator.servers import end, free_port, wait_for

SUBMISSION = ("ray", "job", "submit", "--working-dir", ".")
PROJECT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
"""A dead node is noticed after seconds instead of 12 and more."""


class Nodes:
    """Ray nodes of one CPU each: the head at 127.0.0.1, and others at addresses of their own.

    Their user has an empty home, so that no token and no running Ray is found.

    ray: the program of the Python that the nodes run.
    """

    def __init__(self, folder: Path, ray: Path = RAY) -> None:
        self.ray = ray
        self.address = "127.0.0.1"
        self.home = folder / "home"
        self.home.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{ray.parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**kept, **QUICK_TO_NOTICE, "HOME": str(self.home), "PATH": path}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.log = folder / "nodes.log"
        self.sessions = tempfile.mkdtemp(prefix="nodes", dir="/tmp")  # short: Unix sockets lie in it
        self.port, dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environment["RAY_API_SERVER_ADDRESS"] = self.dashboard
        self.processes: list[subprocess.Popen[bytes]] = []

    def start_head(self, *options: str, num_cpus: int = 1) -> None:
        """Start the first node, which has the job server."""
        self._start(
            "--head", f"--node-ip-address={self.address}", "--port", str(self.port), "--dashboard-host=127.0.0.1",
            "--dashboard-port", self.dashboard.rpartition(":")[2], *options, num_cpus=num_cpus,
        )  # fmt: skip
        wait_for(f"{self.dashboard}/api/version", self.processes[0])
        self._wait_for_agent()

    def start_autoscaled_head(self, node: Mapping[str, float], most: int) -> None:
        """Start a head of one CPU whose autoscaler starts such nodes on this machine when they are asked for, and ends them when idle."""
        self.address = get_node_ip_address()  # that of the nodes, which the autoscaler's provider starts
        head_id = "f" * 51 + "00000"
        types = {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {**node, "object_store_memory": 150 * 2**20}, "node_config": {}, "min_workers": 0,
                       "max_workers": most},
        }  # fmt: skip
        lists = (
            "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands"
        )
        lists += " worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
        provider = {"type": "external", "module": "tests.orchestrator.fake_nodes.Provider", "launch_multiple": True,
                    "gcs_address": f"{self.address}:{self.port}", "head_node_id": head_id}  # fmt: skip
        config = {
            "cluster_name": "fake", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": 0.5,
            "provider": provider, "available_node_types": types, "head_node_type": "ray.head.default", "docker": {}, "auth": {},
            "file_mounts": {}, "file_mounts_sync_continuously": False, **{name: [] for name in lists.split()},
        }  # fmt: skip
        path = self.home / "autoscaling.json"
        path.write_text(json.dumps(config))
        self.environment |= {
            "PYTHONPATH": str(PROJECT), "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_CLOUD_INSTANCE_ID": head_id,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
        }  # fmt: skip
        self.start_head(f"--autoscaling-config={path}")

    def add(self, address: str, *options: str, num_cpus: int = 1, has_own_home: bool = False) -> None:
        """Start a node and return when the cluster counts on it; a job that begins before would find too little room.

        has_own_home: its home folder is a file system of its own, empty, which no other node sees.
        """
        arguments = ["--address", f"{self.address}:{self.port}", f"--node-ip-address={address}", *options]
        self._start(*arguments, num_cpus=num_cpus, has_own_home=has_own_home)
        while address not in self._alive():
            assert self.processes[-1].poll() is None, self.log.read_text()
            time.sleep(0.5)

    def tell_to_go(self, address: str, deadline_s: int) -> None:
        """Give a node the notice that a cloud gives a spot machine; killing it is left to the caller."""
        (node_id,) = [node["node_id"] for node in self._nodes() if node["node_ip"] == address]
        command = [str(self.ray), "drain-node", "--address", f"{self.address}:{self.port}", "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def kill(self, node: "subprocess.Popen[bytes]") -> None:
        """SIGKILL for all of the node's processes, as when its machine vanishes."""
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            process.kill()
        node.wait()

    def submit(self, *command: str, job: str | None = None, **env_vars: str) -> "subprocess.Popen[str]":
        """Start `ray job submit --working-dir . -- COMMAND`, which prints the job's log as it grows and ends with the job."""
        options = ["--runtime-env-json", json.dumps({"env_vars": env_vars})] if env_vars else []
        options += ["--submission-id", job] if job else []
        line = [*SUBMISSION, *options, "--", *command]
        return subprocess.Popen(
            line, cwd=PROJECT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def stop(self, job: str) -> None:
        """Run `ray job stop`, which returns when the job has ended."""
        subprocess.run([str(self.ray), "job", "stop", job], env=self.environment, capture_output=True, check=True)

    def search(self, cluster: str, *settings: str) -> "subprocess.Popen[str]":
        """Start a short search of digits on the head, with its storage in the home folder; cluster: the content of its YAML."""
        (self.home / "cluster.yaml").write_text(cluster)
        command = [sys.executable, "-m", "orchestrator.search", "digits", "--cluster", str(self.home / "cluster.yaml")]
        command += [word for setting in settings for word in ("--set", setting)]
        environment = self.environment | {"PYTHONPATH": str(PROJECT), "RAY_ADDRESS": f"{self.address}:{self.port}"}
        log = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.home, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )

    def num_alive(self) -> int:
        """Return how many nodes the cluster holds for alive."""
        return sum(node["state"] == "ALIVE" for node in self._nodes())

    def get(self, path: str) -> Any:
        """Return what the dashboard answers."""
        with urllib.request.urlopen(f"{self.dashboard}{path}", timeout=30) as answer:
            return json.load(answer)

    def end(self) -> None:
        """End all nodes, the head last."""
        for process in reversed(self.processes):
            if process.poll() is None:
                end(process, signal.SIGTERM)
        shutil.rmtree(self.sessions, ignore_errors=True)

    def _alive(self) -> set[str]:
        """Return the addresses of the nodes that the cluster holds for alive."""
        return {node["node_ip"] for node in self._nodes() if node["state"] == "ALIVE"}

    def _nodes(self) -> list[dict[str, str]]:
        nodes: list[dict[str, str]] = self.get("/api/v0/nodes")["data"]["result"]["result"]
        return nodes

    def _wait_for_agent(self) -> None:
        """Wait until a job runs: the server answers before, and refuses jobs ("No available agent") or keeps them waiting."""
        command = [str(self.ray), "job", "submit", "--", "true"]
        while True:  # the test's own time limit ends it
            try:
                subprocess.run(command, env=self.environment, capture_output=True, check=True, timeout=20)
                return
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                time.sleep(1)

    def _start(self, *arguments: str, num_cpus: int = 1, has_own_home: bool = False) -> None:
        # each its own folder: in a shared one a node unpacks the job's working directory anew under the feet of the other
        folder = tempfile.mkdtemp(dir=self.sessions)
        command = [
            str(self.ray),
            "start",
            "--block",
            "--num-cpus",
            str(num_cpus),
            "--object-store-memory",
            str(150 * 2**20),
        ]
        command += ["--temp-dir", folder, *arguments]
        # Ray's own port for it is taken where another Ray runs, and then the node can start no job and says so in a log only
        command += ["--dashboard-agent-listen-port", str(free_port())]
        if has_own_home:
            mount = f'mount -t tmpfs tmpfs {shlex.quote(str(self.home))} && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
        with open(self.log, "a") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)


@contextmanager
def one_node(folder: Path, ray: Path = RAY, num_cpus: int = 1) -> Iterator[Nodes]:
    """A head alone, until the block ends; others may be added to it."""
    nodes = Nodes(folder, ray)
    try:
        nodes.start_head(num_cpus=num_cpus)
        yield nodes
    finally:
        nodes.end()


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Two nodes, the second at 127.0.0.2, until the block ends."""
    with one_node(folder) as nodes:
        nodes.add("127.0.0.2")
        yield nodes
