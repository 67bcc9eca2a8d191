"""A trial that is pruned to milliseconds, by a table whose times come from a formula."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

import gator
from gator.graph.graph import full_widths
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import ProfileConfig, TrialConfig, with_values
from orchestrator.errors import ConfigError, LatencyTableError
from orchestrator.latency.build_progress import BuildProgress
from orchestrator.latency.curve import Curve
from orchestrator.latency.measurers import LocalMeasurer, Task
from orchestrator.latency.sources import make_source
from orchestrator.latency.table_build import build
from orchestrator.latency.tables import read_table, write_table
from orchestrator.models.networks import build_traced
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.feasibility import check_start, check_targets
from orchestrator.trial.worker import run_assignment
from tests.orchestrator.latency.test_table_build import FormulaMeasurer
from tests.orchestrator.packed import make_tree, packed
from tests.orchestrator.tiny_trial import TINY, MemorySession, assign, tiny

TASK = Task(model=TINY.model, image_size=8, profile=ProfileConfig(batch_sizes=(1,)))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    return build(
        TASK, FormulaMeasurer(LocalMeasurer("cpu").conditions(TASK)), folder, BuildProgress(Console(quiet=True))
    )


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


def test_epochs_are_judged_by_the_table_not_by_the_curve(table: Path) -> None:
    config, cost = in_ms(table, gating__target_ms=1.0, profile__clock="wall"), cost_of(table)
    curve = Curve({1: ([0.0, 1e9], [100.0, 200.0]), 8: ([0.0, 1e9], [100.0, 100.0])})
    architecture = gator.Architecture.full(cost.graph)

    def estimated(config: TrialConfig, batch_size: int) -> float:
        costs = TrialCosts(config, cost.graph, torch.device("cpu"))
        clock = make_source(config, (3, 8, 8), costs.macs, curve, costs.timed_here())
        return clock.estimate(nn.Identity(), architecture, batch_size=batch_size).median_ms

    assert estimated(config, 1) == pytest.approx(cost.full)
    assert estimated(config, 8) == 100.0  # the table holds for one image
    of_another_device = tiny(
        profile__table_device="NVIDIA H100", profile__latency_table=str(table), profile__clock="wall"
    )
    assert estimated(of_another_device, 1) >= 100.0


def test_auto_aligns_to_the_steps_of_the_table(tmp_path: Path, table: Path) -> None:
    stored = read_table(table)
    in_pairs = [
        dataclasses.replace(op, median_ms=0.001 * (op.num_in + op.num_out + op.num_out % 2)) for op in stored.ops
    ]
    write_table(tmp_path / "pairs.parquet", dataclasses.replace(stored, ops=tuple(in_pairs)))
    steps = cost_of(tmp_path / "pairs.parquet").hardware_steps()
    assert set(steps.values()) == {2}
    config = tiny(profile__latency_table=str(tmp_path / "pairs.parquet"), pruning__round_to="auto")
    assignment = assign(tmp_path, config)
    session = MemorySession(tmp_path / "session")
    run_assignment(assignment, session)
    widths = gator.Architecture.load(assignment.folder / "architecture.json").widths
    assert all(width % 2 == 0 for width in widths.values())
    assert session.reports[1]["macs_ratio"] != session.reports[2]["macs_ratio"]  # before the cut they were not aligned


def test_a_table_of_onnx_runtime_needs_widths_in_steps(tmp_path: Path, table: Path) -> None:
    stored, path = read_table(table), tmp_path / "onnx.parquet"
    write_table(
        path, dataclasses.replace(stored, conditions=dataclasses.replace(stored.conditions, runtime="onnxruntime"))
    )
    graph = build_traced(tiny().model, (3, 8, 8))[1]

    def costs(round_to: int) -> TrialCosts:
        config = in_ms(path, gating__target_ms=1.0, profile__runtime="onnxruntime", pruning__round_to=round_to)
        return TrialCosts(config, graph, torch.device("cpu"))

    assert costs(8).target().full > 0
    with pytest.raises(LatencyTableError, match="round_to is 1, and other widths are several times slower"):
        costs(1).target()


def test_a_target_below_what_is_reachable_names_the_lowest(tmp_path: Path, table: Path) -> None:
    assignment = assign(tmp_path, in_ms(table, gating__target_ms=1e-4))
    with pytest.raises(gator.GateError, match=r"the lowest that can be reached is 0\.\d+ ms; raise the target"):
        run_assignment(assignment, MemorySession(tmp_path / "session"))


def test_a_table_for_another_batch_size_is_refused(tmp_path: Path, table: Path) -> None:
    config = in_ms(table, gating__target_ms=1.0, profile__batch_sizes=(4, 1))
    with pytest.raises(LatencyTableError, match=r"holds for batch size 1, profile\.batch_sizes begins with 4"):
        run_assignment(assign(tmp_path, config), MemorySession(tmp_path / "session"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "NVIDIA H100"}, r"holds for device NVIDIA H100, expected .*set profile.table_device"),
        ({"dtype": "float16"}, "dtype float16, expected float32"),
        ({"runtime": "cuda_graph"}, "runtime cuda_graph, expected eager"),
        ({"num_threads": 4}, "num_threads 4, expected 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_table_for_other_conditions_is_refused_unless_it_is_asked_for(
    tmp_path: Path, table: Path, change: dict[str, object], named: str
) -> None:
    stored = read_table(table)
    other = tmp_path / "other.parquet"
    write_table(other, dataclasses.replace(stored, conditions=dataclasses.replace(stored.conditions, **change)))
    graph, device = cost_of(table).graph, torch.device("cpu")
    with pytest.raises(LatencyTableError, match=named):
        TrialCosts(in_ms(other, gating__target_ms=1.0), graph, device).pressure()
    asked_for = in_ms(
        other, gating__target_ms=1.0, profile__table_device=change.get("device", stored.conditions.device)
    )
    assert TrialCosts(asked_for, graph, device).pressure().full > 0


def test_targets_out_of_reach_are_refused_before_anything_trains(table: Path) -> None:
    check_targets(in_ms(table, gating__target_ms=0.9 * cost_of(table).full))
    with pytest.raises(
        ConfigError, match=r"resnet.* at 8 px: .*the lowest that can be reached is 0\.\d+ ms; raise the target"
    ):
        check_targets(in_ms(table, gating__target_ms=1e-4))
    with pytest.raises(ConfigError, match=r"with one channel per group .* remain"):
        check_targets(tiny(gating__target_ratio=0.0001))
    with pytest.raises(ConfigError, match=r"in steps of pruning.round_to \(32\) .* remain at least"):
        check_targets(tiny(gating__target_ratio=0.1, pruning__round_to=32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__global_batch_size": 100_000},
            r"has 130 images to train on once data.validation_share is taken out, expected at least .* = 100000",
        ),
        (
            {"data__num_train": 100, "data__validation_share": 0.5, "data__global_batch_size": 64},
            r"has 52 images to train on",
        ),
        ({"data__global_batch_size": 7}, "is 7, expected a multiple of the 2 workers"),
    ],
    ids=["larger than the data", "larger than what is not held out", "not divisible"],
)
def test_batches_that_cannot_be_are_refused_before_anything_starts(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_start(tiny(**changes), ClusterConfig(workers_per_trial=2))


def test_a_batch_smaller_than_the_most_workers_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="is 32, expected a multiple of the 64 workers"):
        check_start(tiny(), ClusterConfig(workers_per_trial=64, min_workers_per_trial=1))
    check_start(tiny(), ClusterConfig(workers_per_trial=3, min_workers_per_trial=1))


@pytest.mark.parametrize(("round_to", "is_warned"), [(1, True), (4, False), ("auto", False)])
def test_widths_that_onnx_runtime_is_slow_with_are_warned_of(
    round_to: Any, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_start(tiny(profile__runtime="onnxruntime", pruning__round_to=round_to), ClusterConfig())
    assert ("set pruning.round_to to 4, 8 or auto" in caplog.text) == is_warned


@pytest.mark.parametrize("name", ["image_folder", "parquet"])
def test_images_of_a_folder_that_the_driver_sees_are_counted(name: str, tmp_path: Path) -> None:
    make_tree(tmp_path / "train", per_class=4)
    if name == "parquet":
        packed(tmp_path / "train", tmp_path / "packed")
    train = tmp_path / ("packed" if name == "parquet" else "train")
    config = tiny(data={**TINY.data.model_dump(), "name": name, "train": str(train), "num_train": None})
    with pytest.raises(
        ConfigError, match=r"has 11 images to train on once data.validation_share is taken out, expected .* = 32"
    ):
        check_start(config, ClusterConfig())
    gone = with_values(config, {"data.train": str(tmp_path / "on other nodes only")})
    check_start(gone, ClusterConfig())
    check_start(with_values(config, {"data.global_batch_size": 8}), ClusterConfig())


def test_the_lowest_target_of_a_space_is_the_one_that_is_checked() -> None:
    space = {
        "name": "s",
        "base": TINY.model_dump(mode="json"),
        "objectives": [{"metric": "top1", "mode": "max"}],
        "search": {"num_trials": 1, "points_to_evaluate": [{"gating.target_ratio": 0.0001}]},
    }
    space["params"] = {"gating.target_ratio": {"type": "float", "low": 0.2, "high": 0.9}}
    with pytest.raises(ConfigError, match="remain"):
        check_targets(SearchConfig.model_validate(space))
    space["search"]["points_to_evaluate"] = []
    check_targets(SearchConfig.model_validate(space))


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
