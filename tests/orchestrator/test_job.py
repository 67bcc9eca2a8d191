"""The search as a Ray job on two nodes: `ray job submit --working-dir . -- python -m orchestrator.search`."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from orchestrator.paths import RunPaths
from orchestrator.records import read_metrics, read_results
from tests.orchestrator.nodes import Nodes, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEARCH = ("python", "-m", "orchestrator.search")
SHORT = (
    "base.pretraining.epochs=2", "base.gating.epochs=4", "base.finetuning.epochs=1", "scheduler.type=none",
    "search.num_trials=2", "search.max_concurrent=1",
)  # fmt: skip
"""Makes the digits space two trials of five epochs."""
EPOCHS = [1, 2, 3, 4, 5]


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


def runs_in_mlflow(nodes: Nodes, name: str) -> dict[str, Run]:
    """Return the runs of a search by their names; the search itself is named like it."""
    client = MlflowClient(f"sqlite:///{nodes.home / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    named = {run.info.run_name: run for run in runs}
    assert len(named) == len(runs), Counter(run.info.run_name for run in runs)
    return named


def test_a_job_searches_over_two_nodes_into_the_home_folder(nodes: Nodes) -> None:
    job = nodes.submit(*command(nodes, "whole"))
    assert job.stdout is not None
    log, done_when_told = [], {}
    for line in job.stdout:  # as it comes
        log.append(line)
        done_when_told.setdefault("trial_0000" in line, run_of(nodes, "whole").report.exists())
    assert job.wait() == 0, "".join(log)
    assert not done_when_told[True], "the first trial was told of when all was over"

    run = run_of(nodes, "whole")
    rows = {row["trial_id"]: row for row in read_results(run.results)}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(
        ("unpruned", "trial_0000", "trial_0001"), "finished"
    )
    assert [epoch["epoch"] for epoch in read_metrics(run.trial("trial_0001").metrics)] == EPOCHS
    assert f"report: {run.report}\n" in log
    runs = runs_in_mlflow(nodes, "whole")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for row in rows.values():
        (recorded,) = [run for run in runs.values() if run.info.run_id == row["mlflow_run_id"]]
        assert {name: recorded.data.metrics[name] for name in ("top1", "latency_ms", "macs")} == {
            name: row[name] for name in ("top1", "latency_ms", "macs")
        }


@pytest.mark.parametrize("grace_s", [60, None], ids=["with time to save", "killed after three seconds"])
def test_a_stopped_job_is_finished_by_the_next_one(nodes: Nodes, grace_s: int | None) -> None:
    name = f"stopped-{grace_s}"
    run = run_of(nodes, name)
    env_vars = {} if grace_s is None else {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s)}
    job = nodes.submit(*command(nodes, name), job=name, **env_vars)

    def is_in_the_second_trial() -> bool:
        assert job.poll() is None, job.communicate()[0]
        metrics = run.trial("trial_0001").metrics
        return metrics.exists() and len(read_metrics(metrics)) >= 2

    wait_until(is_in_the_second_trial)
    nodes.stop(name)
    told = job.communicate()[0]
    assert nodes.get(f"/api/jobs/{name}")["status"] == "STOPPED"
    assert job.returncode == 1
    if grace_s is not None:
        assert last_line(nodes, name).startswith("search: stopped; what is done is kept"), told
        assert runs_in_mlflow(nodes, name)[name].info.status == "KILLED"
    assert not run.report.exists()
    first = run.trial("trial_0000")
    before = {path: path.read_bytes() for path in (first.log, first.weights, first.metrics)}
    ids = {row["trial_id"]: row["mlflow_run_id"] for row in read_results(run.results)}
    assert set(ids) == {"unpruned", "trial_0000"}

    again = nodes.submit(*command(nodes, name), **env_vars)
    told = again.communicate()[0]
    assert again.returncode == 0, told
    assert {path: path.read_bytes() for path in before} == before
    rows = {row["trial_id"]: row for row in read_results(run.results)}
    assert {trial_id: row["status"] for trial_id, row in rows.items()} == dict.fromkeys(
        ("unpruned", "trial_0000", "trial_0001"), "finished"
    )
    assert ids.items() <= {trial_id: row["mlflow_run_id"] for trial_id, row in rows.items()}.items()
    assert [epoch["epoch"] for epoch in read_metrics(run.trial("trial_0001").metrics)] == EPOCHS
    assert "goes on" in run.trial("trial_0001").log.read_text()
    runs = runs_in_mlflow(nodes, name)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(runs) == len(rows) + 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["base.gating.epoch=2"], "did you mean epochs?"),
        (["base.gating.lr=1e30", "search.num_trials=1"], "expected a finite number; lower base.gating.lr"),
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


def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # the test's own time limit ends it
        time.sleep(0.1)
