"""The wheel: installed where there is no checkout; and sent with a job to a Ray that lacks the project, as docs/clusters.md says."""

import json
import os
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
from tests.test_commands import PYTHON, README, python_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHORT = ("base.pretraining.epochs=1", "base.gating.epochs=2", "base.finetuning.epochs=1", "search.num_trials=1")
TINY = ("base.data.num_train=256", "constraints=[]")
"""What makes a search of digits shorter still, and whose one trial is on the front."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.iterdir()
    return wheel


def make_environment(folder: Path) -> Path:
    """Return the Python of an environment without any package."""
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def add_libraries(environment: Path) -> None:
    """Add the libraries of this Python, but not the project: an editable install is a .pth file, which counts in its own folder only."""
    paths = {"base": str(environment), "platbase": str(environment)}
    (Path(sysconfig.get_path("purelib", vars=paths)) / "libraries.pth").write_text(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A Ray whose Python has the libraries of this one, but not the project."""
    folder = tmp_path_factory.mktemp("nodes")
    make_environment(folder / "env")
    add_libraries(folder / "env")
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


def test_wheel_installed_without_a_checkout_does_what_the_readme_says(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    add_libraries(tmp_path / "env")
    empty = tmp_path / "empty"
    empty.mkdir()
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*words: str) -> str:
        """Run a program of the environment in the empty folder; return what it prints."""
        command = [str(python.with_name(words[0])), *words[1:]]
        done = subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert str(tmp_path) in run(
        "python", "-c", "import gator, orchestrator; print(gator.__file__, orchestrator.__file__)"
    )
    settings = [word for setting in (*SHORT, *TINY) for word in ("--set", setting)]
    assert "trial_0000  finished" in run("orchestrator", "search", *settings)
    assert "trial_0000" in run("orchestrator", "report", "runs/digits", "--best-under", "macs_ratio=1")
    file = run("orchestrator", "export", "runs/digits", "--trial", "trial_0000", "--format", "onnx").strip()
    assert (empty / file).stat().st_size > 0
    assert run("python", "-c", python_of(README, PYTHON[0])) == "trial_0000 torch.Size([1, 10])\n"


def test_wheel_in_the_jobs_environment_brings_the_search_and_the_shipped_files(nodes: Nodes, wheel: Path) -> None:
    assert "No module named" in submit(nodes, wheel.parent, {}, "--help").stdout

    settings = [word for setting in SHORT for word in ("--set", setting)]
    installed = {"pip": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/" + wheel.name + "[search]"]}
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
