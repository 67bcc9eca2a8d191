import base64
import doctest
import json
import logging
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from getpass import getuser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import RunDirError, TrackingError
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.page import write_report
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import append_result, update_results, write_metrics
from orchestrator.tracking import delivery
from orchestrator.tracking.store import creation_lock, is_there, sqlite_uri
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.views import front_view, view_key
from tests.orchestrator import planted
from tests.orchestrator.servers import free_port, mlflow_server

CONFIG = planted.search_config()


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that MLflow has created: its migrations take seconds, so each test starts from a copy."""
    storage = StoragePaths(tmp_path_factory.mktemp("store"))
    MlflowClient(sqlite_uri(storage)).search_experiments(max_results=1)
    return storage.mlflow_db


@pytest.fixture
def storage(tmp_path: Path, empty_store: Path) -> StoragePaths:
    storage = StoragePaths(tmp_path)
    shutil.copy(empty_store, storage.mlflow_db)
    return storage


@pytest.fixture
def run(storage: StoragePaths) -> RunPaths:
    """The run directory as the driver finds it: claimed, so with its config."""
    run = storage.run(CONFIG.name)
    write_atomic(run.config, CONFIG.model_dump_json())
    return run


@pytest.fixture
def client(storage: StoragePaths) -> MlflowClient:
    return MlflowClient(sqlite_uri(storage))


def record(tracker: Tracker, row: dict[str, object], num_epochs: int = 3) -> None:
    """Send a trial as the driver does."""
    params = {"gating.loss_weight": row["gating.loss_weight"]} if "gating.loss_weight" in row else {}
    trial_id = str(row["trial_id"])
    tracker.trial_started(trial_id, params, CONFIG.base, kind=str(row["kind"]))
    for metrics in planted.epochs(num_epochs):
        tracker.epoch(trial_id, metrics)
    tracker.trial_ended(trial_id, row, row["status"], error="loss is NaN" if row["status"] == "failed" else None)
    tracker.show(lambda: Outcome.so_far(CONFIG, tracker._run))


def record_search(tracker: Tracker, run: RunPaths) -> None:
    """Send a whole search, its run directory written as the search writes it."""
    rows = planted.all_rows()
    planted.plant(run, CONFIG, rows)
    for row in rows:
        record(tracker, row)
    outcome = write_report(run)
    tracker.search_ended(lambda: outcome)


def child(client: MlflowClient, trial_id: str) -> Run:
    (found,) = client.search_runs(["1"], f"tags.`gator.trial_id` = '{trial_id}'")
    return found


def artifacts(client: MlflowClient, run_id: str) -> set[str]:
    return {file.path for file in client.list_artifacts(run_id)}


def history(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, int, float]]:
    return sorted((point.step, point.timestamp, point.value) for point in client.get_metric_history(run_id, metric))


@pytest.mark.parametrize(
    "module", ["orchestrator.pareto.front", "orchestrator.tracking.tracker", "orchestrator.errors"]
)
def test_examples_in_docstrings_hold(module: str) -> None:
    assert doctest.testmod(sys.modules[module]).failed == 0


def test_first_open_makes_a_store_in_write_ahead_mode(tmp_path: Path) -> None:
    storage = StoragePaths(tmp_path / "runs")
    tracker = Tracker.open(CONFIG, storage.run("planted"), storage)
    with closing(sqlite3.connect(storage.mlflow_db)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    experiment = MlflowClient(tracker.uri).get_experiment_by_name("planted")
    assert experiment is not None
    assert experiment.artifact_location == (storage.mlartifacts / "planted").as_uri()


def test_trials_are_nested_in_the_search(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    run_id = tracker.trial_started("trial_0000", {}, CONFIG.base)
    found = child(client, "trial_0000")
    assert found.info.run_id == run_id
    assert found.data.tags["mlflow.parentRunId"] == tracker.parent_id
    assert found.info.status == "RUNNING"
    assert client.get_run(tracker.parent_id).data.tags["gator.kind"] == "search"


def test_best_network_under_a_limit_is_found_by_a_filter(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    record_search(Tracker.open(CONFIG, run, storage), run)
    found = client.search_runs(
        ["1"],
        "tags.`gator.kind` = 'trial' AND tags.`gator.status` = 'finished' AND metrics.latency_ms <= 2.5 "
        "AND params.`model.name` = 'resnet20_cifar'",
        order_by=["metrics.top1 DESC"],
    )
    assert [one.info.run_name for one in found] == ["trial_0000", "trial_0001", "trial_0002"]
    assert found[0].data.params["gating.loss_weight"] == "0.5"


def test_filter_strings_of_the_docs_return_what_they_say(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    record_search(Tracker.open(CONFIG, run, storage), run)
    page = (Path(__file__).parents[3] / "docs" / "mlflow.md").read_text()
    (block,) = [block for block in page.split("```") if block.startswith("\ntags.")]
    found = [{one.info.run_name for one in client.search_runs(["1"], line)} for line in block.strip().splitlines()]
    assert found == [
        {"trial_0000", "trial_0001", "trial_0002"},  # within the budget
        {"trial_0000", "trial_0001"},  # the front
        {"trial_0004"},  # stopped early
    ]


def test_epochs_carry_their_recorded_time(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    record(Tracker.open(CONFIG, run, storage), planted.finished(0, 97.0, 2.0), num_epochs=2)
    run_id = child(client, "trial_0000").info.run_id
    first, second = planted.EPOCH_MS + 1000, planted.EPOCH_MS + 2000
    assert history(client, run_id, "validation/top1") == [(1, first, 81.0), (2, second, 82.0)]
    assert history(client, run_id, "top1") == [(0, second, 97.0)]


def test_epoch_that_is_repeated_is_written_once(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    run_id = tracker.trial_started("trial_0000", {}, CONFIG.base)
    epochs = planted.epochs(3)
    for metrics in (epochs[0], epochs[1], {**epochs[1], "timestamp_ms": epochs[1]["timestamp_ms"] + 500}, epochs[2]):
        tracker.epoch("trial_0000", metrics)
    assert [step for step, _, _ in history(client, str(run_id), "train/loss")] == [1, 2, 3]


def test_final_report_is_no_further_epoch(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    tracker.trial_started("trial_0000", {}, CONFIG.base)
    (last,) = planted.epochs(1)
    tracker.epoch("trial_0000", last)
    tracker.epoch("trial_0000", last | {"final": True, "top1": 50.0, "timestamp_ms": last["timestamp_ms"] + 9})
    assert len(history(client, child(client, "trial_0000").info.run_id, "validation/top1")) == 1


def test_nothing_that_is_not_finite_is_sent(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    tracker.trial_started("trial_0000", {}, CONFIG.base)
    tracker.epoch("trial_0000", planted.epochs(1)[0] | {"loss": float("nan"), "latency_ms": float("inf")})
    metrics = child(client, "trial_0000").data.metrics
    assert "validation/top1" in metrics
    assert not {"train/loss", "network/latency_ms"} & set(metrics)


@pytest.mark.parametrize(
    ("row", "status", "tags"),
    [
        pytest.param(planted.finished(0, 97.0, 2.0), "FINISHED", {"gator.latency_device": "a test CPU"}, id="finished"),
        pytest.param(
            planted.finished(0, 97.0, 2.0) | {"latency_noisy": True, "latency_conditions": '{"dtype": "float16"}'},
            "FINISHED",
            {"gator.latency_noisy": "True", "gator.latency.dtype": "float16"},
            id="conditions",
        ),
        pytest.param(planted.stopped(0, epoch=2), "FINISHED", {"gator.stopped_at_epoch": "2"}, id="stopped"),
        pytest.param(planted.failed(0), "FAILED", {"gator.error": "loss is NaN"}, id="failed"),
    ],
)
def test_how_a_trial_ended_is_told(
    storage: StoragePaths,
    run: RunPaths,
    client: MlflowClient,
    row: dict[str, object],
    status: str,
    tags: dict[str, str],
) -> None:
    record(Tracker.open(CONFIG, run, storage), row)
    ended = child(client, "trial_0000")
    assert ended.info.status == status
    assert {name: ended.data.tags.get(name) for name in tags} == tags
    assert ended.data.tags["gator.status"] == row["status"]


def test_files_of_a_trial_are_kept(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    row = planted.finished(0, 97.0, 2.0)
    planted.plant_trial(run, CONFIG, row)
    tracker = Tracker.open(CONFIG, run, storage)
    tracker.trial_started("trial_0000", {}, CONFIG.base)
    tracker.trial_ended("trial_0000", row, "finished")
    ended = child(client, "trial_0000")
    names = artifacts(client, ended.info.run_id)
    assert names == {"architecture.json", "config.json", "widths.png"}
    assert ended.info.artifact_uri.startswith((storage.mlartifacts / "planted").as_uri())


def test_no_file_holds_a_secret(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = CONFIG.base.model.name
    monkeypatch.setenv("WANDB_KEY", secret)
    row = planted.finished(0, 97.0, 2.0)
    planted.plant_trial(run, CONFIG, row)
    tracker = Tracker.open(CONFIG, run, storage)
    record(tracker, row)
    for run_id, name in ((tracker.parent_id, "search.yaml"), (child(client, "trial_0000").info.run_id, "config.json")):
        text = Path(client.download_artifacts(run_id, name)).read_text()
        assert yaml.safe_load(text).get("base", yaml.safe_load(text))["model"]["name"] == "..."
        assert secret not in text


def test_what_a_link_leads_to_is_not_sent(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    row = planted.finished(0, 97.0, 2.0)
    planted.plant_trial(run, CONFIG, row)
    run.trial("trial_0000").log.symlink_to("/etc/passwd")
    record(Tracker.open(CONFIG, run, storage), row)
    assert artifacts(client, child(client, "trial_0000").info.run_id) == set()
    assert "log.txt is a link" in caplog.text


def test_second_process_attaches_and_adds_nothing_twice(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    row = planted.finished(0, 97.0, 2.0)
    first = Tracker.open(CONFIG, run, storage)
    record(first, row)
    before = child(client, "trial_0000")
    second = Tracker.open(CONFIG, run, storage)
    record(second, row)
    assert second.delivery.num_failed == 0
    assert (second.search.search_id, second.parent_id) == (first.search.search_id, first.parent_id)
    assert child(client, "trial_0000").info.run_id == before.info.run_id
    for metric in ("validation/top1", "train/loss", "top1", "latency_ms"):
        assert len(history(client, before.info.run_id, metric)) == (3 if "/" in metric else 1)


def test_more_trials_are_the_same_search_with_a_tag(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    first = Tracker.open(CONFIG, run, storage)
    more = CONFIG.model_copy(update={"search": CONFIG.search.model_copy(update={"num_trials": 64})})
    second = Tracker.open(more, run, storage)
    assert second.parent_id == first.parent_id
    data = client.get_run(first.parent_id).data
    assert (data.params["search.num_trials"], data.tags["gator.num_trials"]) == (str(CONFIG.search.num_trials), "64")
    assert "num_trials: 64" in mlflow.artifacts.load_text(
        f"{client.get_run(first.parent_id).info.artifact_uri}/search.yaml"
    )


def test_another_run_directory_is_another_search(storage: StoragePaths, run: RunPaths) -> None:
    first = Tracker.open(CONFIG, run, storage)
    second = Tracker.open(CONFIG, storage.run("elsewhere"), storage)
    assert first.search.experiment_id == second.search.experiment_id
    assert first.parent_id != second.parent_id


def test_dead_trials_are_killed_and_go_on_when_resumed(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    Tracker.open(CONFIG, run, storage).trial_started("trial_0000", {}, CONFIG.base)
    tracker = Tracker.open(CONFIG, run, storage)
    dead = child(client, "trial_0000")
    assert (dead.info.status, dead.data.tags["gator.status"]) == ("KILLED", "killed")
    tracker.trial_started("trial_0000", {}, CONFIG.base)
    resumed = child(client, "trial_0000")
    assert (resumed.info.status, resumed.data.tags["gator.status"]) == ("RUNNING", "running")


def test_epochs_that_were_not_sent_are_sent_once_the_trial_goes_on(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    epochs = planted.epochs(4)
    first = Tracker.open(CONFIG, run, storage)
    first.trial_started("trial_0000", {}, CONFIG.base)
    first.epoch("trial_0000", epochs[0])
    write_metrics(run.trial("trial_0000").metrics, epochs[:2])  # the process dies before it sends the second one
    second = Tracker.open(CONFIG, run, storage)
    run_id = second.trial_started("trial_0000", {}, CONFIG.base)
    for metrics in ({**epochs[1], "timestamp_ms": epochs[1]["timestamp_ms"] + 500}, *epochs[2:]):  # trained once more
        second.epoch("trial_0000", metrics)
    assert [step for step, _, _ in history(client, str(run_id), "train/loss")] == [1, 2, 3, 4]


def test_results_that_were_not_sent_are_sent_by_the_next_process(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    Tracker.open(CONFIG, run, storage).trial_started("trial_0000", {}, CONFIG.base)
    planted.plant(run, CONFIG, planted.all_rows())
    Tracker.open(CONFIG, run, storage)
    found = child(client, "trial_0000")
    assert found.info.status == "FINISHED"
    assert found.data.metrics["top1"] == 97.0
    assert len(history(client, found.info.run_id, "train/loss")) == 3
    assert child(client, "trial_0005").info.status == "FAILED"


def test_latencies_that_were_not_sent_are_sent_by_the_next_process(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    row = planted.finished(0, 97.0, 2.0)
    record(Tracker.open(CONFIG, run, storage), row)
    planted.plant(run, CONFIG, [row])
    update_results(run.results, [row | {"latency_ms": 1.25}])
    Tracker.open(CONFIG, run, storage)
    found = child(client, "trial_0000")
    assert (found.data.metrics["latency_ms"], found.info.status) == (1.25, "FINISHED")


def test_run_whose_creation_got_no_answer_is_not_made_twice(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    create = tracker.search.client.create_run

    def create_without_answer(*arguments: Any, **options: Any) -> Run:
        monkeypatch.undo()
        create(*arguments, **options)
        raise MlflowException("timed out")

    monkeypatch.setattr(tracker.search.client, "create_run", create_without_answer)
    planted.plant(run, CONFIG, [planted.finished(0, 97.0, 2.0)])
    record(tracker, planted.finished(0, 97.0, 2.0))
    assert child(client, "trial_0000").info.status == "FINISHED"  # child() finds exactly one


def test_search_counts_as_recorded_when_nothing_is_missing(storage: StoragePaths, run: RunPaths) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    record(tracker, planted.failed(0))
    planted.plant(run, CONFIG, [planted.failed(0)])
    write_report(run)
    with missing_table(storage, "metrics"):
        tracker.search_ended(lambda: Outcome.load(run), "FAILED")
    assert not run.recorded.exists()
    Tracker.open(CONFIG, run, storage).search_ended(lambda: Outcome.load(run), "FAILED")
    assert "viewStateShareKey" in run.recorded.read_text()


def test_the_latency_table_of_a_search_is_an_artefact_of_its_trials(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, tmp_path: Path
) -> None:
    table = tmp_path / "resnet20_cifar_8px_b64_float32_eager_0123456789ab.parquet"
    table.write_bytes(b"PAR1")
    profile = CONFIG.base.profile.model_copy(update={"latency_table": str(table)})
    config = CONFIG.model_copy(update={"base": CONFIG.base.model_copy(update={"profile": profile})})
    record(Tracker.open(config, run, storage), planted.finished(0, 97.0, 2.0))
    assert table.name in artifacts(client, child(client, "trial_0000").info.run_id)


@pytest.mark.parametrize("is_resumed", [False, True], ids=["same process", "next process"])
def test_new_latencies_take_the_place_of_the_old(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, is_resumed: bool
) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    row = planted.finished(0, 97.0, 2.0)
    planted.plant(run, CONFIG, [row])
    record(tracker, row)
    before = child(client, "trial_0000")
    if is_resumed:
        tracker = Tracker.open(CONFIG, run, storage)
    tracker.remeasured({**row, "latency_ms": 1.25, "latency_p90_ms": 1.5})
    after = child(client, "trial_0000")
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert (after.data.metrics["latency_ms"], after.data.metrics["latency_p90_ms"]) == (1.25, 1.5)
    assert after.data.metrics["top1"] == 97.0
    assert len(history(client, after.info.run_id, "train/loss")) == len(
        history(client, before.info.run_id, "train/loss")
    )


def test_interrupted_search_leaves_no_run_running(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    planted.plant(run, CONFIG, [planted.unpruned()])
    record(tracker, planted.unpruned())
    tracker.trial_started("trial_0000", {}, CONFIG.base)
    tracker.search_ended(lambda: Outcome.load(run), "KILLED")
    statuses = {one.info.run_name: one.info.status for one in client.search_runs(["1"])}
    assert statuses == {tracker.search.search_id: "KILLED", "unpruned": "FINISHED", "trial_0000": "KILLED"}


def test_parent_run_shows_the_front(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    record_search(tracker, run)
    parent = client.get_run(tracker.parent_id)
    assert artifacts(client, tracker.parent_id) == {
        "front.png", "pareto.json", "report.html", "results.csv", "search.yaml",
    }  # fmt: skip
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["front_size"] == 2
    assert parent.data.metrics["hypervolume"] == json.loads(run.pareto.read_text())["hypervolume"]
    assert "workflowType=machine_learning" in parent.data.tags["mlflow.note.content"]
    assert f"path=front.png&run_uuid={tracker.parent_id}" in parent.data.tags["mlflow.note.content"]
    front = client.search_runs(["1"], "tags.`gator.front` = 'true'", order_by=["metrics.top1 DESC"])
    assert [one.info.run_name for one in front] == [row["trial_id"] for row in Outcome.load(run).front]


def test_description_of_a_large_front_is_not_cut(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    rows = [
        planted.unpruned(),
        *(planted.finished(number, 97.0 - number / 10, 2.0 - number / 50) for number in range(61)),
    ]
    planted.plant(run, CONFIG, rows)
    record(tracker, rows[0])
    record(tracker, rows[1])
    outcome = Outcome.load(run)
    names = {row["trial_id"]: tracker.parent_id for row in outcome.front}
    tracker.search.write_progress(outcome, names, 61)
    note = client.get_run(tracker.parent_id).data.tags["mlflow.note.content"]
    assert "One in 4 of the 61 networks of the front:" in note
    assert note.endswith(f"![front](get-artifact?path=front.png&run_uuid={tracker.parent_id})")
    assert len(note) < 8000


def test_front_is_shown_while_the_search_runs(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    for row in (planted.unpruned(), planted.finished(0, 97.0, 2.0)):
        planted.plant_trial(run, CONFIG, row)
        append_result(run.results, row)
        tracker._progress_due = 0.0  # a test does not wait for its turn
        record(tracker, row)
    assert client.get_run(tracker.parent_id).info.status == "RUNNING"
    assert {"front.png", "report.html", "results.csv"} <= artifacts(client, tracker.parent_id)
    assert [step for step, _, _ in history(client, tracker.parent_id, "front_size")] == [3, 6]  # epochs spent
    (_, _, volume) = history(client, tracker.parent_id, "hypervolume")[-1]
    assert volume == pytest.approx(Outcome.load(run).hypervolume)


def test_showing_the_front_takes_a_small_share_of_the_time(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    planted.plant(run, CONFIG, planted.all_rows())
    for row in planted.all_rows():  # within a second or two: only the first of them pays for the picture
        record(tracker, row)
    assert len(history(client, tracker.parent_id, "front_size")) == 1


def test_search_is_tagged_with_its_cluster(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    secret = ClusterConfig(mlflow_uri="http://me:secret@db:5000", env_vars={"TOKEN": "secret"})
    tracker.describe_cluster({"nodes": 2, "CPU": 8}, secret)
    tags = client.get_run(tracker.parent_id).data.tags
    assert (tags["gator.nodes"], tags["gator.CPU"]) == ("2", "8")
    recorded = Path(client.download_artifacts(tracker.parent_id, "cluster.yaml")).read_text()
    assert "workers_per_trial: 2" in recorded
    assert "secret" not in recorded


def test_saved_view_draws_accuracy_against_latency(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    experiment = client.get_experiment(tracker.search.experiment_id)
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{view_key(tracker.search.search_id)}"])
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    assert tracker.search.search_id in state["searchFilter"]
    scatter = state["compareRunCharts"][0]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("latency_ms", "top1")
    record_search(tracker, run)
    assert len(client.search_runs(["1"], state["searchFilter"])) == len(planted.all_rows())


def test_a_second_view_shows_the_front_alone(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    record_search(tracker, run)
    experiment = client.get_experiment(tracker.search.experiment_id)
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{view_key(front_view(tracker.search.search_id))}"])
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    found = client.search_runs(["1"], state["searchFilter"])
    assert {one.data.tags["gator.trial_id"] for one in found} == Outcome.load(run).front_ids


def test_the_cluster_names_the_experiment_and_may_register_nothing(
    storage: StoragePaths, run: RunPaths, client: MlflowClient
) -> None:
    cluster = ClusterConfig(mlflow_experiment="/Shared/{user}/{name}", mlflow_model=None)
    tracker = Tracker.open(CONFIG, run, storage, cluster)
    assert client.get_experiment(tracker.search.experiment_id).name == f"/Shared/{getuser()}/planted"
    record_search(tracker, run)
    assert tracker.register_front(Outcome.load(run), lambda *_: pytest.fail("packaged")) == []
    assert client.search_registered_models() == []
    assert run.recorded.exists(), "the search is whole without a model"


@pytest.mark.parametrize(
    "uri",
    [
        "databricks",
        "databricks://team",
        "arn:aws:sagemaker:eu-west-1:1:mlflow-tracking-server/x",
        "azureml://eu.api.azureml.ms/mlflow/v1.0/workspaces/x",
    ],
)
def test_a_service_is_opened_by_the_name_of_the_experiment(storage: StoragePaths, run: RunPaths, uri: str) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    tracker.uri = uri
    assert tracker.how_to_open() == f"experiment planted (id {tracker.search.experiment_id}) at {uri}"
    assert is_there(uri, timeout_s=0.1), "a service without a health page was asked for one"


def test_how_to_open_names_the_store_and_the_view(storage: StoragePaths, run: RunPaths) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    command, link = tracker.how_to_open(port=5001).splitlines()
    assert f"mlflow ui --backend-store-uri sqlite:///{storage.mlflow_db} --host 127.0.0.1 --port 5001" in command
    assert link.startswith(
        f"http://127.0.0.1:5001/#/experiments/{tracker.search.experiment_id}/runs?workflowType=machine_learning&"
    )
    assert link.endswith(view_key(tracker.search.search_id))


def test_store_that_fails_is_logged_once_and_made_up_for(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker.open(CONFIG, run, storage)
    planted.plant(run, CONFIG, planted.all_rows())
    with missing_table(storage, "metrics"), caplog.at_level(logging.WARNING, "orchestrator"):
        record(tracker, planted.finished(0, 97.0, 2.0))
    assert tracker.delivery.num_failed == 5  # three epochs, the end and the front
    assert len(caplog.records) == 1
    tracker.search_ended(lambda: Outcome.load(run))
    found = child(client, "trial_0000")
    assert (found.info.status, found.data.metrics["top1"]) == ("FINISHED", 97.0)
    assert len(history(client, found.info.run_id, "train/loss")) == 3


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        pytest.param(
            "http://me:secret@127.0.0.1:9", r"the MLflow store http://127\.0\.0\.1:9 cannot be opened", id="no server"
        ),
        pytest.param("file:///tmp/mlruns", "maintenance mode", id="file store"),
        pytest.param("gopher://x", "cannot be opened", id="unknown scheme"),
    ],
)
def test_store_that_cannot_be_opened_is_told(
    storage: StoragePaths, run: RunPaths, monkeypatch: pytest.MonkeyPatch, uri: str, message: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=message) as error:
        Tracker.open(CONFIG, run, storage, ClusterConfig(mlflow_uri=uri))
    assert "secret" not in str(error.value)


def test_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    storage = StoragePaths(tmp_path)
    storage.mlflow_db.write_text("no database " * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        Tracker.open(CONFIG, storage.run("planted"), storage)


def test_deleted_experiment_is_told(storage: StoragePaths, run: RunPaths, client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("planted"))
    with pytest.raises(TrackingError, match="experiment 'planted' was deleted"):
        Tracker.open(CONFIG, run, storage)


@pytest.mark.slow
def test_many_processes_may_make_the_store_at_once(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from orchestrator.storage.paths import StoragePaths
from orchestrator.tracking.tracker import Tracker
from tests.orchestrator import planted
from tests.orchestrator.servers import free_port, mlflow_server
storage = StoragePaths(Path(sys.argv[1]))
print(Tracker.open(planted.search_config(), storage.run(sys.argv[2]), storage).parent_id)
"""
    commands = [[sys.executable, "-c", script, str(tmp_path), f"run_{number}"] for number in range(3)]
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for command in commands]
    parent_ids = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(parent_ids) == 3


@pytest.mark.slow
def test_server_that_is_gone_does_not_hold_up_the_search(storage: StoragePaths, run: RunPaths) -> None:
    port = free_port()
    with mlflow_server(sqlite_uri(storage), storage.mlartifacts, port) as uri:
        tracker = Tracker.open(CONFIG, run, storage, ClusterConfig(mlflow_uri=uri))
        planted.plant(run, CONFIG, planted.all_rows())
    began = time.monotonic()
    for row in planted.all_rows():
        record(tracker, row)
    assert time.monotonic() - began < 15  # one write waits through its retries, the others are put off
    assert tracker.delivery.num_failed == 6 * len(planted.all_rows())
    with mlflow_server(sqlite_uri(storage), storage.mlartifacts, port) as uri:
        tracker.search_ended(lambda: Outcome.load(run))
        found = MlflowClient(uri).search_runs([tracker.search.experiment_id], "tags.`gator.kind` != 'search'")
    assert {one.info.status for one in found} == {"FINISHED", "FAILED"}
    assert len(found) == len(planted.all_rows())


@contextmanager
def silent_server() -> Iterator[tuple[str, list[str]]]:
    """A server that takes requests and never answers; yields its URI and the paths that were asked for."""
    asked: list[str] = []
    connections: list[socket.socket] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed at the end
                return
            connections.append(connection)  # kept, or it would be closed
            asked.append(connection.recv(1000).decode().split(" ")[1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in connections:
        connection.close()


def test_server_that_hangs_holds_up_one_write(
    storage: StoragePaths, run: RunPaths, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(delivery, "PAUSE_S", 0.0)
    monkeypatch.setattr(delivery, "PROBE_S", 0.1)
    tracker = Tracker.open(CONFIG, run, storage)
    planted.plant(run, CONFIG, planted.all_rows())
    with silent_server() as (uri, asked):
        tracker.delivery.uri, tracker.search.client = uri, MlflowClient(uri)
        record(tracker, planted.finished(0, 97.0, 2.0))
    assert len([path for path in asked if path != "/health"]) == 1
    assert tracker.delivery.num_failed == 6  # the start, three epochs, the end and the front
    tracker.delivery.uri, tracker.search.client = sqlite_uri(storage), client
    tracker.search_ended(lambda: Outcome.load(run))
    found = child(client, "trial_0000")
    assert (found.info.status, found.data.metrics["top1"]) == ("FINISHED", 97.0)
    assert len(history(client, found.info.run_id, "train/loss")) == 3


@contextmanager
def missing_table(storage: StoragePaths, table: str) -> Iterator[None]:
    """Break the store for a while: every statement that names the table fails."""
    with closing(sqlite3.connect(storage.mlflow_db)) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
    yield
    with closing(sqlite3.connect(storage.mlflow_db)) as connection:
        connection.execute(f"ALTER TABLE {table}_away RENAME TO {table}")


def test_a_damaged_architecture_ends_neither_the_search_nor_its_end_in_mlflow(
    storage: StoragePaths, client: MlflowClient
) -> None:
    run = storage.run(CONFIG.name)
    planted.plant(run, CONFIG, planted.all_rows())
    tracker = Tracker.open(CONFIG, run, storage)
    outcome = Outcome.so_far(CONFIG, run)
    run.trial(outcome.front[0]["trial_id"]).architecture.write_text("{")
    tracker.show(lambda: outcome)
    tracker.search_ended(lambda: outcome, "KILLED")
    assert client.get_run(tracker.parent_id).info.status == "KILLED"
    with pytest.raises(RunDirError):
        write_report(run)


@pytest.mark.parametrize(("kind", "warns"), [("nfs4", True), ("fuse.gcsfuse", True), ("ext4", False)])
def test_sqlite_on_a_network_file_system_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, warns: bool
) -> None:
    mounts = [SimpleNamespace(mountpoint="/", fstype="nfs" if kind == "ext4" else "ext4")]
    mounts += [SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with creation_lock(StoragePaths(tmp_path / "runs")):
        pass
    found = [record.getMessage() for record in caplog.records if "network file system" in record.getMessage()]
    assert len(found) == warns
    assert all(f"({kind})" in message and "set mlflow_uri" in message for message in found)
