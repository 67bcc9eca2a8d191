"""The search as a Ray job on two nodes: `ray job submit --working-dir . -- python -m orchestrator.search`."""

import time
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_metrics, read_results
from tests.orchestrator.nodes import Nodes, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEARCH = ("python", "-m", "orchestrator.search")
SHORT = ("base.pretraining.epochs=2", "base.finetuning.epochs=1", "scheduler.type=none", "search.max_concurrent=1")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with two_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        # one CPU a node and nearly all of it for a worker: the two of a trial sit on different nodes
        (nodes.home / "cluster.yaml").write_text("workers_per_trial: 2\nresources_per_worker: {CPU: 0.9}\n")
        yield nodes


def command(nodes: Nodes, name: str, *settings: str) -> list[str]:
    """Return the command of a short search of digits; its storage is ~/runs."""
    words = [*SEARCH, "digits", "--cluster", str(nodes.home / "cluster.yaml")]
    return [*words, *(word for setting in (f"name={name}", *SHORT, *settings) for word in ("--set", setting))]


def run_of(nodes: Nodes, name: str) -> RunPaths:
    return RunPaths(nodes.home / "runs" / name)


def epochs_of(run: RunPaths, trial_id: str) -> list[int]:
    """Return the epochs that a trial has recorded."""
    metrics = run.trial(trial_id).metrics
    return [row["epoch"] for row in read_metrics(metrics) if not row["final"]] if metrics.exists() else []


def runs_in_mlflow(nodes: Nodes, name: str) -> dict[str, Run]:
    """Return the runs of a search by what they are of; the search's own is "search"."""
    client = MlflowClient(f"sqlite:///{nodes.home / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    named = {"search" if run.info.run_name.startswith(f"{name}-") else run.info.run_name: run for run in runs}
    assert len(named) == len(runs), "a network, or the search, has two runs"
    return named


def check_records(nodes: Nodes, name: str, *trial_ids: str) -> None:
    """Assert that these trials have finished, in the table and in MLflow alike."""
    run = run_of(nodes, name)
    rows = {row["trial_id"]: row for row in read_results(run.results)}
    assert {one: row["status"] for one, row in rows.items()} == dict.fromkeys(("unpruned", *trial_ids), "finished")
    runs = runs_in_mlflow(nodes, name)
    assert {one: recorded.info.status for one, recorded in runs.items()} == dict.fromkeys(("search", *rows), "FINISHED")
    for trial_id, row in rows.items():
        assert runs[trial_id].info.run_id == row["mlflow_run_id"]
        metrics = runs[trial_id].data.metrics
        assert all(metrics[metric] == row[metric] for metric in ("top1", "latency_ms", "macs"))


def test_a_job_searches_over_two_nodes_into_the_home_folder(nodes: Nodes) -> None:
    job = nodes.submit(*command(nodes, "whole", "base.gating.epochs=3", "search.num_trials=1"))
    assert job.stdout is not None
    run, log, was_over_when_told = run_of(nodes, "whole"), [], {}
    for line in job.stdout:  # as it comes
        log.append(line)
        was_over_when_told.setdefault("trial_0000 starts" in line, run.report.exists())
    assert job.wait() == 0, "".join(log)
    assert not was_over_when_told[True], "that the trial starts was told when all was over"
    assert f"report: {run.report}\n" in log
    assert epochs_of(run, "trial_0000") == [1, 2, 3, 4]
    check_records(nodes, "whole", "trial_0000")


@pytest.mark.parametrize("grace_s", [60, None], ids=["with time to save", "killed after three seconds"])
def test_a_stopped_job_is_finished_by_the_next_one(nodes: Nodes, grace_s: int | None) -> None:
    name = f"stopped-{grace_s}"
    run = run_of(nodes, name)
    env_vars = {} if grace_s is None else {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s)}
    words = command(nodes, name, "base.gating.epochs=8", "search.num_trials=2")
    job = nodes.submit(*words, job=name, **env_vars)
    while not epochs_of(run, "trial_0001"):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    nodes.stop(name)
    told = job.communicate()[0]
    assert nodes.get(f"/api/jobs/{name}")["status"] == "STOPPED"
    if grace_s is not None:
        assert last_line(nodes, name).startswith("search: stopped; finished work is saved"), told
        assert runs_in_mlflow(nodes, name)["search"].info.status == "KILLED"
    assert not run.report.exists()
    first = run.trial("trial_0000")
    before = {path: path.read_bytes() for path in (first.log, first.weights, first.metrics)}
    ids = {one: recorded.info.run_id for one, recorded in runs_in_mlflow(nodes, name).items()}

    again = nodes.submit(*words, **env_vars)
    told = again.communicate()[0]
    assert again.returncode == 0, told
    assert {path: path.read_bytes() for path in before} == before, "a finished trial was touched"
    assert "training resumes after" in run.trial("trial_0001").log.read_text()
    assert epochs_of(run, "trial_0001") == list(range(1, 10))
    check_records(nodes, name, "trial_0000", "trial_0001")
    assert {one: recorded.info.run_id for one, recorded in runs_in_mlflow(nodes, name).items()} == ids


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["base.gating.epoch=2"], "did you mean epochs?"),
        (["base.gating.lr=1e30", "search.num_trials=1"], "expected finite numbers; lower gating.lr"),
    ],
    ids=["a mistake", "all trials fail"],
)
def test_a_failing_search_fails_its_job_and_says_why_last(nodes: Nodes, settings: list[str], reason: str) -> None:
    name = f"failing-{len(settings)}"
    job = nodes.submit(*command(nodes, name, *settings), job=name)
    told = job.communicate()[0]
    assert job.returncode == 1, told  # whatever the program's exit code
    assert nodes.get(f"/api/jobs/{name}")["status"] == "FAILED"
    assert last_line(nodes, name).startswith("search: ")
    assert reason in last_line(nodes, name)


def last_line(nodes: Nodes, job: str) -> str:
    log: str = nodes.get(f"/api/jobs/{job}/logs")["logs"]
    return log.splitlines()[-1]
