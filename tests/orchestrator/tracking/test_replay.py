"""A trial again, from MLflow's record alone."""

import logging
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator import search
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import with_values
from orchestrator.errors import ConfigError, TrackingError
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import StoragePaths
from orchestrator.tracking.replay import COMMIT, _check_trust, recorded_trial
from orchestrator.tracking.store import sqlite_uri
from orchestrator.tracking.tracker import Tracker
from tests.orchestrator import planted

CONFIG = planted.search_config()
TRIAL = with_values(CONFIG.base, {"gating.loss_weight": 2.5})


class Record:
    """A store with one search of one trial, whose run directory is gone."""

    def __init__(self, folder: Path) -> None:
        self.storage = StoragePaths(folder)
        run = self.storage.run(CONFIG.name)
        write_atomic(run.config, CONFIG.model_dump_json())
        tracker = Tracker.open(CONFIG, run, self.storage)
        self.run_id = str(tracker.trial_started("trial_0003", {"gating.loss_weight": 2.5}, TRIAL))
        write_atomic(run.trial("trial_0003").config, TRIAL.to_json())
        tracker.trial_ended("trial_0003", planted.finished(3, 97.0, 2.0), "finished")
        self.parent_id = tracker.parent_id
        self.client = MlflowClient(sqlite_uri(self.storage))
        self.cluster = ClusterConfig(storage=str(folder))
        shutil.rmtree(run.root)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record(tmp_path_factory.mktemp("storage"))


def test_trial_becomes_a_search_of_its_own(record: Record) -> None:
    found = recorded_trial(record.run_id, record.cluster)
    assert found.base == TRIAL
    assert (found.params, found.search.num_trials, found.scheduler.type) == ({}, 1, "none")
    assert (found.objectives, found.constraints) == (CONFIG.objectives, CONFIG.constraints)
    assert found.name == f"planted-trial_0003-{record.run_id[:8]}"


def test_a_trial_of_a_storage_in_an_object_store_is_found_on_its_head(
    record: Record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # another search may have left its runs in this user's ~/.cache
    cluster = ClusterConfig(storage="s3://bucket/runs", local=record.cluster.storage)
    assert recorded_trial(record.run_id, cluster).base == TRIAL
    with pytest.raises(
        TrackingError, match=r"there is no .*/gator/s3/bucket/runs/mlflow\.db; .* on the machine where it ran"
    ):
        recorded_trial(record.run_id, ClusterConfig(storage="s3://bucket/runs"))


def test_other_commit_is_told(record: Record, caplog: pytest.LogCaptureFixture) -> None:
    record.client.set_tag(record.run_id, COMMIT, "0123abc")
    with caplog.at_level(logging.WARNING, "orchestrator"):
        recorded_trial(record.run_id, record.cluster)
    assert "made by commit 0123abc" in caplog.text


@pytest.mark.parametrize(
    ("name", "trusted", "is_refused"),
    [
        ("timm:create_model", (), False),
        ("torchvision.models:resnet18", (), False),
        ("torchvision.datasets.utils:download_url", (), True),
        ("timmy:net", (), True),
        ("package.networks:net", (), True),
        ("package.networks:net", ("package",), False),
        ("package.networks:net", ("package.other",), True),
    ],
)
def test_a_record_names_code_that_is_trusted(name: str, trusted: tuple[str, ...], is_refused: bool) -> None:
    if not is_refused:
        _check_trust(name, "5f0c", trusted)
        return
    with pytest.raises(
        ConfigError, match=rf"its model is {name}, .* add --trust {name.partition('.')[0].partition(':')[0]}"
    ):
        _check_trust(name, "5f0c", trusted)


def test_run_of_a_whole_search_is_refused(record: Record) -> None:
    with pytest.raises(ConfigError, match="found a run of kind search, expected one trial"):
        recorded_trial(record.parent_id, record.cluster)


def test_unknown_run_is_told(record: Record) -> None:
    with pytest.raises(TrackingError, match=r"--from-run 5f0c: cannot read .*sqlite:.*Run with id=5f0c not found"):
        recorded_trial("5f0c", record.cluster)


def test_storage_without_a_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"there is no .*mlflow\.db; give the --cluster and --run-dir"):
        recorded_trial("5f0c", ClusterConfig(storage=str(tmp_path)))


def test_a_trial_of_an_untrusted_module_is_refused_before_it_is_imported(
    record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_values(TRIAL, {"model.name": "antigravity_net:net"})
    monkeypatch.setattr(
        "orchestrator.tracking.replay._artifact",
        lambda client, run_id, name: other.to_json() if name == "config.json" else CONFIG.model_dump_json(),
    )
    arguments = ["--from-run", record.run_id, "--run-dir", str(record.storage.root), "--dry-run"]
    assert search.main(arguments) == 2
    assert "add --trust antigravity_net" in capsys.readouterr().err
    assert (
        search.main([*arguments, "--trust", "antigravity_net"]) == 2
    )  # the plan imports it now, and there is no such module
    assert "'antigravity_net:net' cannot be imported" in capsys.readouterr().err


def test_verb_plans_the_trial(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--from-run", record.run_id, "--run-dir", str(record.storage.root), "--dry-run"]
    assert search.main(arguments) == 0
    assert "no parameter is searched" in capsys.readouterr().out
    assert search.main([*arguments, "--set", "search.num_trials=3"]) == 2
    assert "repeats a trial as it was" in capsys.readouterr().err
