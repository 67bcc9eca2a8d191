"""Every block of the README is run, by a test or, its `make` lines, by .ci/run; other pages' commands are accepted.

A command is run as it stands, in a folder in which it finds what it names. What the page can only stand for (a bucket, an id)
and what would take long is written differently: CHEAP and DEAR say how.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mlflow import MlflowClient
from PIL import Image

import gator
from gator.pruning.baselines import baseline
from orchestrator.datasets import fashion_mnist
from orchestrator.models import cifar_resnet as models_cifar_resnet
from orchestrator.models import networks as models_networks
from orchestrator.planning.space import load_space
from orchestrator.reporting.page import write_report
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_results
from tests.orchestrator import nodes, planted
from tests.orchestrator.cluster import test_job
from tests.orchestrator.servers import skip_or_fail

PROJECT = Path(__file__).resolve().parent.parent
README, ACCEPTED_PAGES = "README.md", ("docs/tutorial.md", "docs/reproduce.md", "docs/training.md", "docs/data.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"python -m orchestrator\.(\w+)(.*)")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
OUTPUT = "text"
"""The language of a block that shows what is printed."""

CHEAP: dict[str, dict[str, str]] = {
    "git clone REPOSITORY gator && cd gator": {"REPOSITORY": str(PROJECT)},
    ". .venv/bin/activate": {".venv": sys.prefix},
    "python -m orchestrator.search --dry-run": {},
    "python -m orchestrator.report runs/digits --best-under latency_ms=5": {},
    "python -m orchestrator.describe resnet50": {"resnet50": "resnet18"},
}
"""Line -> what stands for what in it; run where a search of digits has ended."""
SMALL = (
    "base.data.num_train=1000", "base.pretraining.epochs=1", "base.gating.epochs=1", "base.finetuning.epochs=1",
    "base.data.global_batch_size=128",
)  # fmt: skip
DEAR: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "python -m orchestrator.search fashion_mnist --set search.num_trials=32": ({"=32": "=1"}, SMALL),
    "python -m orchestrator.train fashion_mnist": ({}, SMALL),
    "python -m orchestrator.search --from-run RUN_ID": ({}, ()),
    "python -m orchestrator.export runs/digits --trial trial_0003 --format onnx": ({"trial_0003": "trial_0000"}, ()),
    "python -m orchestrator.data pack /data/imagenet/train s3://bucket/train": (
        {"/data/imagenet/train": "images", "s3://bucket/train": "shards"},
        (),
    ),
    "python -m orchestrator.measure --model resnet50 --batch 1,32": ({"resnet50": "resnet8_cifar"}, ()),
}
"""Line -> what stands for what in it, and what is set besides; run in the slow test, after a search of digits."""
AS_A_JOB = "ray job submit --working-dir . -- python -m orchestrator.search"
"""What tests/orchestrator/cluster/test_job.py runs, with a space and settings behind it."""
PYTHON = ("models.load_trial(", "timm.create_model(")
"""What the blocks of Python are known by."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of every block."""
    return BLOCK.findall((PROJECT / page).read_text(encoding="utf-8"))


def lines_of(page: str) -> list[str]:
    """Return the lines of the blocks that are neither Python nor output, without comments."""
    lines = (
        line.partition(" #")[0].strip() for language, text in blocks(page) if not language for line in text.splitlines()
    )
    return [line for line in lines if line]


def python_of(page: str, known_by: str) -> str:
    (text,) = [text for language, text in blocks(page) if language == "python" and known_by in text]
    return text


def test_no_block_is_left_out() -> None:
    in_ci = (PROJECT / ".ci" / "run").read_text().splitlines()
    for line in lines_of(README):
        is_run = line in {*CHEAP, *DEAR, *in_ci} or line in (
            AS_A_JOB,
            "make setup",
        )  # every other target does the latter
        assert is_run, f"nothing runs {line!r}; add it to CHEAP or DEAR, or a make line to .ci/run"
    for language, text in blocks(README):
        assert language in ("", OUTPUT, "python"), f"no test runs blocks of {language}"
        assert language != "python" or any(known_by in text for known_by in PYTHON), f"nothing runs\n{text}"
    assert " ".join((*nodes.SUBMISSION, "--", *test_job.SEARCH)) == AS_A_JOB


@pytest.mark.parametrize("page", ACCEPTED_PAGES)
def test_every_command_names_a_verb_with_arguments_that_it_takes(page: str) -> None:
    lines = [line for line in lines_of(page) if re.match(r"(\S*python -m|make)\b", line)]
    assert lines
    for line in lines:
        if line.startswith("make"):
            assert shlex.split(line)[1] in MAKE_TARGETS, line
        elif command := COMMAND.search(line):
            importlib.import_module(f"orchestrator.{command[1]}")._parser().parse_args(shlex.split(command[2]))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with runs/digits, whose best network is that of trial_0003, and runs/imagenet_resnet50."""
    folder = tmp_path_factory.mktemp("workplace")
    rows = [
        planted.unpruned(),
        *(planted.finished(number, 97.0 - abs(number - 3), 1 - number / 10) for number in range(6)),
    ]
    for name, space in {"digits": "digits", "imagenet_resnet50": "paper/resnet50_macs"}.items():
        run, config = RunPaths(folder / "runs" / name), load_space(space, [])
        planted.plant(run, config, rows)
        write_report(run)
        write_atomic(run.recorded, "how to open it\n")
    _save_network(RunPaths(folder / "runs" / "digits"), "trial_0003")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def _save_network(run: RunPaths, trial_id: str) -> None:
    """Give a trial of digits the network that it would have: one of uniform widths."""
    base = load_space("digits", []).base
    network = models_networks.build(base.model)
    graph = gator.trace(network, torch.zeros(2, 3, base.data.image_size, base.data.image_size))
    architecture = baseline("uniform", network, gator.MacsCost(graph), 0.4)
    gator.save_pruned(gator.prune(network, graph, architecture), architecture, run.trial(trial_id).root)


@pytest.mark.parametrize("line", [line for line in lines_of(README) if line in CHEAP])
def test_cheap_command(line: str, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for word, stand_in in CHEAP[line].items():
        line = line.replace(word, stand_in)
    if command := COMMAND.search(line):
        main = importlib.import_module(f"orchestrator.{command[1]}").main
        assert main(shlex.split(command[2])) == 0
        assert capfd.readouterr().out
    else:
        subprocess.run(line, shell=True, check=True)


def test_the_five_lines_of_python_load_the_best_network(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = python_of(README, PYTHON[0])
    assert len(text.splitlines()) <= 5
    exec(compile(text, README, "exec"), {})
    assert capfd.readouterr().out == "trial_0003 torch.Size([1, 10])\n"


def test_the_loop_prunes_a_model_of_timm_to_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained: models_cifar_resnet.CifarResNet(10, 1, 8).train()
    )
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))) for _ in range(20)]
    names: dict[str, Any] = {"epochs": 2, "loader": loader}
    exec(compile(python_of(README, PYTHON[1]), README, "exec"), names)
    graph, small = names["graph"], names["small"]
    assert gator.MacsCost(graph)(names["gated"].architecture()) == pytest.approx(0.5 * names["cost"].full, rel=0.05)
    assert small(loader[0][0]).shape == (4, 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dear_commands(tmp_path: Path) -> None:
    """One after the other in one folder, as a reader types them; the search of digits comes first, as `make search` does."""
    if not fashion_mnist.FOLDER.is_dir():
        skip_or_fail("needs Fashion-MNIST (apt-get install dataset-fashion-mnist)")
    _run_there(tmp_path, "python -m orchestrator.search", (*SMALL, "search.num_trials=1"))
    for index in range(4):
        path = tmp_path / "images" / f"class_{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    rows = {row["trial_id"]: row for row in read_results(tmp_path / "runs" / "digits" / "results.parquet")}
    run_id = rows["trial_0000"]["mlflow_run_id"]
    for line, (stand_ins, settings) in DEAR.items():
        command = line.replace("RUN_ID", run_id)
        for word, stand_in in stand_ins.items():
            command = command.replace(word, stand_in)
        _run_there(tmp_path, command, settings)

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    filters = [line for line in lines_of("docs/mlflow.md") if line.startswith("tags.")]
    found = [{run.info.run_id for run in client.search_runs([experiment.experiment_id], text)} for text in filters]
    fast = {run_id} if rows["trial_0000"]["latency_ms"] <= 2.5 else set()
    on_front = {run_id} if json.loads((tmp_path / "runs/digits/pareto.json").read_text())["front"] else set()
    assert found == [fast, on_front, set()]


def _run_there(folder: Path, command: str, settings: Sequence[str]) -> None:
    words = shlex.split(command) + [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout
