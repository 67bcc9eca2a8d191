"""Clusters whose nodes come when they are asked for and leave when they are idle, and a head without CPUs."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_results
from tests.orchestrator.nodes import Nodes, one_node
from tests.orchestrator.servers import end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHORT = ("base.pretraining.epochs=1", "base.gating.epochs=1", "base.finetuning.epochs=1", "scheduler.type=none")
ELASTIC = "workers_per_trial: 1\nresources_per_worker: {CPU: 2}\ngrows_to: 2\n"


def log_of(search: "subprocess.Popen[str]", watch: Callable[[], None] = lambda: None) -> str:
    """Return what a search prints, once it has ended with 0; watch: called a few times a second until then."""
    while search.poll() is None:
        watch()
        time.sleep(0.5)
    log = search.communicate()[0]
    assert search.returncode == 0, log
    return log


def test_search_grows_the_cluster_and_starts_again_from_no_worker(tmp_path: Path) -> None:
    nodes, seen = Nodes(tmp_path), [0]
    try:
        nodes.start_autoscaled_head({"CPU": 2}, most=3)
        log = log_of(nodes.search(ELASTIC, *SHORT, "search.num_trials=2"), lambda: seen.append(nodes.num_alive()))
        assert "2 of 2 trials to run, 2 at once" in log
        assert max(seen) >= 3, "the head and a node for each of the two trials"
        until = time.monotonic() + 120
        while nodes.num_alive() > 1:
            assert time.monotonic() < until, "idle nodes have not left"
            time.sleep(1)
        log = log_of(nodes.search(ELASTIC, *SHORT, "search.num_trials=3"))
        assert "1 of 3 trials to run" in log
        rows = read_results(RunPaths(nodes.home / "runs" / "digits").results)
        assert [row["status"] for row in rows] == ["finished"] * 4  # the unpruned network as well
    finally:
        nodes.end()


def test_search_runs_with_a_head_without_cpus(tmp_path: Path) -> None:
    with one_node(tmp_path, num_cpus=0) as nodes:
        nodes.add("127.0.0.2", num_cpus=2)
        log = log_of(nodes.search("workers_per_trial: 2\n", *SHORT, "search.num_trials=2"))
        assert "2 of 2 trials to run, 2 at once" in log  # four workers of 0.49 CPU


def test_resource_that_no_node_type_offers_is_reported_with_the_answer_of_the_autoscaler(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    try:
        nodes.start_autoscaled_head({"CPU": 2}, most=1)
        del nodes.environment["RAY_API_SERVER_ADDRESS"]  # the search finds the dashboard by itself
        search = nodes.search(ELASTIC.replace("CPU: 2", "CPU: 2, gold: 1"), *SHORT, "search.num_trials=1")
        assert search.stdout is not None
        line = next(line for line in search.stdout if " waits for " in line)
        end(search, signal.SIGTERM)
        assert "the base network waits for 1 worker with {CPU: 2, gold: 1}; the nodes have 1 x {CPU: 1}, " in line
        assert "; Ray's autoscaler reports: No available node types can fulfill " in line
        assert "'gold': 1.0" in line
    finally:
        nodes.end()
