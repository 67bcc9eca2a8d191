"""What is installed without the extra "search": gator works, and a command says what it needs."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orchestrator

PROJECT = Path(__file__).resolve().parent.parent
FILE = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
STARTS = {
    "module": ["-m", "orchestrator"],
    "command": ["-m", "orchestrator.search", "--help"],
    "installed": ["orchestrator", "search"],
}
WITH_GATOR_ALONE = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
import torch, gator
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
model, images = build(), torch.randn(2, 3, 8, 8)
graph = gator.trace(model, images)
gator.verify(model, graph, images)
gated = gator.GatedModel(model, graph)
loss = gated(images).sum() + gator.GateLoss(gator.MacsCost(graph), target_ratio=0.5)(gated, 0.5)
loss.backward()
small = gated.prune()
gator.save_pruned(small, gated.architecture(), {folder!r})
gator.load_pruned({folder!r}, build=build)
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {absent!r}), small(images).shape)
"""


def names(requirements: list[str]) -> list[str]:
    return [canonicalize_name(Requirement(line).name) for line in requirements]


def modules() -> dict[str, set[str]]:
    """Return the modules that are installed, and the distributions of each."""
    return {name: set(map(canonicalize_name, owners)) for name, owners in metadata.packages_distributions().items()}


def with_what_they_need(requirements: list[str]) -> set[str]:
    """Return the installed distributions of these requirements and of theirs."""
    found: set[str] = set()
    left = [(Requirement(line), "") for line in requirements]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        left += [(one, extra) for extra in requirement.extras or {""} for line in needs if (one := Requirement(line))]
    return found


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_command_without_its_packages_says_what_to_install(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "orchestrator").write_text("from orchestrator.__main__ import main\n\nmain()\n")
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(PROJECT)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-S", *start], **options, check=False)  # -S: the standard library alone
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"orchestrator: missing packages: torchvision, ray, .*; run pip install 'gator-search\[search\]'\n", done.stderr
    )


def test_the_extra_has_every_package_that_a_command_asks_for() -> None:
    owners, extra = modules(), set(names(FILE["optional-dependencies"]["search"]))
    assert all(owners[name] & extra for name in orchestrator.NEEDED)
    assert extra - set.union(*(owners[name] for name in orchestrator.NEEDED)) == {"nvidia-ml-py"}


@pytest.mark.slow
def test_gator_needs_no_package_of_an_extra(tmp_path: Path) -> None:
    needed = with_what_they_need(FILE["dependencies"])
    absent = {name for name, owners in modules().items() if not owners & (needed | {"gator-search"})}
    assert {"torchvision", "ray", "yaml", "pynvml"} <= absent
    code = WITH_GATOR_ALONE.format(absent=absent, folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "torch.Size([2, 4])\n"), done.stderr
