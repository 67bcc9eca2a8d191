"""The command train: what it does around the workers, which test_worker.py tests; and once as users run it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from orchestrator import train as train_train
from orchestrator.cluster import capacity as cluster_capacity
from orchestrator.cluster import connection as cluster_connection
from orchestrator.cluster import interrupts as train_interrupts
from orchestrator.cluster.interrupts import Interrupted
from orchestrator.config.domains import CategoricalDomain, FloatDomain, IntDomain
from orchestrator.errors import ConfigError, DataError, TrialError
from orchestrator.planning.space import load_space, one_trial
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import BasePaths, TrainPaths, TrialPaths
from orchestrator.storage.records import NewEpochs, read_metrics, write_metrics
from orchestrator.trial import train_run as trial
from orchestrator.trial.assignment import Assignment
from tests.orchestrator.commands.test_search import PROJECT, SPACE
from tests.orchestrator.trial.test_worker import timeless

real_fit = train_train._fit
FINAL = {"top1": 96.5, "top5": 100.0, "macs_ratio": 0.5, "macs": 1000, "params": 10, "latency_ms": 0.25, "final": True}


@pytest.fixture
def space(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPACE)
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> TrainPaths:
    return TrainPaths(tmp_path / "store" / "tiny-train")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[train_train.TrainPlan]:
    """Trainings leave one epoch behind and return FINAL; yields the plans they were called with."""
    plans: list[train_train.TrainPlan] = []

    def fit(plan: train_train.TrainPlan, stop_files: list[Path]) -> dict[str, Any]:
        plans.append(plan)
        epoch = {"epoch": 1, "stage": "gate", "timestamp_ms": 1, "loss": 2.0, "top1": 50.0, "final": False}
        write_metrics(plan.run.metrics, [epoch])
        return FINAL

    monkeypatch.setattr(cluster_connection, "connect", lambda cluster: None)
    monkeypatch.setattr(cluster_connection, "check_nodes_share", lambda folder, advice: None)
    monkeypatch.setattr(cluster_capacity, "capacity", lambda cluster: 1)
    monkeypatch.setattr(train_interrupts.Interrupts, "install", lambda self: None)
    monkeypatch.setattr(train_train, "_fit", fit)
    return plans


def call(space: str, run: TrainPaths, *more: str) -> int:
    return train_train.main([space, "--run-dir", str(run.root.parent), *more])


@pytest.mark.parametrize(
    ("domain", "middle"),
    [
        (FloatDomain(type="float", low=1.0, high=3.0), 2.0),
        (FloatDomain(type="float", low=1.0, high=16.0, log=True), 4.0),
        (FloatDomain(type="float", low=0.0, high=1.0, step=0.4), 0.4),
        (IntDomain(type="int", low=2, high=8), 5),
        (IntDomain(type="int", low=1, high=10, step=4), 5),
        (CategoricalDomain(type="categorical", choices=("cosine", "constant")), "cosine"),
    ],
    ids=["float", "log", "float step", "int", "int step", "categorical"],
)
def test_middle_of_a_domain(domain: Any, middle: object) -> None:
    assert domain.middle() == middle
    assert type(domain.middle()) is type(middle)


def test_searched_parameter_is_what_base_states_then_a_point_then_the_middle(space: str) -> None:
    assert one_trial(load_space(space)).gating.target_ratio == 0.5
    with_point = load_space(space, ["search.points_to_evaluate=[{gating.target_ratio: 0.4}]"])
    assert one_trial(with_point).gating.target_ratio == 0.4
    stated = load_space(
        space, ["search.points_to_evaluate=[{gating.target_ratio: 0.4}]", "base.gating.target_ratio=0.2"]
    )
    assert one_trial(stated).gating.target_ratio == 0.2


def test_values_that_do_not_fit_together_are_refused(space: str) -> None:
    both = load_space(space, ["params={gating.target_ratio: {type: float, low: 0.3, high: 0.5}}"])
    base = both.base.model_copy(update={"gating": both.base.gating.model_copy(update={"target_ms": 1.0})})
    with pytest.raises(ConfigError, match=r"target_ratio 0.4 and target_ms 1 are both set"):
        one_trial(both.model_copy(update={"base": base}))


def test_training_tells_its_epochs_and_its_result(
    space: str, run: TrainPaths, without_ray: list[train_train.TrainPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(space, run) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == ["epoch 1/3 gate loss 2 top1 50.00"]
    assert told.out.splitlines() == [
        "tiny-train: top1 96.50 top5 100.00 latency_ms 0.250 macs 1,000 macs_ratio 0.500 params 10",
        f"run: {run.root}",
    ]
    assert [(plan.run, plan.storage.root) for plan in without_ray] == [(run, run.root.parent)]


def test_training_that_is_done_is_not_run_again(
    space: str, run: TrainPaths, without_ray: list[train_train.TrainPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(space, run) == 0
    first = capsys.readouterr().out
    assert train_train.main([space, "--run-dir", str(run.root), "--resume"]) == 0  # the run directory itself will do
    assert capsys.readouterr().out == first
    assert len(without_ray) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "base.gating.lr=0.2"], "belongs to a training with another config (gating.lr: 0.1 there, 0.2 here)"),
        (["--set", "base.gating.epoch=1"], "did you mean epochs?"),
        (["--set", "name=other", "--resume"], "holds no training that could be resumed"),
    ],
    ids=["another config", "unknown key", "nothing to resume"],
)
def test_mistakes_are_told_in_a_message(
    more: list[str],
    message: str,
    space: str,
    run: TrainPaths,
    without_ray: list[train_train.TrainPlan],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(space, run) == 0
    assert call(space, run, *more) == 2
    assert message in capsys.readouterr().err
    assert len(without_ray) == 1


def test_a_training_that_its_workers_refused_can_be_corrected(
    space: str, run: TrainPaths, without_ray: list[train_train.TrainPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(plan: train_train.TrainPlan, stop_files: list[Path]) -> dict[str, Any]:
        (plan.run.ray / plan.name).mkdir(parents=True)
        plan.run.log.write_text("what worker 0 has to say")
        raise DataError("no such class")

    with monkeypatch.context() as patch:
        patch.setattr(train_train, "_fit", refuse)
        assert call(space, run, "--set", "base.gating.lr=0.2") == 2
    assert call(space, run) == 0
    assert json.loads(run.config.read_text())["gating"]["lr"] == 0.1
    assert not run.log.exists()  # of another training


def test_a_folder_of_something_else_is_refused(space: str, run: TrainPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run.root.mkdir(parents=True)
    (run.root / "thesis.tex").touch()
    assert call(space, run) == 2
    message = capsys.readouterr().err
    assert "it holds thesis.tex, but no config.json" in message
    assert "or the training another name" in message


def test_directory_in_use_is_refused(space: str, run: TrainPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run.root.mkdir(parents=True)
    with open(run.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(space, run) == 2
    assert f"another process is using {run.root}" in capsys.readouterr().err


def test_dry_run_tells_the_plan_and_writes_nothing(
    space: str, run: TrainPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(space, run, "--dry-run") == 0
    plan = yaml.safe_load(capsys.readouterr().out.split("cluster    ")[0].replace("config     ", "           "))
    assert plan["gating"]["target_ratio"] == 0.5
    assert not run.root.parent.exists()


@pytest.mark.parametrize(
    ("error", "exit_code"), [(TrialError("no room"), 1), (Interrupted(signal.SIGTERM), 143)], ids=["failed", "stopped"]
)
def test_exit_code_says_how_it_ended_and_nothing_is_taken_for_a_result(
    error: BaseException,
    exit_code: int,
    space: str,
    run: TrainPaths,
    without_ray: list[train_train.TrainPlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(plan: train_train.TrainPlan, stop_files: list[Path]) -> dict[str, Any]:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train_train, "_fit", fail)
        assert call(space, run) == exit_code
    assert call(space, run) == 0
    assert len(without_ray) == 1


@pytest.mark.parametrize("at_work", ["base", "run"])
def test_what_trains_when_the_signal_comes_is_asked_to_save(
    at_work: str, space: str, run: TrainPaths, without_ray: list[train_train.TrainPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Path] = []

    def fit_both(assignment: Assignment, cluster: Any, train_folder: Path) -> dict[str, Any]:
        """Is interrupted in the base network's training, or the one after it; ends when its stop file is there."""
        stop = TrialPaths(assignment.folder).stop
        assert not stop.exists()  # the one of last time is gone
        if (assignment.base_weights is None) == (at_work == "base"):
            signalled.set()
            while not stop.exists():
                time.sleep(0.005)
            stopped.append(stop)
            raise TrialError("stopped as asked, and saved")
        write_atomic(BasePaths(assignment.folder).weights, b"")
        return {}

    def follow(*arguments: Any) -> None:
        assert signalled.wait(10)
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(trial, "fit", fit_both)
    monkeypatch.setattr(train_train, "_fit", real_fit)
    monkeypatch.setattr(NewEpochs, "until", follow)
    for _ in range(2):  # the second time the base network's stop file lies there
        signalled = threading.Event()
        assert call(space, run) == 143
    folders = {"run": run.root, "base": stopped[0].parent}
    assert stopped == [folders[at_work] / ".stop"] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_that_was_stopped_goes_on_to_the_same_end(space: str, tmp_path: Path) -> None:
    overrides = ["--set", "base.gating.epochs=40", "--set", "base.gating.target_ratio=0.5"]

    def command(storage: str) -> list[str]:
        return [sys.executable, "-m", "orchestrator.train", space, "--run-dir", str(tmp_path / storage), *overrides]

    stopped = TrainPaths(tmp_path / "stopped" / "tiny-train")
    with subprocess.Popen(command("stopped"), cwd=PROJECT, stderr=subprocess.DEVNULL) as first:
        while not (stopped.metrics.exists() and len(read_metrics(stopped.metrics)) >= 3):
            assert first.poll() is None
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGTERM)
        assert first.wait(60) == 143
    for storage in ("stopped", "whole"):
        result = subprocess.run(command(storage), cwd=PROJECT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert "training resumes after" in stopped.log.read_text()
    whole = TrainPaths(tmp_path / "whole" / "tiny-train")
    rows = [[timeless(row) for row in read_metrics(paths.metrics)] for paths in (stopped, whole)]
    assert rows[0] == rows[1]
    assert stopped.weights.read_bytes() == whole.weights.read_bytes()


def tiny_swin(num_classes: int) -> nn.Module:
    """Return torchvision's Swin on 16 px, whose attention is written with matmul."""
    return SwinTransformer([2, 2], 8, [2, 2], [2, 4], [2, 2], num_classes=num_classes)


def tiny_vit(num_classes: int) -> nn.Module:
    """Return torchvision's vision transformer on 16 px."""
    return VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=num_classes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("network", ["tiny_swin", "tiny_vit"])
def test_transformers_are_trained_to_the_end(space: str, tmp_path: Path, network: str) -> None:
    model = f"base.model={{name: '{__name__}:{network}', num_classes: 4}}"
    command = [sys.executable, "-m", "orchestrator.train", space, "--run-dir", str(tmp_path)]
    command += ["--set", model, "--set", "base.gating.target_ratio=0.6"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(TrainPaths(tmp_path / "tiny-train").metrics)
    assert [(row["epoch"], row["final"]) for row in rows] == [(1, False), (2, False), (3, False), (3, True)]
    assert rows[-1]["macs_ratio"] == pytest.approx(0.6, rel=0.02)
