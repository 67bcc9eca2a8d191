"""Gated training on another device than the trace's: nothing mixes devices, no step waits, and few kernels are launched."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gator.device.networks import NETWORKS

PROJECT = Path(__file__).resolve().parents[3]
FEW = ("basic", "convnext", "makes arange", "makes tensor")
"""Normalisation of batches and layers, removable blocks, and forward passes that make tensors."""
MOST_ADDED = {"basic": 550}
"""Launches that gates may add to a step of a network: control, draws, loss, and a few for each of its sites."""
MOST_ADDED_TO_OTHERS = 1150


def rows_of(*names: str, source: Path = PROJECT) -> dict[str, dict[str, Any]]:
    """Return what the steps of each network found, in a process of its own: a device can be named once."""
    command = [sys.executable, "-m", "tests.gator.device.steps", *names]
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=source, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def check(row: dict[str, Any]) -> None:
    """Assert that a network was trained on one device, without a wait, in few launches."""
    assert "error" not in row, row
    assert row["waits"] == {}
    assert row["gated"] <= row["plain"] + MOST_ADDED.get(row["name"], MOST_ADDED_TO_OTHERS)


@pytest.fixture(scope="module")
def few() -> dict[str, dict[str, Any]]:
    return rows_of(*FEW)


@pytest.mark.parametrize("name", FEW)
def test_a_gated_network_trains_on_another_device(few: dict[str, dict[str, Any]], name: str) -> None:
    check(few[name])


OTHERS = [name for name in NETWORKS if name not in FEW and name != "unknown"]
NUM_A_PROCESS = 6


@functools.cache
def _rows_from(begin: int) -> dict[str, dict[str, Any]]:
    return rows_of(*OTHERS[begin : begin + NUM_A_PROCESS])


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("name", OTHERS)
def test_every_gated_network_trains_on_another_device(name: str) -> None:
    place = OTHERS.index(name)
    check(_rows_from(place - place % NUM_A_PROCESS)[name])


FAULTS = {
    "a count is made on the host": (
        "gating/gates.py",
        "dtype=torch.float64, device=channels_C.device)",
        "dtype=torch.float64)",
    ),
    "a cost stays on the host": ("costs/base.py", "tensor.to(widths.device, dtype)", "tensor.to(dtype)"),
    "pruning indexes with a tensor of the host": (
        "pruning/prune.py",
        "keep.nonzero().flatten().to(tensor.device)",
        "keep.nonzero().flatten()",
    ),
    "steps of an alignment stay on the host": (
        "gating/alignment.py",
        "_step_by_group(gated.graph, step).to(gates.group_C.device)",
        "_step_by_group(gated.graph, step)",
    ),
    "a re-cut looks up with a tensor of the device": ("gating/recut.py", "left_C.cpu()", "left_C"),
    "a site's channels stay on the host": (
        "gating/sites.py",
        "self.channels = self.channels.to(mask_NC.device)",
        "pass",
    ),
}
"""Left out by hand, one at a time: file of gator, what it says, what it says without a move."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    file, right, wrong = FAULTS[fault]
    for folder in ("gator", "tests/gator"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "__init__.py").touch()
    text = (tmp_path / "gator" / file).read_text()
    assert text.count(right) == 1
    (tmp_path / "gator" / file).write_text(text.replace(right, wrong))
    row = rows_of("grouped", source=tmp_path)["grouped"]
    with pytest.raises(AssertionError):
        check(row)
