"""A search on a Ray that exports metrics is seen by Prometheus, and the Grafana dashboard asks for what there is."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths
from orchestrator.tuning.monitoring import Monitor
from tests.orchestrator import nodes, planted
from tests.orchestrator.instant_search import NUM_FINETUNING, NUM_GATING
from tests.orchestrator.servers import free_port

DASHBOARD = nodes.PROJECT / "clusters" / "grafana" / "gator.json"
SAMPLE = re.compile(r"^(ray_gator_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(search|status|metric)="([^"]*)"')
NUM_TRIALS = 4
EXPORTED = {"trials", "best", "front_size", "hypervolume", "epochs_total", "gpu_seconds_total"}


def scraped(port: int) -> dict[tuple[str, ...], float]:
    """Return (metric, its labels) -> value."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {
        (name.removeprefix("ray_gator_"), *sorted(value for _, value in LABEL.findall(labels))): float(value)
        for name, labels, value in SAMPLE.findall(text)
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_prometheus_gets_the_last_values_of_a_search(tmp_path: Path) -> None:
    head, port = nodes.Nodes(tmp_path), free_port()
    head.environment["RAY_metrics_report_interval_ms"] = "300"
    try:
        head.start_head(f"--metrics-export-port={port}", num_cpus=2)
        command = [sys.executable, "-m", "tests.orchestrator.instant_search", str(tmp_path), "1.0", str(NUM_TRIALS)]
        environment = head.environment | {
            "PYTHONPATH": str(nodes.PROJECT),
            "RAY_ADDRESS": f"{head.address}:{head.port}",
        }
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as search:
            found: dict[tuple[str, ...], float] = {}
            while search.poll() is None:
                found |= scraped(port)
                time.sleep(0.2)
            assert search.returncode == 0, search.stderr.read() if search.stderr else ""
    finally:
        head.end()
    outcome = Outcome.load(RunPaths(tmp_path / "instant"))
    statuses = Counter(row["status"] for row in outcome.trials)
    assert {name for name, *_ in found} == EXPORTED - {"gpu_seconds_total"}  # a trial has no GPU here
    assert {status: found[("trials", *sorted(("instant", status)))] for status in statuses} == statuses
    assert found["front_size", "instant"] == len(outcome.front)
    assert found["hypervolume", "instant"] == pytest.approx(outcome.hypervolume)
    assert found["best", "instant", "top1"] == outcome.front[0]["top1"]
    assert NUM_TRIALS <= found["epochs_total", "instant"] <= NUM_TRIALS * (NUM_GATING + NUM_FINETUNING)


def test_the_dashboard_asks_for_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = re.findall(
        r"ray_gator_(\w+)", " ".join(target["expr"] for one in dashboard["panels"] for target in one["targets"])
    )
    assert sorted(asked) == sorted(EXPORTED)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_gpu_seconds_are_of_all_gpus_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, counted = Monitor("planted", num_gpus=4), []
    monkeypatch.setattr(monitor._gpu_seconds, "inc", counted.append)
    for epoch in planted.epochs(2):
        monitor.epoch(epoch)
    assert counted == [4 * 2.75] * 2  # train, eval and measure_s of an epoch: 2, 0.5 and 0.25
