"""The front in MLflow's registry: what a reviewer finds there and takes away."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import gator
from orchestrator.config.search import SearchConfig
from orchestrator.models import networks as models_networks
from orchestrator.models import saved as models_saved
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import append_result
from orchestrator.tracking import packaging as mlflow_models
from orchestrator.tracking import registry as registry_module
from orchestrator.tracking.packaging import package
from orchestrator.tracking.registry import aliases
from orchestrator.tracking.store import sqlite_uri
from orchestrator.tracking.tracker import Tracker
from tests.gator.sweep import lively, random_half
from tests.orchestrator import planted

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MODEL = {"name": "resnet8_cifar", "num_classes": 10, "kwargs": {"width": 4}}
BUDGETS = [{"metric": "latency_ms", "max": 1.5}, {"metric": "latency_ms", "max": 0.5}]


def search_config() -> SearchConfig:
    config: SearchConfig = planted.search_config(budgets=BUDGETS)
    base = config.base.model_copy(update={"model": config.base.model.model_validate(MODEL)})
    return config.model_copy(update={"base": base})


CONFIG = search_config()


@pytest.fixture(scope="module")
def finished_search(tmp_path_factory: pytest.TempPathFactory) -> StoragePaths:
    """A search with real networks on its front, sent to a real store and registered."""
    storage = StoragePaths(tmp_path_factory.mktemp("storage"))
    run = storage.run(CONFIG.name)
    write_atomic(run.config, CONFIG.to_json())
    tracker = Tracker.open(CONFIG, run, storage)
    for row in (planted.unpruned(), planted.finished(0, 97.0, 2.0), planted.finished(1, 90.0, 1.0)):
        write_atomic(run.trial(row["trial_id"]).config, CONFIG.base.to_json())
        if row["kind"] == "trial":
            save_network(run, row["trial_id"], seed=int(row["trial_id"][-1]))
        run_id = tracker.trial_started(row["trial_id"], {}, CONFIG.base, kind=row["kind"])
        append_result(run.results, row | {"mlflow_run_id": run_id})
        tracker.trial_ended(row["trial_id"], row, "finished")
    register(tracker, run)
    return storage


def save_network(run: RunPaths, trial_id: str, seed: int) -> None:
    torch.manual_seed(seed)
    network = lively(models_networks.build(CONFIG.base.model).eval())
    graph = gator.trace(network, IMAGES)
    architecture = gator.Architecture.from_keep(graph, random_half(graph, empty=0.0))
    gator.save_pruned(gator.prune(network, graph, architecture), architecture, run.trial(trial_id).root)


def register(tracker: Tracker, run: RunPaths) -> None:
    tracker.register_front(Outcome.load(run), lambda trial_ids, folder: package(str(run.root), trial_ids, folder))


@pytest.fixture
def client(finished_search: StoragePaths) -> MlflowClient:
    return MlflowClient(sqlite_uri(finished_search))


@pytest.fixture
def run(finished_search: StoragePaths) -> RunPaths:
    return finished_search.run(CONFIG.name)


def test_aliases_name_the_best_networks(run: RunPaths, client: MlflowClient) -> None:
    named = {"best": "trial_0000", "best-macs_ratio-0_5": "trial_0000", "best-latency_ms-1_5": "trial_0001"}
    found = {alias: client.get_model_version_by_alias("planted", alias) for alias in named}
    assert {alias: version.tags["gator.trial_id"] for alias, version in found.items()} == named
    assert set(client.get_registered_model("planted").aliases) == {*named, "knee"}  # nothing lies under 0.5 ms


def test_aliases_of_another_search_move_when_they_are_asked_to(finished_search: StoragePaths, tmp_path: Path) -> None:
    storage = StoragePaths(tmp_path / "storage")  # the other tests find the networks of one search
    shutil.copytree(finished_search.root, storage.root)
    run, client = storage.run(CONFIG.name), MlflowClient(sqlite_uri(storage))

    def named() -> dict[str, str]:
        versions = {version.version: version for version in client.search_model_versions("name = 'planted'")}
        model = client.get_registered_model("planted")
        return {alias: versions[version].tags["gator.search_id"] for alias, version in model.aliases.items()}

    first, before = Tracker.open(CONFIG, run, storage), named()
    assert set(before.values()) == {first.search.search_id}
    other = RunPaths(tmp_path / "planted")
    shutil.copytree(run.root, other.root)
    other.search_id.unlink()
    second = Tracker.open(CONFIG, other, storage)
    outcome = Outcome.load(other)

    def package_one(trial_ids: list[str], folder: str) -> dict[str, str]:
        return package(str(other.root), trial_ids, folder)

    assert sorted(second.register_front(outcome, package_one)) == sorted(before)
    assert named() == before
    assert second.register_front(outcome, package_one, promotes=True) == []
    assert set(named().values()) == {second.search.search_id}
    assert sorted(first.register_front(Outcome.load(run), package_one)) == sorted(before)
    first.register_front(Outcome.load(run), package_one, promotes=True)
    assert named() == before


def test_no_front_has_no_alias(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "planted")
    write_atomic(run.config, CONFIG.to_json())
    assert aliases(Outcome.load(run)) == {}


def test_model_is_linked_to_its_run_numbers_and_data(run: RunPaths, client: MlflowClient) -> None:
    version = client.get_model_version_by_alias("planted", "best")
    source = client.get_run(version.run_id)
    assert source.data.tags["gator.trial_id"] == "trial_0000"
    assert [given.dataset.name for given in source.inputs.dataset_inputs] == ["digits"]
    (model,) = client.search_logged_models([source.info.experiment_id], "metrics.top1 > 95")
    assert (model.name, model.model_id) == ("trial_0000", source.outputs.model_outputs[0].model_id)
    assert {metric.key: metric.value for metric in model.metrics}["latency_ms"] == 2.0


def test_registering_again_adds_nothing(
    finished_search: StoragePaths, run: RunPaths, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_models, "package", None)  # nothing is exported either
    tracker = Tracker.open(CONFIG, run, finished_search)
    tracker.register_front(Outcome.load(run), lambda trial_ids, folder: pytest.fail(f"{trial_ids} exported again"))
    own = f"name = 'planted' AND tags.`gator.search_id` = '{tracker.search.search_id}'"
    assert len(client.search_model_versions(own)) == 2


def test_model_runs_where_our_code_is_not(finished_search: StoragePaths, run: RunPaths, tmp_path: Path) -> None:
    script = """
import sys
sys.modules["gator"] = sys.modules["orchestrator"] = None  # importing them fails
import mlflow, numpy, torch
mlflow.set_tracking_uri(sys.argv[1])
images = numpy.load("images.npy")
numpy.save("pyfunc.npy", mlflow.pyfunc.load_model("models:/planted@best").predict(images))
numpy.save("pytorch.npy", mlflow.pytorch.load_model("models:/planted@best")(torch.from_numpy(images)).detach().numpy())
"""
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    command = [sys.executable, "-c", script, sqlite_uri(finished_search)]
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=100)
    with torch.no_grad():
        expected = models_saved.load_trial(run.root, "trial_0000")(IMAGES)
    for flavour in ("pyfunc", "pytorch"):
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / f"{flavour}.npy")), expected)


def test_files_beside_the_model_make_a_network_that_trains(
    run: RunPaths, client: MlflowClient, tmp_path: Path, finished_search: StoragePaths
) -> None:
    version = client.get_model_version_by_alias("planted", "best")
    (model,) = client.search_logged_models([client.get_run(version.run_id).info.experiment_id], "metrics.top1 > 95")
    files = Path(model.artifact_location.removeprefix("file://"), "extra_files")
    network = gator.load_pruned(files, build=lambda: models_networks.build(CONFIG.base.model))
    network.train()(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_network_that_cannot_be_exported_is_told(run: RunPaths, tmp_path: Path) -> None:
    copy = RunPaths(tmp_path / "copy")
    shutil.copytree(run.root, copy.root)
    copy.trial("trial_0001").weights.write_bytes(b"no weights")
    errors = package(str(copy.root), ["trial_0000", "trial_0001"], str(tmp_path / "models"))
    assert list(errors) == ["trial_0001"]
    assert "cannot be loaded" in errors["trial_0001"]
    assert (tmp_path / "models" / "trial_0000" / "MLmodel").is_file()


def test_networks_are_packaged_into_an_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    def make(dir: Path, prefix: str) -> Any:
        folders.append(str(dir))
        return contextlib.nullcontext(str(tmp_path))

    monkeypatch.chdir(tmp_path)
    storage = StoragePaths(Path("runs"))
    run = storage.run(CONFIG.name)
    write_atomic(run.config, CONFIG.to_json())
    tracker = Tracker.open(CONFIG, run, storage)
    # Python 3.11's keeps a relative folder relative
    monkeypatch.setattr(registry_module, "tempfile", SimpleNamespace(TemporaryDirectory=make))
    tracker.register_front(Outcome.load(run), lambda trial_ids, folder: {})
    assert folders == [str(tmp_path / "runs" / CONFIG.name)]
