"""Faults that need no Ray, on the worker's own loop: damaged checkpoints, full disks, storage that goes away, odd clocks."""

import copy
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from orchestrator.cli import run_command
from orchestrator.config.base import CONFIG_VERSION
from orchestrator.config.cluster import ClusterConfig
from orchestrator.datasets import splits as datasets
from orchestrator.errors import (
    ClusterError,
    DamagedCheckpointError,
    DataError,
    LatencyTableError,
    MeasurerError,
    RunDirError,
    StorageError,
    TrialError,
)
from orchestrator.latency.curve import Curve
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage import files as paths
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import NewEpochs, append_result, read_metrics, read_results
from orchestrator.storage.run_dir import check_run_dir, claim
from orchestrator.tracking.tracker import Tracker
from orchestrator.training import loop
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.trial.train_runs import TrainRuns
from orchestrator.trial.worker import run_assignment
from orchestrator.tuning import driver
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.searchers import OptunaSearcher
from tests.faults.disks import fill
from tests.faults.harness import has_traceback, leftovers
from tests.orchestrator import planted
from tests.orchestrator.packed import config, make_tree, packed
from tests.orchestrator.tiny_trial import MemorySession, assign, finish, timeless, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, MemorySession, dict[str, Any]]:
    """Return a trial that nobody disturbed: assignment, session with its checkpoints, final metrics."""
    return finish(tmp_path_factory.mktemp("undisturbed"))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["state.json", "tensors.pt"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut short", "bit flipped", "gone"])
def test_a_damaged_checkpoint_is_known_as_one(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    Checkpoint(stage="gate", epochs_done=1, world_size=1, tensors={"w": torch.ones(100)}).save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(DamagedCheckpointError, match=f"{file} is missing, cut short or changed"):
        Checkpoint.load(tmp_path, CPU)


def test_every_flipped_bit_of_a_state_is_seen(tmp_path: Path) -> None:
    Checkpoint(stage="gate", epochs_done=1, world_size=1, metrics={"top1": 0.5}).save(tmp_path)
    state = tmp_path / "state.json"
    content = state.read_bytes()
    for place in range(len(content)):
        state.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        with pytest.raises(TrialError, match=r"is missing, cut short or changed|of version"):
            Checkpoint.load(tmp_path, CPU)


def test_a_trial_with_a_damaged_checkpoint_ends_as_if_nothing_had_been(undisturbed: Any, tmp_path: Path) -> None:
    assignment, session, metrics = undisturbed
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    damaged = tmp_path / "checkpoint"
    shutil.copytree(session.checkpoints[1], damaged)
    cut(damaged / "tensors.pt")
    again = run_assignment(replace(assignment, folder=folder), MemorySession(tmp_path / "kept", start_from=damaged))
    assert timeless(again) == timeless(metrics)
    assert [timeless(row) for row in read_metrics(folder / "metrics.parquet")] == [
        timeless(row) for row in read_metrics(assignment.folder / "metrics.parquet")
    ]
    assert (
        "training starts from the beginning because the last checkpoint is damaged" in (folder / "log.txt").read_text()
    )


def test_a_half_written_checkpoint_does_not_hold_up_the_search(tmp_path: Path) -> None:
    """Ray Train copies a checkpoint file by file; who is killed in between leaves one that it does not count."""
    folder = tmp_path / "trial_0000" / "checkpoint_1"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"version": 3, "st')
    TrainRuns(tmp_path).check_world_size(2)
    whole = tmp_path / "trial_0001" / "checkpoint_1"
    whole.mkdir(parents=True)
    Checkpoint(stage="gate", epochs_done=1, world_size=2).save(whole)
    TrainRuns(tmp_path).check_world_size(2)
    with pytest.raises(ClusterError, match="trial_0001 is in epoch 1"):  # what follows the damaged one is still read
        TrainRuns(tmp_path).check_world_size(4)


# --- what else a search goes on from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 1}\n', r"begins with b'{\"version\": 1}', expected version 2"),
        (b'{"trial_id": "trial_0000", "epoch": 1}\n', "expected version 2; use the release that wrote it"),
        (b'{"version": 2}\n{"trial_id": "trial_00"epoch": 1}\n', "line 2 is damaged"),
        (b'{"version": 2}\n{"trial_id": "trial_0000", "epoch": 1}\n', "line 2 is damaged"),
        (b'{"version": 2}\n\xff\n', "line 2 is damaged"),
        (b"[1]\n", "line 1 is damaged"),
    ],
    ids=["version", "no version", "no JSON", "no checksum", "no text", "no report"],
)
def test_decisions_that_cannot_be_read_are_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunDirError, match=message):
        list(ReportLog(path).read())


def test_half_a_line_of_decisions_is_cut_off_the_first_one_too(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_text('{"vers')
    decisions = ReportLog(path)
    assert list(decisions.read()) == []
    decisions.append("trial_0000", {"epoch": 1})
    assert list(decisions.read()) == [{"trial_id": "trial_0000", "epoch": 1}]


def test_a_start_that_came_to_nothing_does_not_hold_the_folder(tmp_path: Path) -> None:
    run, first, second = (
        RunPaths(tmp_path / "run"),
        planted.search_config(),
        planted.search_config(baselines=["uniform"]),
    )
    for given in (first, second):  # the first was refused, or killed, right after this
        with claim(run, given):
            assert run.config.read_text() == given.to_json()
    (run.ray / "train" / "trial_0000").mkdir(parents=True)
    run.search_id.touch()
    with claim(run, second):
        assert run.search_id.exists()  # of the same search
    with claim(run, first):
        assert [path.name for path in run.root.iterdir() if not path.name.startswith(".")] == ["search.json"]


@pytest.mark.parametrize(
    "earned",
    [
        "reports.jsonl",
        "results.parquet",
        "trials/trial_0000/metrics.parquet",
        "ray/train/trial_0000/checkpoint_1/state.json",
    ],
)
def test_a_start_that_came_to_anything_holds_the_folder(tmp_path: Path, earned: str) -> None:
    run, config = RunPaths(tmp_path / "run"), planted.search_config()
    with claim(run, config):
        paths.write_atomic(run.root / earned, "something")
    with pytest.raises(RunDirError, match="belongs to a search with another config"):
        check_run_dir(run, planted.search_config(constraints=[]))
    assert (run.root / earned).exists()


def test_a_config_of_another_version_is_refused(tmp_path: Path) -> None:
    run, config = RunPaths(tmp_path / "run"), planted.search_config()
    with claim(run, config):
        saved = run.config.read_text()
    assert json.loads(saved)["version"] == CONFIG_VERSION
    run.config.write_text(saved.replace(f'"version": {CONFIG_VERSION}', '"version": 99'))
    with pytest.raises(RunDirError, match=f"version 99, this program reads version {CONFIG_VERSION}"):
        check_run_dir(run, config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 99, "points": {}}', "version 99, this program reads 1"),
        ('{"1": [[1], [2]]}', "is damaged"),
        ('{"version": 1, "points": {"1": [[1]]}}', "is damaged"),
        ('{"version": 1, "po', "is damaged"),
    ],
    ids=["version", "no version", "points", "cut short"],
)
def test_a_latency_curve_that_cannot_be_read_is_told(text: str, message: str) -> None:
    curve = Curve({1: ((1.0, 2.0), (3.0, 4.0))})
    assert Curve.from_json(curve.to_json()).at(1.5, 1) == 3.5
    with pytest.raises(LatencyTableError, match=message):
        Curve.from_json(text)


def test_a_damaged_journal_of_suggestions_is_told(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    make_searcher(journal).suggest("")
    content = journal.read_bytes()
    journal.write_bytes(content.replace(b'"op_code"', b'"op_co"', 1))
    with pytest.raises(RunDirError, match=r"study\.log is damaged .* restore it from a copy"):
        make_searcher(journal)


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_table_and_leaves_nothing(small_disk: Path) -> None:
    path = small_disk / "results.parquet"
    append_result(path, planted.unpruned())
    filler = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        append_result(path, planted.finished(0, 97.0, 2.0))
    assert [row["trial_id"] for row in read_results(path)] == ["unpruned"]
    assert sorted(file.name for file in small_disk.iterdir()) == ["filler", "results.parquet"]
    filler.unlink()
    append_result(path, planted.finished(0, 97.0, 2.0))
    assert len(read_results(path)) == 2


def test_a_full_disk_loses_no_decision_that_was_written(small_disk: Path) -> None:
    decisions = ReportLog(small_disk / "reports.jsonl")
    told = 0
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        while True:
            decisions.append("trial_0000", {"epoch": told + 1, "top1": 1.0, "architecture": "x" * 1000})
            told += 1
    kept = [report["epoch"] for report in decisions.read()]
    assert kept == list(range(1, told + 1))


def make_searcher(journal: Path) -> OptunaSearcher:
    """Return the searcher of a search with this journal, no trial of which has ended."""
    config = planted.search_config(search={"algorithm": "random", "num_trials": 1000})
    return OptunaSearcher(config, journal, [], lambda trial_id, params, parent: {"trial_id": trial_id, **params})


def test_a_full_disk_loses_no_suggestion_that_was_handed_out(small_disk: Path, tmp_path: Path) -> None:
    expected = make_searcher(tmp_path / "study.log").suggest("")
    journal = small_disk / "study.log"
    first = make_searcher(journal)
    assert first.suggest("") == expected
    filler = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        for _ in range(1000):
            first.suggest("")
    filler.unlink()
    assert make_searcher(journal).suggest("") == expected


def test_a_checkpoint_on_a_full_disk_is_an_error_and_the_last_one_goes_on(
    undisturbed: Any, small_disk: Path, tmp_path: Path
) -> None:
    assignment, session, metrics = undisturbed
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    last = small_disk / "last"
    shutil.copytree(session.checkpoints[0], last)
    filler = fill(small_disk)
    with pytest.raises((OSError, RuntimeError)):  # torch.save raises RuntimeError
        run_assignment(replace(assignment, folder=folder), MemorySession(small_disk / "kept", start_from=last))
    filler.unlink()
    again = run_assignment(replace(assignment, folder=folder), MemorySession(tmp_path / "kept", start_from=last))
    assert timeless(again) == timeless(metrics)


@pytest.mark.slow  # MLflow takes seconds to make its store
@pytest.mark.parametrize("small_disk", ["16m"], indirect=True)
def test_mlflow_on_a_full_disk_holds_nobody_up_and_gets_the_rest_later(small_disk: Path, tmp_path: Path) -> None:
    storage, run, config = StoragePaths(small_disk), RunPaths(tmp_path / "run"), planted.search_config()
    row = planted.finished(0, 97.0, 2.0)
    tracker = Tracker.open(config, run, storage)
    planted.plant(run, config, [planted.unpruned(), row])
    filler = fill(small_disk)
    tracker.trial_started(row["trial_id"], {}, config.base)
    for epoch in planted.epochs(3):
        tracker.epoch(row["trial_id"], epoch)
    tracker.trial_ended(row["trial_id"], row, "finished")
    assert tracker.delivery.num_failed > 0
    filler.unlink()
    tracker.search_ended(lambda: Outcome.load(run))
    client = MlflowClient(tracker.uri)
    (found,) = client.search_runs([tracker.search.experiment_id], "tags.`gator.trial_id` = 'trial_0000'")
    assert (found.info.status, found.data.metrics["top1"]) == ("FINISHED", 97.0)
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 3


def test_a_full_disk_is_told_in_one_message(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(small_disk)

    def body() -> int:
        paths.write_atomic(small_disk / "pareto.json", "{}" * 5000)
        return 0

    assert run_command("search", [], body) == 1
    told = capsys.readouterr().err
    assert "No space left" in told
    assert "rerun the same command to resume" in told


# --- storage that is away ---------------------------------------------------------------------------------------------


def test_a_trial_waits_for_a_storage_that_is_away_and_ends_as_if_it_had_not_been(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment, _, metrics = undisturbed
    monkeypatch.setattr(paths, "POLL_S", 0.05)
    home, away = tmp_path / "trial", tmp_path / "away"
    shutil.copytree(assignment.folder, home)

    class UnmountsOnce(MemorySession):
        """Takes the storage away after the first report, for a while."""

        def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
            super().report(metrics, checkpoint)
            if len(self.reports) == 1:
                home.rename(away)
                threading.Timer(3.0, away.rename, [home]).start()

    again = run_assignment(replace(assignment, folder=home), UnmountsOnce(tmp_path / "kept"))
    assert timeless(again) == timeless(metrics)
    assert not away.exists()


def test_what_the_driver_adds_waits_for_a_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "POLL_S", 0.01)
    home, away = tmp_path / "run", tmp_path / "away"
    home.mkdir()
    (home / "search.json").touch()
    decisions = ReportLog(home / "reports.jsonl", marker=home / "search.json")
    searcher = make_searcher(home / "study.log")
    for add in (lambda: decisions.append("trial_0000", {"epoch": 1}), lambda: searcher.suggest("")):
        home.rename(away)
        back = threading.Timer(0.3, away.rename, [home])
        back.start()
        add()
        back.join()
    assert list(decisions.read()) == [{"trial_id": "trial_0000", "epoch": 1}]
    assert make_searcher(home / "study.log").num_left == searcher.num_left + 1  # the one that was handed out goes on


@pytest.mark.parametrize("name", ["image_folder", "parquet"])
def test_images_wait_for_a_storage_that_is_away(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "POLL_S", 0.01)
    home, away = tmp_path / "data", tmp_path / "away"
    for split in ("train", "val"):
        make_tree((home if name == "image_folder" else tmp_path / "files") / split, per_class=4)
        if name == "parquet":
            packed(tmp_path / "files" / split, home / split)
    train = datasets.load(config(home, name=name), seed=0).train
    home.rename(away)
    back = threading.Timer(0.2, away.rename, [home])
    back.start()
    assert train[0][0].shape == (3, 16, 16)
    back.join()
    for path in [*home.glob("train/shard*"), *home.glob("train/*/*")]:
        path.unlink()
    another_process = copy.deepcopy(train)  # it has what a loader process is sent
    with pytest.raises(DataError, match="cannot be read"):  # at once: the folder is there
        another_process[0]


def test_a_storage_that_stays_away_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "STORAGE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(paths, "POLL_S", 0.01)
    with pytest.raises(StorageError, match=r"was not reachable for 0\.1 s; mount its storage again"):
        wait_until_reachable(tmp_path / "search.json")


# --- clocks, and what else is odd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_ms", [0, -3_600_000], ids=["stands still", "jumps back an hour at each look"])
def test_a_trial_reports_every_epoch_whatever_the_clock_does(
    step_ms: int, undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment, _, metrics = undisturbed
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    (folder / "metrics.parquet").unlink()
    now_ms = [1_700_000_000_000]

    def clock() -> int:
        now_ms[0] += step_ms
        return now_ms[0] * 1_000_000

    monkeypatch.setattr(time, "time_ns", clock)
    heard: list[int] = []
    epochs = NewEpochs(folder / "metrics.parquet")

    class Listens(MemorySession):
        """Reads the new epochs after each report, as the trial's driver does."""

        def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
            super().report(metrics, checkpoint)
            heard.extend(row["epoch"] for row in epochs.read())

    again = run_assignment(replace(assignment, folder=folder), Listens(tmp_path / "kept"))
    assert heard == [1, 2, 3, 4]
    assert timeless(again) == timeless(metrics)


@pytest.mark.slow
def test_data_damaged_in_the_middle_of_an_epoch_are_named_and_once_whole_the_trial_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 1)
    for split in ("train", "val"):
        packed(make_tree(tmp_path / "files" / split, per_class=20), tmp_path / split)
    data = config(tmp_path).model_dump(mode="json")
    trial = tiny(data=data, model__num_classes=3, training__checkpoint_every_s=1e-9)
    shards = sorted((tmp_path / "train").glob("*.parquet"))
    whole = {shard: shard.read_bytes() for shard in shards}
    (tmp_path / "first").mkdir()
    torch.manual_seed(0)  # both start from the same base network
    undisturbed = run_assignment(assign(tmp_path / "first", trial), MemorySession(tmp_path / "kept"))

    class DamagesOnce(MemorySession):
        """Overwrites the images of all shards after the first report, which is made in the middle of an epoch."""

        def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
            super().report(metrics, checkpoint)
            if len(self.reports) == 1:
                assert checkpoint.epochs_done == 0
                for shard, content in whole.items():
                    shard.write_bytes(content.replace(b"\xff\xd8\xff", bytes(3)))

    (tmp_path / "second").mkdir()
    torch.manual_seed(0)
    assignment, session = assign(tmp_path / "second", trial), DamagesOnce(tmp_path / "damaged")
    with pytest.raises(DataError, match=r"groups \[.*\]: cannot be read \(.*CRC"):
        run_assignment(assignment, session)
    for shard, content in whole.items():
        shard.write_bytes(content)
    again = run_assignment(assignment, MemorySession(tmp_path / "again", start_from=session.checkpoints[-1]))
    assert timeless(again) == timeless(undisturbed)


def test_a_table_that_is_damaged_in_the_middle_of_a_trial_is_named(undisturbed: Any, tmp_path: Path) -> None:
    assignment, session, _ = undisturbed
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    cut(folder / "metrics.parquet")
    with pytest.raises(RunDirError, match=r"metrics\.parquet cannot be read"):
        run_assignment(
            replace(assignment, folder=folder), MemorySession(tmp_path / "kept", start_from=session.checkpoints[0])
        )


def test_what_a_search_wrote_stays_whatever_is_left_beside_it(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    append_result(run.results, planted.unpruned())
    (tmp_path / ".tmp.results.parquet.0a1b2c3d").write_bytes(b"half a table")
    paths.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


def test_the_harness_sees_what_a_search_leaves_behind(tmp_path: Path) -> None:
    for name in (
        ".tmp.visible.1",
        "base/0/.tmp.w",
        "base/0/.lock",
        "base/0/ray/.x",
        "run/.lock",
        "run/trials/t/.tmp.m",
    ):
        write_bytes(tmp_path / "ray" / "storage" / name)
    assert leftovers(tmp_path / "ray" / "storage") == [".tmp.visible.1", "base/0/.tmp.w", "run/trials/t/.tmp.m"]
    assert has_traceback("search: starts\nTraceback (most recent call last):\n")
    assert not has_traceback("(RayTrainWorker pid=1) Traceback (most recent call last):\n")


def write_bytes(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_search_ends_without_the_process_that_measures_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_lost(*arguments: Any) -> None:
        raise MeasurerError("the process that runs measure was lost twice")

    monkeypatch.setattr(driver, "remeasure", is_lost)
    storage, said = StoragePaths(tmp_path), list[str]()
    plan = SearchPlan(
        config=planted.search_config(), cluster=ClusterConfig(), storage=storage, run=storage.run("planted")
    )
    recorder: Any = SimpleNamespace(progress=SimpleNamespace(say=said.append))
    driver._remeasure(plan, recorder)
    assert said[-1].startswith("Latencies stay estimates: the process that runs measure was lost")
