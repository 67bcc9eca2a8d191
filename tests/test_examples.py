"""Each example runs as its first lines say, in a folder that has no more than the examples."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.models import networks
from orchestrator.planning.space import load_space
from tests.test_house import imports, is_within

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLES = PROJECT / "examples"
FOUND = {
    "prune_timm.py": r"unpruned: top1 9\d\.\d, .* MACs\npruned:   top1 9\d\.\d, (4[6-9]|5[0-4])% of them\n$",
    "segmentation.py": r"unpruned: overlap 0\.[89]\d, .* MACs\npruned:   overlap 0\.[89]\d, (4[6-9]|5[0-4])% of them\n$",
    "own_data.py": r"(?m)^\*? +trial_000\d +finished(.*\n)+.*; 2 trials: [12] finished",
    "search_from_python.py": r"unpruned top1 .*\n(trial_000\d top1 .*\n)+trial_000\d is the most accurate: logits \(1, 10\)\n$",
}
"""Example -> what its commands print."""
WITHOUT_ORCHESTRATOR = ("prune_timm.py", "segmentation.py")


@pytest.mark.slow  # half a minute each, those that search a minute
@pytest.mark.timeout(580)
@pytest.mark.parametrize("name", FOUND)
def test_example_runs_as_it_says(name: str, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    commands = re.findall(r"^    (python .+?)(?: +#.*)?$", (EXAMPLES / name).read_text(), re.MULTILINE)
    assert f"python examples/{name}" in commands
    for command in commands:
        options = {
            "cwd": tmp_path,
            "env": os.environ | {"PYTHONPATH": str(PROJECT)},
            "capture_output": True,
            "text": True,
        }
        done = subprocess.run([sys.executable, *shlex.split(command)[1:]], **options, check=False)
        print(done.stdout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert re.search(FOUND[name], done.stdout), done.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == FOUND.keys()


@pytest.mark.parametrize("name", WITHOUT_ORCHESTRATOR)
def test_examples_of_gator_do_without_the_orchestrator(name: str) -> None:
    assert not [module for module in imports(EXAMPLES / name) if is_within(module, "orchestrator")]


def test_the_space_of_the_example_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.syspath_prepend(str(PROJECT))
    networks.check(load_space("examples/own_data.yaml", []).base.model)
