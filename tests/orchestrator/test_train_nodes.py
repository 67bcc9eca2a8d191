"""`ray job submit -- python -m orchestrator.train digits` on two Ray nodes, one of which is killed in the middle."""

import json
import time
from pathlib import Path

import pytest

from orchestrator.paths import TrainPaths
from orchestrator.records import read_metrics
from tests.orchestrator.nodes import two_nodes

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
        assert "goes on after" in runs[0].log.read_text()
        calm = nodes.submit(*command, "--set", "name=calm")
        told = calm.communicate()[0]
        assert calm.returncode == 0, told
    results = [json.loads(run.result.read_text()) for run in runs]
    assert results[0]["top1"] == results[1]["top1"]
    assert runs[0].weights.read_bytes() == runs[1].weights.read_bytes()
