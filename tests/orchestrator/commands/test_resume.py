"""kill -9 of the driver in the middle of a search, then the same command."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_metrics, read_results
from orchestrator.tuning.report_log import ReportLog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROJECT = Path(__file__).resolve().parents[3]
OF_THE_PROCESS = {"mlflow_run_id", "train_s", "eval_s", "measure_s"}


def command(storage: Path, seconds_per_epoch: float, *more: str) -> list[str]:
    return [sys.executable, "-m", "tests.orchestrator.instant_search", str(storage), str(seconds_per_epoch), *more]


def table(run: RunPaths) -> list[dict[str, object]]:
    rows = sorted(read_results(run.results), key=lambda row: str(row["trial_id"]))
    return [{name: value for name, value in row.items() if name not in OF_THE_PROCESS} for row in rows]


def starts(run: RunPaths) -> Counter[str]:
    return Counter((run.root / "starts.txt").read_text().split())


def test_kill_9_between_two_rungs_changes_nothing(tmp_path: Path) -> None:
    undisturbed, killed = RunPaths(tmp_path / "a" / "instant"), RunPaths(tmp_path / "b" / "instant")
    subprocess.run(command(tmp_path / "a", 0.0), cwd=PROJECT, check=True, capture_output=True)
    statuses = {row["status"] for row in read_results(undisturbed.results)}
    assert statuses == {"finished", "stopped"}, "the search shows nothing unless trials are stopped too"

    process = subprocess.Popen(
        command(tmp_path / "b", 1.0), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    running = _wait_for_two_ended_and_one_past_its_first_rung(killed, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ended = {row["trial_id"] for row in read_results(killed.results)} - {"unpruned"}
    assert running not in ended

    subprocess.run(command(tmp_path / "b", 0.0), cwd=PROJECT, check=True, capture_output=True)
    assert table(killed) == table(undisturbed)
    assert {trial_id: count for trial_id, count in starts(killed).items() if count > 1} == {running: 2}
    reports = Counter((report["trial_id"], report["epoch"]) for report in ReportLog(killed.reports).read())
    assert max(reports.values()) == 1, "an epoch was judged twice"


def test_more_trials_and_a_kill_between_equal_a_search_that_had_them_from_the_start(tmp_path: Path) -> None:
    whole, grown = RunPaths(tmp_path / "a" / "instant"), RunPaths(tmp_path / "b" / "instant")
    subprocess.run(command(tmp_path / "a", 0.0, "6", "", "random"), cwd=PROJECT, check=True, capture_output=True)
    subprocess.run(command(tmp_path / "b", 0.0, "3", "", "random"), cwd=PROJECT, check=True, capture_output=True)
    before = table(grown)
    process = subprocess.Popen(
        command(tmp_path / "b", 1.0, "6", "", "random"), cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while not grown.trial("trial_0003").metrics.exists():  # the first added trial has reported an epoch
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert table(grown) == before
    subprocess.run(command(tmp_path / "b", 0.0, "6", "", "random"), cwd=PROJECT, check=True, capture_output=True)
    assert table(grown) == table(whole)
    assert {trial_id: count for trial_id, count in starts(grown).items() if count > 1} == {"trial_0003": 2}


def _wait_for_two_ended_and_one_past_its_first_rung(run: RunPaths, process: subprocess.Popen[bytes]) -> str:
    """Return the id of the trial that runs."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None
        ended = {row["trial_id"] for row in read_results(run.results)} if run.results.exists() else set()
        for trial_id in set(run.trial_ids()) - ended:
            metrics = run.trial(trial_id).metrics
            if len(ended) >= 3 and metrics.exists() and len(read_metrics(metrics)) in (2, 3):
                return trial_id
        time.sleep(0.1)
    raise AssertionError("no trial came that far")
