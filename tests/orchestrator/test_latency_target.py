"""A trial that is pruned to milliseconds, by a table whose times come from a formula."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import gator
from gator.costs import full_widths
from orchestrator.build_progress import Lines
from orchestrator.config import TrialConfig
from orchestrator.errors import LatencyTableError
from orchestrator.latency_build import LocalMeasurer, Task, build
from orchestrator.latency_files import read_table, write_table
from orchestrator.measure import build_traced
from orchestrator.worker import run_assignment
from tests.orchestrator.test_latency_build import FormulaMeasurer
from tests.orchestrator.tiny_trial import TINY, MemorySession, assign, tiny

TASK = Task(model=TINY.model, image_size=8, batch_size=1, dtype="float32", mode="eager", num_threads=1, method="table")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    return build(TASK, FormulaMeasurer(LocalMeasurer("cpu").conditions(TASK)), folder, Lines(lambda _: None))


def cost_of(table: Path) -> gator.LatencyCost:
    return gator.LatencyCost(build_traced(TINY.model, (3, 8, 8))[1], read_table(table))


def in_ms(table: Path, **values: Any) -> TrialConfig:
    milliseconds = {"gating__target_ratio": None, "gating__cost__macs": 0, "gating__cost__latency": 1}
    return tiny(**{"profile__latency_table": str(table), **milliseconds, **values})


def test_a_trial_ends_at_its_milliseconds(tmp_path: Path, table: Path) -> None:
    cost = cost_of(table)
    target_ms = 0.8 * cost.full
    assignment = assign(tmp_path, in_ms(table, gating__target_ms=target_ms, gating__epochs=4))
    run_assignment(assignment, MemorySession(tmp_path / "session"))
    ended_ms = cost(gator.Architecture.load(assignment.folder / "architecture.json"))
    one_channel_ms = float(cost.relative_gradient(full_widths(cost.graph)).max()) * cost.full
    assert target_ms - one_channel_ms <= ended_ms <= target_ms + one_channel_ms  # a channel is the smallest step


def test_auto_aligns_to_the_steps_of_the_table(tmp_path: Path, table: Path) -> None:
    stored = read_table(table)
    in_pairs = [
        dataclasses.replace(op, median_ms=0.001 * (op.num_in + op.num_out + op.num_out % 2)) for op in stored.ops
    ]
    write_table(tmp_path / "pairs.parquet", dataclasses.replace(stored, ops=tuple(in_pairs)))
    steps = cost_of(tmp_path / "pairs.parquet").hardware_steps()
    assert set(steps.values()) == {2}
    config = tiny(profile__latency_table=str(tmp_path / "pairs.parquet"), pruning__align="auto")
    assignment = assign(tmp_path, config)
    session = MemorySession(tmp_path / "session")
    run_assignment(assignment, session)
    widths = gator.Architecture.load(assignment.folder / "architecture.json").widths
    assert all(width % 2 == 0 for width in widths.values())
    assert session.reports[1]["open_channels"] != sum(widths.values())  # before the cut they were not aligned


def test_a_target_below_what_is_reachable_names_the_lowest(tmp_path: Path, table: Path) -> None:
    assignment = assign(tmp_path, in_ms(table, gating__target_ms=1e-4))
    with pytest.raises(gator.GateError, match=r"the lowest that can be reached is 0\.\d+ ms; raise the target"):
        run_assignment(assignment, MemorySession(tmp_path / "session"))


def test_a_table_for_another_batch_size_is_refused(tmp_path: Path, table: Path) -> None:
    config = in_ms(table, gating__target_ms=1.0, profile__batch_sizes=(4, 1))
    with pytest.raises(LatencyTableError, match=r"holds for batch size 1, profile\.batch_sizes begins with 4"):
        run_assignment(assign(tmp_path, config), MemorySession(tmp_path / "session"))


def test_a_table_of_another_network_is_refused(tmp_path: Path, table: Path) -> None:
    stored = read_table(table)
    ops = tuple(op for op in stored.ops if op.kind.name != "linear")
    write_table(tmp_path / "other.parquet", dataclasses.replace(stored, ops=ops))
    config = in_ms(tmp_path / "other.parquet", gating__target_ms=1.0)
    with pytest.raises(LatencyTableError, match=r"has linear on \(C\)"):
        run_assignment(assign(tmp_path, config), MemorySession(tmp_path / "session"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gating__target_ms": 1.0, "gating__target_ratio": 0.5}, "are both set; set one"),
        ({"gating__target_ms": 1.0, "gating__cost__macs": 1.0}, "needs a cost in milliseconds"),
        ({"gating__target_ms": 1.0, "profile__latency_table": None}, "read profile.latency_table; set it"),
    ],
    ids=["two targets", "another cost", "no table"],
)
def test_settings_that_do_not_fit_are_refused(table: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        in_ms(table, **values)
