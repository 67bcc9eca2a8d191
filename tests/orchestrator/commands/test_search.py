"""The main job as users run it: the command line, real Ray processes, a real MLflow store, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

import gator
from orchestrator.config.search import SearchConfig
from orchestrator.datasets import splits as datasets
from orchestrator.models import networks as models_networks
from orchestrator.models import saved as models_saved
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths
from orchestrator.training.evaluation import evaluate
from orchestrator.training.ranks import Ranks

PROJECT = Path(__file__).resolve().parents[3]
TWO_WORKERS = ("--cluster", str(Path(__file__).with_name("two_workers.yaml")))
SPACE = """
name: tiny
base:
  model:       {name: resnet8_cifar, num_classes: 4, kwargs: {width: 8}}
  data:        {name: synthetic, image_size: 16, global_batch_size: 64}
  pretraining: {epochs: 1, lr: 0.1}
  gating:      {epochs: 2, lr: 0.1}
  finetuning:  {epochs: 1, lr: 0.02}
  profile:     {clock: model}
params:
  gating.target_ratio: {type: float, low: 0.3, high: 0.7}
objectives:
  - {metric: top1, mode: max}
  - {metric: latency_ms, mode: min}
search: {algorithm: random, num_trials: 2, seed: 0}
scheduler: {type: none}
"""


def search(space: Path, storage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(command(space, storage, *arguments), cwd=PROJECT, capture_output=True, text=True, check=False)


def command(space: Path, storage: Path, *arguments: str) -> list[str]:
    """Return the command line of a search with two workers a trial."""
    place = ["--run-dir", str(storage), *TWO_WORKERS]
    return [sys.executable, "-m", "orchestrator.search", str(space), *place, *arguments]


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "tiny.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def finished(space: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Return the run directory of a search that has run to its end."""
    storage = tmp_path_factory.mktemp("storage")
    result = search(space, storage)
    assert result.returncode == 0, result.stderr
    assert "trial_0001" in result.stdout
    return RunPaths(storage / "tiny")


@pytest.mark.timeout(900)
def test_results_front_report_and_mlflow_agree(finished: RunPaths) -> None:
    rows = {row["trial_id"]: row for row in pq.read_table(finished.results).to_pylist()}
    assert set(rows) == {"unpruned", "trial_0000", "trial_0001"}
    assert all(row["status"] == "finished" for row in rows.values())
    assert all(0.25 <= rows[trial_id]["macs_ratio"] <= 0.75 for trial_id in ("trial_0000", "trial_0001"))

    front = json.loads(finished.pareto.read_text())
    assert front["unpruned"] == {name: rows["unpruned"][name] for name in ("top1", "latency_ms", "macs", "params")}
    for member in front["front"]:
        assert all(rows[member["trial_id"]][name] == value for name, value in member.items())

    page = finished.report.read_text()
    assert all(trial_id in page for trial_id in rows)

    client = MlflowClient(f"sqlite:///{finished.root.parent / 'mlflow.db'}")
    for row in rows.values():
        run = client.get_run(row["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert all(run.data.metrics[name] == row[name] for name in ("top1", "latency_ms", "macs", "params"))


@pytest.mark.timeout(900)
def test_reloaded_network_has_the_recorded_accuracy_and_macs(finished: RunPaths) -> None:
    config = SearchConfig.model_validate_json(finished.config.read_text()).base
    row = next(row for row in Outcome.load(finished).rows if row["trial_id"] == "trial_0001")
    network = models_saved.load_trial(finished.root, "trial_0001")
    splits = datasets.load(config.data, config.seed)
    assert evaluate(network, splits.test, config, Ranks())["top1"] == row["top1"]
    graph = gator.trace(models_networks.build(config.model), torch.zeros(2, *splits.input_shape))
    architecture = gator.Architecture.load(finished.trial("trial_0001").architecture)
    assert gator.MacsCost(graph)(architecture) == row["macs"]


@pytest.mark.timeout(900)
def test_the_same_command_shows_a_finished_search_and_another_config_is_refused(
    space: Path, finished: RunPaths
) -> None:
    before = finished.results.read_bytes()
    again = search(space, finished.root.parent)
    assert again.returncode == 0, again.stderr
    assert "trial_0001" in again.stdout
    assert finished.results.read_bytes() == before
    other = search(space, finished.root.parent, "--set", "base.seed=1")
    assert other.returncode == 2
    assert "base.seed: 0 there, 1 here" in other.stderr


COLUMNS_OF_THE_RUN = {"mlflow_run_id", "train_s", "eval_s", "measure_s"}
COLUMNS_OF_THE_CLOCK = {
    "latency_ms",
    "latency_p10_ms",
    "latency_p90_ms",
    "latency_device",
    "latency_source",
    "latency_noisy",
    "latency_conditions",
}


def table_without(run: RunPaths, columns: set[str]) -> list[dict[str, object]]:
    """Return the rows of results.parquet by trial, without some columns."""
    rows = sorted(pq.read_table(run.results).to_pylist(), key=lambda row: str(row["trial_id"]))
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_seed_gives_the_same_table(space: Path, finished: RunPaths, tmp_path: Path) -> None:
    """A search of its own, with a base network of its own: nothing but the seed is shared."""
    result = search(space, tmp_path)
    assert result.returncode == 0, result.stderr
    assert table_without(RunPaths(tmp_path / "tiny"), COLUMNS_OF_THE_RUN) == table_without(finished, COLUMNS_OF_THE_RUN)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trial_from_its_record_in_mlflow_gives_the_same_network(finished: RunPaths) -> None:
    storage = finished.root.parent
    (first,) = [row for row in pq.read_table(finished.results).to_pylist() if row["trial_id"] == "trial_0001"]
    arguments = ["--from-run", first["mlflow_run_id"], "--run-dir", str(storage), *TWO_WORKERS]
    command = [sys.executable, "-m", "orchestrator.search", *arguments]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    again = RunPaths(storage / f"tiny-trial_0001-{first['mlflow_run_id'][:8]}")
    (row,) = [row for row in pq.read_table(again.results).to_pylist() if row["kind"] == "trial"]
    names = ["top1", "top5", "macs", "params", "latency_ms"]
    assert {name: row[name] for name in names} == {name: first[name] for name in names}
    kept = [
        gator.Architecture.load(run.trial(row_id).architecture).keep
        for run, row_id in ((finished, "trial_0001"), (again, row["trial_id"]))
    ]
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_a_real_clock_all_but_latency_is_the_same(space: Path, finished: RunPaths, tmp_path: Path) -> None:
    result = search(space, tmp_path, "--set", "base.profile.clock=wall")
    assert result.returncode == 0, result.stderr
    run, excluded = RunPaths(tmp_path / "tiny"), COLUMNS_OF_THE_RUN | COLUMNS_OF_THE_CLOCK
    assert table_without(run, excluded) == table_without(finished, excluded)
    rows = pq.read_table(run.results).to_pylist()
    assert all(0 < row["latency_p10_ms"] <= row["latency_ms"] <= row["latency_p90_ms"] for row in rows)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for row in rows:  # MLflow has the latencies taken side by side at the end, not those of the trials
        assert client.get_run(row["mlflow_run_id"]).data.metrics["latency_ms"] == row["latency_ms"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_in_the_middle_then_the_same_command(space: Path, finished: RunPaths, tmp_path: Path) -> None:
    """The end is that of the undisturbed search, and the trial that was finished is not run again."""
    process = subprocess.Popen(
        command(space, tmp_path, "--set", "search.max_concurrent=1"), cwd=PROJECT, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    run = RunPaths(tmp_path / "tiny")
    deadline = time.monotonic() + 240
    while not (run.results.exists() and len(pq.read_table(run.results)) == 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first_log = run.trial("trial_0000").log.read_bytes()
    result = search(space, tmp_path, "--set", "search.max_concurrent=1", "--resume")
    assert result.returncode == 0, result.stderr
    assert run.trial("trial_0000").log.read_bytes() == first_log
    columns = ["trial_id", "status", "top1", "latency_ms", "macs", "params", "gating.target_ratio"]
    both = [sorted(pq.read_table(paths.results, columns=columns).to_pylist(), key=str) for paths in (run, finished)]
    assert both[0] == both[1]
