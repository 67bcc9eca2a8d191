"""What the command does before Ray starts, and for a search that is done. The search itself: test_driver.py."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from orchestrator import search
from orchestrator.__main__ import main as orchestrator_main
from orchestrator.config.search import SearchConfig
from orchestrator.reporting.page import write_report
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import append_result
from orchestrator.storage.run_dir import claim

SPACE = {
    "name": "tiny",
    "base": {
        "model": {"name": "resnet8_cifar", "num_classes": 4, "kwargs": {"width": 4}},
        "data": {"name": "synthetic", "image_size": 8, "global_batch_size": 8},
        "pretraining": {"epochs": 1, "lr": 0.1},
        "gating": {"epochs": 2, "lr": 0.1, "loss_weight": 1.0},
        "finetuning": {"epochs": 1, "lr": 0.1},
        "profile": {"clock": "model"},
    },
    "params": {"gating.loss_weight": {"type": "float", "low": 0.1, "high": 4.0, "log": True}},
    "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
    "search": {"algorithm": "random", "num_trials": 2, "seed": 0},
    "scheduler": {"type": "none"},
}


@pytest.fixture
def space(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SPACE, sort_keys=False))
    return str(path)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def run(storage: Path) -> RunPaths:
    return StoragePaths(storage).run("tiny")


def call(space: str, storage: Path, *more: str) -> int:
    return search.main([space, "--run-dir", str(storage), *more])


def plant(run: RunPaths, status: str = "finished") -> None:
    """Write a run directory whose two trials have ended."""
    write_atomic(run.config, SearchConfig.model_validate(SPACE).to_json())
    numbers = {"top1": 90.0, "latency_ms": 1.0, "macs_ratio": 0.4, "params": 100, "macs": 1000}
    append_result(run.results, {"trial_id": "unpruned", "kind": "unpruned", "status": "finished", **numbers})
    for number in range(2):
        append_result(
            run.results,
            {
                "trial_id": f"trial_{number:04d}",
                "kind": "trial",
                "status": status,
                "gating.loss_weight": 1.0,
                **(numbers if status == "finished" else {}),
            },
        )
    write_report(run)
    write_atomic(run.recorded, "http://127.0.0.1:5000/#/the-view\n")


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test if the driver is imported."""
    monkeypatch.setitem(sys.modules, "orchestrator.tuning.driver", None)
    return


def test_help_and_config_errors_need_no_heavy_import():
    code = (
        "import sys, orchestrator.search as search; code = search.main(['--set', 'search.num_trails=3']);"
        "assert code == 2, code;"
        "heavy = {'torch', 'mlflow', 'ray.tune', 'ray.train', 'optuna'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "num_trials" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--set", "search.num_trails=3"], "num_trials"),
        (["--set", "base.gating.epoch=2"], "base.gating.epoch is not a field of GatingConfig; did you mean epochs?"),
        (["--set", "base.gating.epochs=0"], "base.gating.epochs"),
        (["--set", "params.gating.loss_weight.high=inf"], "loss_weight"),
        (["--set", "base.model.name=resnet5"], "did you mean resnet50?"),
        (["--set", "base.data.name=digit"], "expected a data set; did you mean digits?"),
        (["--cluster", "lokal"], "local"),
        (["--resume"], "--resume"),
        (["--run-dir", "ftp://bucket/runs"], "unknown kind of address"),
        (["--set", "params={}"], "all 2 trials would be the same"),
        (["--set", "search.max_gpu_hours=1", "--dry-run"], "a trial has no GPU on this cluster"),
        (["--set", "scheduler.num_brackets=3", "--set", "scheduler.type=pareto_asha"], "only 0 rungs"),
        (["--set", "constraints=[{metric: macs_ratio, max: -1}]"], "which no network is"),
        (["--set", "constraints=[{metric: top1, min: 101}]"], "which no network is"),
        (["--set", "constraints=[{metric: macs, max: 3}, {metric: macs, min: 5}]"], "at least 5 and at most 3"),
    ],
    ids=[
        "unknown-key",
        "typo",
        "out-of-range",
        "range-without-end",
        "unknown-model",
        "unknown-data",
        "unknown-cluster",
        "nothing-to-resume",
        "uri",
        "no-parameter",
        "no-gpu",
        "brackets-without-rungs",
        "ratio-below-0",
        "top1-above-100",
        "constraints-apart",
    ],
)
def test_the_users_mistake_is_one_message_and_exit_2(
    space: str, storage: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
):
    assert call(space, storage, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert hint in printed.err
    assert "Traceback" not in printed.err
    assert not storage.exists()


def test_an_unknown_space_is_named(capsys: pytest.CaptureFixture[str]):
    assert search.main(["digitz"]) == 2
    assert "did you mean digits" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    space: str, storage: Path, capsys: pytest.CaptureFixture[str], no_driver: None
):
    before = files_under(storage.parent)
    assert call(space, storage, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "num_trials: 2" in printed
    assert "2 gating + 1 fine-tuning" in printed
    assert "6 epochs in" in printed
    assert files_under(storage.parent) == before


def test_a_finished_search_prints_its_table_and_ends_with_0(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str], no_driver: None
):
    plant(run)
    assert call(space, storage) == 0
    printed = capsys.readouterr().out
    assert "trial_0001" in printed
    assert "on the Pareto front" in printed
    assert str(run.report) in printed


def test_a_search_of_failures_ends_with_1(space: str, storage: Path, run: RunPaths, no_driver: None):
    plant(run, status="failed")
    assert call(space, storage) == 1


def test_a_run_directory_may_be_given_itself(space: str, storage: Path, run: RunPaths, no_driver: None):
    plant(run)
    assert call(space, run.root) == 0
    moved = run.root.rename(run.root.with_name("renamed"))
    assert call(space, moved, "--resume") == 0


def test_another_config_is_refused_with_the_keys_that_differ(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
):
    plant(run)
    before = files_under(run.root)
    assert call(space, storage, "--set", "search.seed=3", "--set", "base.gating.lr=0.2") == 2
    printed = capsys.readouterr().err
    assert "base.gating.lr: 0.1 there, 0.2 here" in printed
    assert "search.seed: 0 there, 3 here" in printed
    assert files_under(run.root) == before


def test_a_dry_run_of_another_config_is_refused_too(space: str, storage: Path, run: RunPaths):
    plant(run)
    assert call(space, storage, "--dry-run", "--set", "search.seed=3") == 2


def test_a_dry_run_with_more_trials_says_how_many_are_left_and_writes_nothing(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
):
    plant(run)
    before = files_under(run.root)
    assert call(space, storage, "--dry-run", "--set", "search.num_trials=5") == 0
    assert "(2 trials have ended; 3 more)" in capsys.readouterr().out
    assert files_under(run.root) == before


def test_fewer_trials_than_have_started_are_refused(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
):
    plant(run)
    assert call(space, storage, "--set", "search.num_trials=1") == 2
    assert "num_trials is 1, but trial_0001 in" in capsys.readouterr().err


def test_a_folder_with_other_files_is_left_alone(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
):
    write_atomic(run.root / "thesis.tex", "precious")
    assert call(space, storage) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert list(files_under(run.root)) == [str(run.root / "thesis.tex")]


def test_a_damaged_config_is_refused(space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]):
    write_atomic(run.config, '{"name": "tiny"')
    assert call(space, storage) == 2
    assert "search.json" in capsys.readouterr().err


def test_a_second_process_is_refused_as_long_as_the_first_lives(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str], no_driver: None
):
    plant(run)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; file = open({str(run.lock)!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
            "print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        assert call(space, storage) == 2
        assert "another process is using" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert call(space, storage) == 0


def test_the_config_is_saved_before_anything_else(run: RunPaths):
    config = SearchConfig.model_validate(SPACE)
    with claim(run, config):
        assert SearchConfig.model_validate_json(run.config.read_text()) == config
        assert json.loads(run.config.read_text())["search"]["num_trials"] == 2
        with open(run.lock) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]):
    assert orchestrator_main([]) == 0
    assert "search" in capsys.readouterr().out
    assert orchestrator_main(["serach"]) == 2
    assert "did you mean search" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    assert orchestrator_main(["--version"]) == 0
    assert capsys.readouterr().out == f"gator-search {version('gator-search')}\n"


def test_finished_search_that_mlflow_lacks_is_sent_by_the_same_command(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run)
    run.recorded.unlink()  # as after a kill between the report and the end, or with the server away
    results = run.results.read_bytes()
    assert call(space, storage) == 0
    assert "viewStateShareKey" in capsys.readouterr().out
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    found = client.search_runs(["1"], "tags.`gator.search_id` LIKE 'tiny-%'")
    assert {one.info.status for one in found} == {"FINISHED"}
    assert len(found) == 4  # the search, the unpruned network, two trials
    assert run.results.read_bytes() == results  # nothing was trained or measured again


def test_finished_search_is_shown_while_mlflow_is_away(
    space: str, storage: Path, run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run)
    run.recorded.unlink()
    (storage / "mlflow.db").write_text("no database " * 100)
    assert call(space, storage) == 0
    told = capsys.readouterr()
    assert "trial_0001" in told.out
    assert "MLflow still lacks a part of this search" in told.err
