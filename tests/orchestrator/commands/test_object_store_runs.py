"""Searches whose storage is an object store: moto's S3 server, Ray nodes that share no folder, heads that are lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient

from orchestrator import export, report
from orchestrator.models import load_trial
from orchestrator.storage.addresses import AddressedFolder, joined
from orchestrator.storage.fetching import fetched
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_results
from tests.orchestrator.commands.test_search import PROJECT, SPACE, TWO_WORKERS
from tests.orchestrator.nodes import Nodes
from tests.orchestrator.servers import closed_store, free_port, google_store, mlflow_server, object_store

pytest.importorskip("moto", reason="needs the test extra")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STORE = "s3://bucket/runs"
OF_THE_CLOCK = {"train_s", "eval_s", "measure_s", "mlflow_run_id"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of the server's users."""
    with object_store(tmp_path_factory.mktemp("moto") / "log") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, server: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of the search in a folder, undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    done = search(folder, "--run-dir", str(folder / "runs"))
    told = done.communicate()[0]
    assert done.returncode == 0, told
    return rows_in(RunPaths(folder / "runs" / "tiny"))


def search(home: Path, *arguments: str, name: str = "search") -> "subprocess.Popen[str]":
    """Start the search, or a training, with a home folder of its own."""
    (home / "tiny.yaml").write_text(SPACE)
    command = [sys.executable, "-m", f"orchestrator.{name}", str(home / "tiny.yaml"), *TWO_WORKERS, *arguments]
    environment = {**os.environ, "HOME": str(home)}
    return subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def rows_in(run: RunPaths) -> list[dict[str, Any]]:
    """Return what does not depend on the clock."""
    rows = sorted(read_results(run.results), key=lambda row: str(row["trial_id"]))
    return [{name: value for name, value in row.items() if name not in OF_THE_CLOCK} for row in rows]


def rows_of(prefix: str) -> list[dict[str, Any]]:
    with fetched(f"{STORE}/{prefix}/tiny", "*.parquet") as folder:
        return rows_in(RunPaths(folder))


def names_of(prefix: str) -> set[str]:
    """Return the names of the run's objects."""
    return set(AddressedFolder(f"{STORE}/{prefix}/tiny").stamps())


def run_until(process: "subprocess.Popen[str]", is_reached: Callable[[], bool]) -> None:
    """Return when the condition holds; the search must still run then."""
    while not is_reached():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def lose_head(home: Path, process: "subprocess.Popen[str]", is_reached: Callable[[], bool]) -> None:
    """SIGKILL the search and all of its Ray when the condition holds, and remove what its head has on its disk."""
    run_until(process, is_reached)
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        one.kill()
    process.wait()
    shutil.rmtree(home / ".cache" / "gator")


@pytest.fixture
def mlflow_uri(tmp_path: Path) -> Iterator[str]:
    """The address of MLflow's server."""
    with mlflow_server(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts", free_port()) as uri:
        yield uri


def registered(uri: str, alias: str, images: torch.Tensor, home: Path) -> tuple[str, torch.Tensor]:
    """Return the trial of a model in MLflow's registry, and its logits, computed where nothing of the run is."""
    home.mkdir()
    np.save(home / "images.npy", images.numpy())
    script = f"""
import mlflow, numpy
model = mlflow.pyfunc.load_model("models:/tiny@{alias}")
numpy.save("logits.npy", model.predict(numpy.load("images.npy")))
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = {**kept, "HOME": str(home), "MLFLOW_TRACKING_URI": uri}
    subprocess.run([sys.executable, "-c", script], cwd=home, env=environment, check=True)
    version = MlflowClient(uri).get_model_version_by_alias("tiny", alias)
    return version.tags["gator.trial_id"], torch.from_numpy(np.load(home / "logits.npy"))


def test_nodes_that_share_no_folder_search_into_a_store(
    tmp_path: Path,
    server: Mapping[str, str],
    mlflow_uri: str,
    expected: list[dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    nodes = Nodes(tmp_path)
    nodes.environment |= server
    (tmp_path / "tiny.yaml").write_text(SPACE)
    # the workers run on the second node alone
    (tmp_path / "cluster.yaml").write_text(
        f"storage: {STORE}/apart\nworkers_per_trial: 2\nresources_per_worker: {{CPU: 0.49, far: 0.1}}\n"
        f"mlflow_uri: {mlflow_uri}\n"
    )
    try:
        nodes.start_head()
        nodes.add("127.0.0.2", "--resources", '{"far": 1}', has_own_home=True)
        job = nodes.submit(
            "python",
            "-m",
            "orchestrator.search",
            str(tmp_path / "tiny.yaml"),
            "--cluster",
            str(tmp_path / "cluster.yaml"),
        )
        told = job.communicate()[0]
        assert job.returncode == 0, told
        assert f"report: {STORE}/apart/tiny/report.html" in told
        far_home = Path(f"/proc/{nodes.processes[1].pid}/root{nodes.home}")
        assert not list(far_home.rglob("*.parquet"))
        assert not [path for path in far_home.rglob("*") if "gator" in path.name]
        assert (nodes.home / ".cache/gator/s3/bucket/runs/apart/tiny/results.parquet").exists()
    finally:
        nodes.end()
    assert rows_of("apart") == expected
    names = names_of("apart")
    assert {f"trials/trial_000{n}/weights.safetensors" for n in (0, 1)} < names
    assert not [name for name in names if name.endswith("tensors.pt")], "checkpoints of ended trials are left"

    run_dir = f"{STORE}/apart/tiny"
    assert report.main([run_dir, "--format", "csv"]) == 0
    assert "trial_0001" in capfd.readouterr().out
    out = tmp_path / "network.pt2"
    assert export.main([run_dir, "--trial", "trial_0001", "--format", "pt2", "--out", str(out)]) == 0
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = load_trial(run_dir, "trial_0001")(images)
        torch.testing.assert_close(torch.export.load(out).module()(images), logits, rtol=1e-4, atol=1e-4)
        trial_id, logits = registered(mlflow_uri, "best", images, tmp_path / "elsewhere")
        torch.testing.assert_close(load_trial(run_dir, trial_id)(images), logits, rtol=1e-4, atol=1e-4)


def test_a_search_whose_head_is_lost_goes_on_from_the_store(
    tmp_path: Path, server: Mapping[str, str], expected: list[dict[str, Any]]
) -> None:
    arguments = ("--run-dir", f"{STORE}/lost", "--set", "base.training.checkpoint_every_s=0.5", "--take-over")
    for moment in ("trials/trial_0000/metrics.parquet", "trials/trial_0001/metrics.parquet"):
        lose_head(tmp_path, search(tmp_path, *arguments), lambda moment=moment: moment in names_of("lost"))
    last = search(tmp_path, *arguments)
    told = last.communicate()[0]
    assert last.returncode == 0, told
    assert f"fetching {STORE}/lost/tiny" in told
    assert rows_of("lost") == expected


def test_a_training_that_was_stopped_resumes_on_another_head(tmp_path: Path, server: Mapping[str, str]) -> None:
    arguments = ("--run-dir", f"{STORE}/train", "--set", "base.finetuning.epochs=80")
    store = AddressedFolder(f"{STORE}/train/tiny-train")
    running = search(tmp_path, *arguments, name="train")
    run_until(running, lambda: store.is_there("metrics.parquet"))
    running.send_signal(signal.SIGTERM)
    told = running.communicate()[0]
    assert running.returncode == 143, told
    assert not store.is_there("result.json")
    shutil.rmtree(tmp_path / ".cache" / "gator")
    last = search(tmp_path, *arguments, name="train")
    told = last.communicate()[0]
    assert last.returncode == 0, told
    log = store.read("log.txt").decode()
    assert "stopped on request, and saved" in log
    assert "training resumes after" in log
    assert store.is_there("result.json")
    assert not store.is_there(".stop")


def test_a_search_in_google_cloud_storage(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pytest.importorskip("gcp_storage_emulator", reason="needs the test extra")
    with google_store(tmp_path / "log") as bucket:
        arguments = (
            "--run-dir",
            joined(bucket, "runs"),
            "--set",
            "base.training.checkpoint_every_s=0.5",
            "--take-over",
        )
        run_dir = AddressedFolder(joined(bucket, "runs/tiny"))
        lose_head(tmp_path, search(tmp_path, *arguments), lambda: run_dir.is_there("trials/trial_0001/metrics.parquet"))
        last = search(tmp_path, *arguments)
        told = last.communicate()[0]
        assert last.returncode == 0, told
        assert "fetching gs://bucket/runs/tiny" in told
        with fetched(run_dir.address, "*.parquet") as folder:
            assert rows_in(RunPaths(folder)) == expected
        assert not [name for name in run_dir.stamps() if name.endswith("tensors.pt")], (
            "checkpoints of ended trials are left"
        )


def test_a_search_waits_for_a_store_that_is_away(
    tmp_path: Path, server: Mapping[str, str], expected: list[dict[str, Any]]
) -> None:
    (process,) = [one for one in psutil.Process().children() if "moto.server" in one.cmdline()]
    running = search(tmp_path, "--run-dir", f"{STORE}/away")
    run_until(running, lambda: "trials/trial_0000/metrics.parquet" in names_of("away"))
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(60)
    finally:
        process.send_signal(signal.SIGCONT)
    told = running.communicate()[0]
    assert running.returncode == 0, told
    assert rows_of("away") == expected


@pytest.fixture
def closed() -> Iterator[str]:
    """The address of a server that refuses every request."""
    with closed_store() as address:
        yield address


@pytest.mark.parametrize("case", ["wrong bucket", "no access", "no region"])
def test_a_store_that_cannot_be_used_is_one_error(
    case: str, tmp_path: Path, server: Mapping[str, str], closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if case == "no access":
        monkeypatch.setenv("AWS_ENDPOINT_URL", closed)
    elif case == "no region":
        for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name)
    refused = search(tmp_path, "--run-dir", "s3://no-bucket/runs" if case == "wrong bucket" else STORE)
    told = refused.communicate()[0]
    assert refused.returncode == 2, told
    assert told.startswith("search: s3://"), told
    assert "check the bucket's name, the credentials and the region" in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / ".cache" / "gator").exists()
