"""The actor that measures for `orchestrator.measure` is killed: one message, nothing lost, and the same command goes on."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from orchestrator.latency.tables import read_table
from tests.faults.harness import PROJECT, wait_until

LIMIT_S = 400.0


@contextmanager
def building(out: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Build a table of several portions in a process of its own, which ends with the block at the latest."""
    arguments = ["--model", "resnet8_cifar", "--image-size", "16", "--out", str(out)]
    command = [sys.executable, "-m", "orchestrator.measure", *arguments]
    with open(log, "ab") as file:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_S)
def test_a_measuring_actor_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    tables, log = tmp_path / "tables", tmp_path / "log.txt"
    with building(tables, log) as process:
        wait_until(lambda: bool(list(tables.glob("*.parquet"))) or process.poll() is not None, LIMIT_S)
        children = psutil.Process(process.pid).children(recursive=True)
        (actor,) = (child for child in children if " ".join(child.cmdline()).startswith("ray::LocalMeasurer"))
        actor.kill()
        assert process.wait(LIMIT_S) == 1, log.read_text()
    assert "the measurement process crashed" in log.read_text()
    assert "Traceback" not in log.read_text()
    (path,) = tables.glob("*.parquet")
    kept = len(read_table(path).ops)
    assert kept > 0
    with building(tables, log) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert len(read_table(path).ops) >= kept
    assert read_table(path).networks
