"""Tables as files and how they are built. Most times come from a formula; one table is measured for real."""

import contextlib
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import gator
from gator.latency.measurement import Conditions
from gator.latency.table import NUM_TURNS, LatencyTable, NetworkTime, OpTime, Point
from orchestrator.config.trial import ProfileConfig
from orchestrator.describe import describe
from orchestrator.errors import LatencyTableError
from orchestrator.latency.build_progress import BuildProgress
from orchestrator.latency.measurers import LocalMeasurer, Task, Widths
from orchestrator.latency.table_build import NUM_CALIBRATION, build, calibration_widths
from orchestrator.latency.tables import read_table, table_path, table_text, write_table
from orchestrator.measure import main
from orchestrator.models.networks import build_traced
from tests.orchestrator.tiny_trial import TINY


def silent() -> BuildProgress:
    return BuildProgress(Console(quiet=True))


TASK = Task(model=TINY.model, image_size=8, profile=ProfileConfig(batch_sizes=(2,)))


class FormulaMeasurer:
    """Measures without a clock: a layer takes a microsecond a channel, a network one a channel of its groups."""

    def __init__(self, conditions: Conditions, fail_after: int | None = None) -> None:
        self.given, self.num_left = conditions, fail_after
        self.asked: list[Point] = []

    def conditions(self, task: Task) -> Conditions:
        return self.given

    def points(self, task: Task, points: Sequence[Point]) -> list[OpTime]:
        if self.num_left is not None and self.num_left <= 0:
            raise gator.LatencyError("grid_sampler on (C, 8, 8): this op cannot be timed alone")
        self.num_left = None if self.num_left is None else self.num_left - 1
        self.asked += points
        return [
            OpTime(kind=kind, num_in=i, num_out=o, median_ms=0.001 * (i + o), p10_ms=0.0, p90_ms=1.0, n=3)
            for kind, i, o in points
        ]

    def networks(self, task: Task, widths: Sequence[Widths]) -> list[NetworkTime]:
        _, graph = build_traced(task.model, (3, task.image_size, task.image_size))
        return [
            NetworkTime(
                fingerprint=graph.fingerprint,
                input_shape=(3, task.image_size, task.image_size),
                widths=one,
                median_ms=0.01 * sum(one.values()),
                p10_ms=0.0,
                p90_ms=1.0,
                n=3,
            )
            for one in widths
        ]


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    return LocalMeasurer("cpu").conditions(TASK)


@pytest.fixture(scope="module")
def graph() -> gator.ChannelGraph:
    return build_traced(TINY.model, (3, 8, 8))[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, conditions: Conditions) -> Path:
    """Return the file of a complete table."""
    return build(TASK, FormulaMeasurer(conditions), tmp_path_factory.mktemp("tables"), silent())


def test_a_file_gives_back_the_table(tmp_path: Path, conditions: Conditions) -> None:
    path = build(TASK, FormulaMeasurer(conditions), tmp_path, silent())
    assert path == table_path(tmp_path, TINY.model, 8, conditions)
    table = read_table(path, conditions)
    write_table(tmp_path / "copy.parquet", table)
    copy = read_table(tmp_path / "copy.parquet")
    assert (copy.conditions, copy.ops, copy.networks) == (table.conditions, table.ops, table.networks)
    assert pq.read_schema(path).metadata[b"version"] == b"4"
    assert len(table.networks) == NUM_CALIBRATION


def test_a_build_that_broke_off_keeps_its_points_and_goes_on(tmp_path: Path, conditions: Conditions) -> None:
    with pytest.raises(LatencyTableError, match=r"grid_sampler.*has all results so far; rerun the same command"):
        build(TASK, FormulaMeasurer(conditions, fail_after=1), tmp_path, silent())
    kept = read_table(table_path(tmp_path, TINY.model, 8, conditions))
    second = FormulaMeasurer(conditions)
    path = build(TASK, second, tmp_path, silent())
    assert kept.ops
    counts = Counter(second.asked)
    assert {counts[op.point] for op in kept.ops} == {NUM_TURNS - 1}  # one turn of each was kept
    third = FormulaMeasurer(conditions)
    assert build(TASK, third, tmp_path, silent()) == path
    assert third.asked == []  # complete: nothing is measured again


class FormulaOfAnyRuntime(FormulaMeasurer):
    """Has the runtime of the task; remembers which points it was asked for in which."""

    def __init__(self, conditions: Conditions) -> None:
        super().__init__(conditions)
        self.num_asked: Counter[tuple[str, bool]] = Counter()

    def conditions(self, task: Task) -> Conditions:
        runtime = task.profile.runtime
        return dataclasses.replace(self.given, runtime="eager" if runtime == "auto" else runtime)

    def points(self, task: Task, points: Sequence[Point]) -> list[OpTime]:
        self.num_asked += Counter((task.profile.runtime, kind.is_layer) for kind, _, _ in points)
        return [dataclasses.replace(op, median_ms=2 * op.median_ms) for op in super().points(task, points)]


def test_a_table_of_onnx_runtime_times_layers_there_and_all_else_in_pytorch(
    tmp_path: Path, conditions: Conditions
) -> None:
    task = dataclasses.replace(TASK, profile=ProfileConfig(batch_sizes=(2,), runtime="onnxruntime"))
    measurer = FormulaOfAnyRuntime(conditions)
    path = build(task, measurer, tmp_path, silent())
    assert measurer.num_asked["onnxruntime", True] > 0 == measurer.num_asked["onnxruntime", False]
    table = read_table(path)
    assert {op.kind.is_layer for op in table.ops} == {True, False}
    before = +measurer.num_asked
    assert build(task, measurer, tmp_path, silent()) == path
    assert measurer.num_asked == before  # nothing was missing


def test_calibration_networks_have_the_widths_of_the_table(graph: gator.ChannelGraph) -> None:
    full = {group.name: group.num_channels for group in graph.groups}
    for widths in calibration_widths(graph, step=8):
        assert all(width % 8 == 0 or width == full[name] for name, width in widths.items())


def test_progress_tells_what_is_left(tmp_path: Path, conditions: Conditions) -> None:
    screen = io.StringIO()
    build(TASK, FormulaMeasurer(conditions), tmp_path, BuildProgress(Console(file=screen), every_s=0.0))
    said = screen.getvalue().splitlines()
    assert any("timings to go" in line and "s left" in line for line in said)
    assert said[-1].endswith(f"{NUM_CALIBRATION} whole networks to go")


def test_lines_come_now_and_then() -> None:
    screen = io.StringIO()
    progress = BuildProgress(Console(file=screen), every_s=3600.0)
    for num_done in range(50):
        progress.step("a CPU, batch 1", num_done, 50 - num_done, "timings")
    progress.step("a CPU, batch 1", 0, 12, "whole networks")
    assert screen.getvalue() == "a CPU, batch 1: 50 timings to go\na CPU, batch 1: 12 whole networks to go\n"


def test_on_a_terminal_the_builds_are_bars(tmp_path: Path, conditions: Conditions) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with BuildProgress(screen) as progress:
        build(TASK, FormulaMeasurer(conditions), tmp_path, progress)
    shown = screen.file.getvalue()
    assert f"{conditions.device}, batch 2, timings" in shown
    assert f"0/{NUM_CALIBRATION}" in shown


def test_the_old_name_of_the_runtime_is_refused_with_the_new(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "resnet18", "--mode", "cuda_graph"])
    assert "the option is now --runtime: use --runtime cuda_graph" in capsys.readouterr().err


def test_a_runtime_that_the_device_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match="needs model and inputs on a CUDA device, they are on cpu"):
        build(
            dataclasses.replace(TASK, profile=ProfileConfig(runtime="cuda_graph")),
            LocalMeasurer("cpu"),
            tmp_path,
            silent(),
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "NVIDIA H100"}, "device is .* here but NVIDIA H100 in"),
        ({"dtype": "float16"}, "dtype is float32 here but float16 in"),
        ({"batch_size": 32}, "batch_size is 2 here but 32 in"),
        ({"runtime": "cuda_graph"}, "runtime is eager here but cuda_graph in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_table_for_other_conditions_is_refused(
    tmp_path: Path, conditions: Conditions, change: dict[str, object], named: str
) -> None:
    write_table(tmp_path / "t.parquet", LatencyTable(dataclasses.replace(conditions, **change)))
    with pytest.raises(LatencyTableError, match=named):
        read_table(tmp_path / "t.parquet", conditions)


def conditions_with(field: str, value: object) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        fields = json.loads(table.schema.metadata[b"conditions"]) | {field: value}
        return table.replace_schema_metadata(table.schema.metadata | {b"conditions": json.dumps(fields).encode()})

    return changed


def rows_with(what: str, /, **values: object) -> Callable[[pa.Table], pa.Table]:
    """All rows of calls, or of networks, with other values."""
    return lambda table: pa.Table.from_pylist(
        [row | values if row["what"] == what else row for row in table.to_pylist()], schema=table.schema
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (rows_with("op", what="layer"), r"row 1 is .*: Input tag 'layer' .* expected tags: 'op', 'network'"),
        (rows_with("op", num_in=0), r"row 1, op, num_in is 0: Input should be greater than 0"),
        (rows_with("op", num_out=-3), r"num_out is -3: Input should be greater than 0"),
        (rows_with("op", num_turns=0), r"num_turns is 0: Input should be greater than 0"),
        (rows_with("op", num_turns=None), r"num_turns is None: Input should be a valid integer"),
        (rows_with("op", shape=[None, 8, 8]), r"shape, 0 is None: Input should be a valid integer"),
        (rows_with("op", shape=[-1, 8, 8]), r"shape, 0 is -1: Input should be greater than or equal to 0"),
        (rows_with("op", settings="[3]"), r"settings is \[3\]: Input should be a valid dictionary"),
        (rows_with("op", settings='{"a": ' * 9999), r"settings is .*: Invalid JSON: recursion limit exceeded"),
        (rows_with("op", median_ms=0.0), r"median_ms is 0.0: Input should be greater than 0"),
        (rows_with("op", p90_ms=float("nan")), r"p90_ms is nan: Input should be a finite number"),
        (rows_with("op", p10_ms=-1.0), r"p10_ms is -1.0: Input should be greater than or equal to 0"),
        (rows_with("network", median_ms=0.0), r"network, median_ms is 0.0: Input should be greater than 0"),
        (rows_with("network", n=0), r"n is 0: Input should be greater than 0"),
        (rows_with("network", input_shape=[3, 0, 8]), r"input_shape, 1 is 0: Input should be greater than 0"),
        (rows_with("network", widths="{}"), r"widths is {}: .*expected the kept channels of each group, not all 0"),
        (rows_with("network", widths="[1]"), r"widths is \[1\]: Input should be a valid dictionary"),
        (rows_with("network", widths='{"a": 0}'), r"widths is {'a': 0}: .*not all 0"),
        (
            rows_with("network", widths='{"a": 4, "b": -1}'),
            r"widths, b is -1: Input should be greater than or equal to 0",
        ),
        (rows_with("network", widths='{"a": 1.5}'), r"widths, a is 1.5: Input should be a valid integer"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), r"row \d+ repeats the op of an earlier row"),
        (
            lambda table: pa.concat_tables([table, table.slice(table.num_rows - 1)]),
            r"row \d+ repeats the network of an earlier row",
        ),
        (conditions_with("batch_size", "one"), r"batch_size is 'one': Input should be a valid integer"),
        (conditions_with("batch_size", 0), r"batch_size is 0: Input should be greater than 0"),
        (conditions_with("runtime", "fast"), r"runtime is 'fast': Input should be 'eager'"),
        (conditions_with("versions", {"torch": 2}), r"versions, torch is 2: Input should be a valid string"),
        (conditions_with("colour", "red"), r"colour is 'red': Unexpected keyword argument"),
    ],
)
def test_a_damaged_row_is_refused_by_name(
    tmp_path: Path, built: Path, damage: Callable[[pa.Table], pa.Table], named: str
) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(damage(pq.read_table(built)), path)
    with pytest.raises(LatencyTableError, match=rf"t.parquet: not a latency table, or a damaged one \(.*{named}"):
        read_table(path)


def test_a_half_written_file_is_refused(tmp_path: Path, conditions: Conditions) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, LatencyTable(conditions))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LatencyTableError, match=r"t.parquet: not a latency table, or a damaged one"):
        read_table(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=r"t.parquet: no such file; measure it"):
        read_table(tmp_path / "t.parquet")


def test_a_damaged_table_stops_a_build_and_stays(tmp_path: Path, conditions: Conditions) -> None:
    path = table_path(tmp_path, TINY.model, 8, conditions)
    path.write_bytes(b"half")
    with pytest.raises(LatencyTableError, match="damaged"):
        build(TASK, FormulaMeasurer(conditions), tmp_path, silent())
    assert path.read_bytes() == b"half"


def test_a_table_without_a_layer_of_the_network_names_it(
    tmp_path: Path, conditions: Conditions, graph: gator.ChannelGraph
) -> None:
    table = read_table(build(TASK, FormulaMeasurer(conditions), tmp_path, silent()))
    ops = tuple(op for op in table.ops if op.kind.name != "linear")
    with pytest.raises(LatencyTableError, match="linear on"):
        table_text(graph, dataclasses.replace(table, ops=ops))


def test_describe_shows_the_shares(tmp_path: Path, conditions: Conditions) -> None:
    task = dataclasses.replace(TASK, model=TINY.model.model_copy(update={"name": "resnet8_cifar", "kwargs": {}}))
    path = build(task, FormulaMeasurer(conditions), tmp_path, silent())
    text = describe(task.model, 8, path)
    assert "group" in text
    assert "latency share  quotient" in text


@pytest.mark.parametrize("batch", ["0", "1,,2", "many"])
def test_batch_sizes_that_are_none_are_refused(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "resnet18", "--batch", batch])
    assert f"found '{batch}', expected batch sizes such as 1,32" in capsys.readouterr().err


def test_a_real_table_of_a_tiny_network(tmp_path: Path, graph: gator.ChannelGraph) -> None:
    path = build(TASK, LocalMeasurer("cpu"), tmp_path, silent())
    cost = gator.LatencyCost(graph, read_table(path))
    assert cost.full > 0
    assert cost.calibration.num_networks == NUM_CALIBRATION
    assert "mean error" in table_text(graph, read_table(path))


@pytest.mark.slow
def test_measure_builds_a_table_in_a_process_of_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "resnet8_cifar", "--image-size", "8", "--batch", "1,2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    assert "MALLOC_MMAP_THRESHOLD_" in read_table(next(tmp_path.glob("*_b1_*"))).conditions.allocator
    assert capsys.readouterr().out.count("latency share  quotient") == 2


@pytest.mark.parametrize(
    ("out", "folder"), [("runs/latency", "/home/somebody/runs/latency"), ("~/tables", "/home/somebody/tables")]
)
def test_measure_in_a_ray_job_writes_to_the_home_folder(monkeypatch: pytest.MonkeyPatch, out: str, folder: str) -> None:
    written: list[Path] = []

    def build(tasks: object, target: Path, *_: object) -> list[object]:
        written.append(target)
        return []

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr("orchestrator.cluster.connection.session", lambda cluster: contextlib.nullcontext())
    monkeypatch.setattr("orchestrator.latency.table_build.build_everywhere", build)
    assert main(["--model", "resnet8_cifar", "--out", out]) == 0
    assert written == [Path(folder)]


@pytest.mark.parametrize("out", ["~nosuchuser/x", ""])
def test_measure_refuses_a_folder_that_is_none(capsys: pytest.CaptureFixture[str], out: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "resnet8_cifar", "--out", out])
    assert f"argument --out: found {out!r}, " in capsys.readouterr().err
