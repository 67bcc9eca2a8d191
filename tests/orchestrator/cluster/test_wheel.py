"""The search on a Ray whose environment lacks the project: the wheel travels with the job, as docs/clusters.md says."""

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_results
from tests.orchestrator.nodes import PROJECT, Nodes, one_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHORT = ("base.pretraining.epochs=1", "base.gating.epochs=2", "base.finetuning.epochs=1", "search.num_trials=1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A Ray whose Python has the libraries of this one, but not the project."""
    folder = tmp_path_factory.mktemp("nodes")
    venv.create(folder / "env", symlinks=True)
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    # The libraries alone: Python executes the .pth files of its own folder only, so that of an editable install has no effect.
    (Path(sysconfig.get_path("purelib", vars=paths)) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    ray = folder / "env" / "bin" / "ray"
    ray.write_text(f"#!{ray.with_name('python')}\nfrom ray.scripts.scripts import main\n\nmain()\n")
    ray.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        with one_node(folder, ray) as nodes:
            yield nodes


def submit(nodes: Nodes, folder: Path, environment: dict[str, object], *words: str) -> subprocess.CompletedProcess[str]:
    """Run `ray job submit` to the job's end; the folder is its working directory."""
    options = ["--working-dir", str(folder), "--runtime-env-json", json.dumps(environment)]
    command = [str(nodes.ray), "job", "submit", *options, "--", "python", "-m", "orchestrator.search", *words]
    return subprocess.run(command, cwd=folder, env=nodes.environment, capture_output=True, text=True, check=False)


def test_wheel_in_the_jobs_environment_brings_the_search_and_the_shipped_files(nodes: Nodes, wheel: Path) -> None:
    assert "No module named" in submit(nodes, wheel.parent, {}, "--help").stdout

    settings = [word for setting in SHORT for word in ("--set", setting)]
    installed = {"pip": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/" + wheel.name]}
    done = submit(nodes, wheel.parent, installed, "digits", "--run-dir", str(nodes.home / "runs"), *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_results(RunPaths(nodes.home / "runs" / "digits").results)
    assert {row["trial_id"]: row["status"] for row in rows} == {"unpruned": "finished", "trial_0000": "finished"}


def test_uv_installs_the_wheel_without_its_dependencies(nodes: Nodes, wheel: Path) -> None:
    only = {
        "packages": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/" + wheel.name],
        "uv_pip_install_options": ["--no-deps"],
    }
    done = submit(nodes, wheel.parent, {"uv": only}, "digits", "--dry-run", "--run-dir", str(nodes.home / "planned"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GPU-hours" in done.stdout
