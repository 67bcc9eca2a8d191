"""`ray job submit -- python -m orchestrator.train digits` on Ray nodes that come and go in the middle, and a storage that does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.storage.paths import TrainPaths
from orchestrator.storage.records import read_metrics
from tests.orchestrator.nodes import PROJECT, one_node, two_nodes
from tests.orchestrator.servers import end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_training_survives_the_death_of_a_node_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        f"storage: {tmp_path / 'store'}\nworkers_per_trial: 2\nresources_per_worker: {{CPU: 0.9}}\n"
    )
    command = ["python", "-m", "orchestrator.train", "digits", "--cluster", str(tmp_path / "cluster.yaml")]
    command += ["--set", "base.training.checkpoint_every_s=0.5"]
    command += ["--set", "base.data.global_batch_size=16"]  # 80 steps an epoch: saved in their middle, too
    runs = [TrainPaths(tmp_path / "store" / f"{name}-train") for name in ("disturbed", "calm")]
    with two_nodes(tmp_path) as nodes:
        job = nodes.submit(*command, "--set", "name=disturbed")
        while not (runs[0].metrics.exists() and len(read_metrics(runs[0].metrics)) >= 2):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        nodes.kill(nodes.processes[1])
        nodes.add("127.0.0.3")
        told = job.communicate()[0]
        assert job.returncode == 0, told
        assert "training resumes after" in runs[0].log.read_text()
        calm = nodes.submit(*command, "--set", "name=calm")
        told = calm.communicate()[0]
        assert calm.returncode == 0, told
    results = [json.loads(run.result.read_text()) for run in runs]
    assert results[0]["top1"] == results[1]["top1"]
    assert runs[0].weights.read_bytes() == runs[1].weights.read_bytes()


def elastic_training(tmp_path: Path, *settings: str) -> tuple[list[str], TrainPaths]:
    """Return the command of a training that goes on with one of its two workers, and where it runs."""
    (tmp_path / "cluster.yaml").write_text(
        f"storage: {tmp_path / 'store'}\nworkers_per_trial: 2\nmin_workers_per_trial: 1\nresources_per_worker: {{CPU: 0.9}}\n"
    )
    command = ["python", "-m", "orchestrator.train", "digits", "--cluster", str(tmp_path / "cluster.yaml")]
    for setting in ("name=elastic", "base.data.global_batch_size=16", *settings):
        command += ["--set", setting]
    return command, TrainPaths(tmp_path / "store" / "elastic-train")


def wait_for_two_epochs(job: "subprocess.Popen[str]", run: TrainPaths) -> None:
    while not (run.metrics.exists() and len(read_metrics(run.metrics)) >= 2):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)


def test_training_goes_on_with_fewer_workers_when_a_node_is_told_to_go(tmp_path: Path) -> None:
    command, run = elastic_training(tmp_path, "base.training.checkpoint_every_s=3600", "base.gating.epochs=12")
    with two_nodes(tmp_path) as nodes:
        job = nodes.submit(*command)
        wait_for_two_epochs(job, run)
        nodes.tell_to_go("127.0.0.2", deadline_s=30)
        while "these nodes leave" not in run.log.read_text():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        time.sleep(5)  # the checkpoint is being copied
        nodes.kill(nodes.processes[1])
        told = job.communicate()[0]
    assert job.returncode == 0, told
    assert "training resumes after" in run.log.read_text().partition("these nodes leave")[2]
    states = [json.loads(path.read_text()) for path in run.ray.glob("*/checkpoint_*/state.json")]
    assert [state["world_size"] for state in states if state["stage"] == "done"] == [1]
    assert [row["epoch"] for row in read_metrics(run.metrics)] == [*range(1, 17), 16]
    assert json.loads(run.result.read_text())["top1"] > 90  # an undisturbed run ends between 95 and 99


def test_training_goes_on_with_more_workers_when_a_node_joins(tmp_path: Path) -> None:
    # Ray Train looks for further nodes once a minute
    command, run = elastic_training(tmp_path, "base.gating.epochs=60")
    with one_node(tmp_path) as nodes:
        job = nodes.submit(*command)
        wait_for_two_epochs(job, run)
        nodes.add("127.0.0.2")
        told = job.communicate()[0]
    assert job.returncode == 0, told
    assert run.log.read_text().count("training resumes after") == 1  # once, with both nodes
    states = [json.loads(path.read_text()) for path in run.ray.glob("*/checkpoint_*/state.json")]
    assert {state["world_size"] for state in states} == {2}
    assert [row["epoch"] for row in read_metrics(run.metrics)] == [*range(1, 65), 64]
    assert json.loads(run.result.read_text())["top1"] > 90  # an undisturbed run ends between 95 and 99


def test_training_waits_for_a_storage_that_is_away_for_a_minute(tmp_path: Path) -> None:
    store = tmp_path / "store"
    run = TrainPaths(store / "waits-train")
    command = [sys.executable, "-m", "orchestrator.train", "digits", "--run-dir", str(store), "--set", "name=waits"]
    command += ["--set", "base.training.checkpoint_every_s=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    training = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while not (run.metrics.exists() and len(read_metrics(run.metrics)) >= 2):
            assert training.poll() is None, training.communicate()[0]
            time.sleep(0.05)
        away = store.rename(tmp_path / "away")
        time.sleep(60)
        assert not store.exists(), "something was written under the mount point"
        num_before = len(read_metrics(away / "waits-train" / "metrics.parquet"))
        away.rename(store)
        told = training.communicate()[0]
    finally:
        if training.poll() is None:
            end(training, signal.SIGTERM)
    assert training.returncode == 0, told
    rows = read_metrics(run.metrics)
    assert [row["epoch"] for row in rows] == [*range(1, len(rows)), len(rows) - 1]
    assert num_before < len(rows)
