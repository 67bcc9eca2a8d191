"""Whatever is handed in is accepted or refused in one message of ours, within seconds, and a refusal writes nothing.

Each case goes through a command's main(argv) in this process. FUZZ_CASES=2500 sets how many there are for each kind of input:
60 by default, the same ones each time; with FUZZ_CASES they are drawn anew.
"""

import contextlib
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import gator
from orchestrator import data, describe, report, search, train
from orchestrator.__main__ import COMMANDS
from orchestrator.__main__ import main as orchestrator_main
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import ModelConfig
from orchestrator.datasets.parquet.format import Shards, read_manifest
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.errors import ClusterError, DataError, OrchestratorError
from orchestrator.latency.curve import Curve
from orchestrator.latency.tables import read_table, write_table
from orchestrator.models.networks import build
from orchestrator.reporting.page import write_report
from orchestrator.storage.paths import RunPaths
from orchestrator.trial.fixed_networks import architecture_of
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.searchers import OptunaSearcher
from tests.fuzz.mutate import ODD_TEXTS, ODD_YAML, damaged_bytes, damaged_trees, trees
from tests.orchestrator import planted
from tests.orchestrator.packed import make_tree, packed

PROJECT = Path(__file__).resolve().parents[2]
CASES = int(os.environ.get("FUZZ_CASES", "60"))
LONGEST_S = 30.0
"""A case that takes longer counts as a hang; most take milliseconds."""

fuzzed = settings(
    max_examples=CASES,
    derandomize="FUZZ_CASES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.timeout(3600)
Main = Callable[[list[str]], int]


def run(main: Main, argv: list[str]) -> int:
    """Run a command; assert that it answers in time with an exit code of ours and, if it refuses, in one message."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as refused:  # argparse
            code = refused.code
    assert time.monotonic() - began < LONGEST_S, argv
    assert code in (0, 1, 2), argv
    assert "Traceback" not in err.getvalue(), err.getvalue()
    if code:
        assert err.getvalue().strip(), "refused without a word"
    return code


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Assert that nothing in the folder is made, changed or removed."""
    before = files(folder)
    yield
    assert files(folder) == before


def write_yaml(file: Path, tree: Any) -> None:
    """Write a tree as YAML; one that YAML cannot hold is no case."""
    try:
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    except (UnicodeEncodeError, yaml.YAMLError):
        reject()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty folder that all cases of this file share."""
    return tmp_path_factory.mktemp("fuzz")


# --- search spaces ----------------------------------------------------------------------------------------------------

SPACES = [
    yaml.safe_load((PROJECT / "search_spaces" / f"{name}.yaml").read_text()) for name in ("digits", "fashion_mnist")
]


@fuzzed
@given(space=st.one_of(*(damaged_trees(space) for space in SPACES)), command=st.sampled_from((search.main, train.main)))
def test_search_spaces(space: Any, command: Main, folder: Path) -> None:
    file = folder / "space.yaml"
    write_yaml(file, space)
    with untouched(folder):
        run(command, [str(file), "--dry-run", "--run-dir", str(folder / "runs")])


@fuzzed
@given(
    content=st.one_of(
        damaged_bytes((PROJECT / "search_spaces/digits.yaml").read_bytes()),
        st.sampled_from(ODD_YAML).map(lambda text: f"name: {text}\nextends: {text}\n".encode()),
    )
)
def test_search_spaces_of_damaged_text(content: bytes, folder: Path) -> None:
    file = folder / "space.yaml"
    file.write_bytes(content)
    with untouched(folder):
        run(search.main, [str(file), "--dry-run", "--run-dir", str(folder / "runs")])


@fuzzed
@given(cluster=damaged_trees(json.loads(ClusterConfig(storage="x", env_vars={"A": "b"}).model_dump_json())))
def test_clusters(cluster: Any, folder: Path) -> None:
    file = folder / "cluster.yaml"
    write_yaml(file, cluster)
    with untouched(folder):
        run(search.main, ["digits", "--dry-run", "--cluster", str(file)])


# --- command lines ----------------------------------------------------------------------------------------------------

KEYS = ("name", "base.model.name", "base.data.validation_share", "base.gating", "params", "params.gating.loss_weight.low",
        "objectives.0.metric", "search.num_trials", "base.model.kwargs.width", "scheduler.type", "search.points_to_evaluate")  # fmt: skip
odd_words = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12), st.integers().map(str))
SOURCES = [PROJECT / "orchestrator" / f"{name}.py" for name in (*COMMANDS, "cli")]
FLAGS = sorted({flag for path in SOURCES for flag in re.findall(r'"(--[a-z][a-z-]*)"', path.read_text())})
"""Every option of every command."""
VALUES = ("-h", "--nothing", "pack", "check", "skip", "refuse", "digits", "fashion_mnist", "local", "onnx", "pt2", "csv", "table",
          "latency_ms=4", "top1=nan", "trial_0000", "1,32", "0", "fp32", "eager", "paper", "width=8", "resnet8_cifar")  # fmt: skip
settings_of_a_space = st.builds(
    lambda key, value: f"{key}={value}",
    st.sampled_from((*KEYS, ".".join("a" * 2000))),
    st.one_of(odd_words, trees.map(str), st.sampled_from(ODD_YAML)),
)
words = st.one_of(st.sampled_from(FLAGS), st.sampled_from(VALUES), odd_words, settings_of_a_space)


@pytest.fixture(scope="module")
def no_cluster(module_patch: pytest.MonkeyPatch) -> None:
    """Let nothing reach a Ray, or a store of objects: what would is refused once all arguments have been accepted."""

    def refuse(cluster: ClusterConfig) -> None:
        raise ClusterError("no cluster in this test")

    module_patch.setattr("orchestrator.cluster.connection.connect", refuse)
    module_patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    module_patch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    """Return a MonkeyPatch for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@fuzzed
@given(overrides=st.lists(st.one_of(settings_of_a_space, odd_words), min_size=1, max_size=4))
def test_overrides(overrides: list[str], folder: Path) -> None:
    argv = [word for override in overrides for word in ("--set", override)]
    with untouched(folder):
        run(search.main, ["digits", "--dry-run", "--run-dir", str(folder / "runs"), *argv])


@fuzzed
@given(
    command=st.sampled_from(sorted(COMMANDS)),
    argv=st.lists(words, max_size=6),
)
def test_command_lines(command: str, argv: list[str], folder: Path, no_cluster: None) -> None:
    starts_something = command in ("search", "train")
    with untouched(folder), contextlib.chdir(folder):
        run(orchestrator_main, [command, *argv, *(["--dry-run"] if starts_something else [])])


# --- run directories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(folder: Path) -> RunPaths:
    """Return a run directory with results of all kinds."""
    run_paths = RunPaths(folder / "planted")
    rows = [
        planted.unpruned(),
        planted.finished(0, 97.0, 2.0),
        planted.finished(1, 95.0, 1.0),
        planted.stopped(2, 1),
        planted.failed(3),
    ]
    planted.plant(run_paths, planted.search_config(), rows)
    write_report(run_paths)
    return run_paths


QUICK = (["--format", "csv"], [], ["--against", "paper"], ["--best-under", "latency_ms=3"])
FORMATS = st.sampled_from(QUICK * 5 + (["--format", "html"],))  # a page takes as long as twenty tables


@pytest.fixture
def quick_pictures(module_patch: pytest.MonkeyPatch) -> None:
    """Leave out drawing, which takes a second a picture; what is drawn is still put together."""
    module_patch.setattr("orchestrator.reporting.page.front_png", lambda *arguments: b"")
    module_patch.setattr("orchestrator.reporting.page._panel", lambda figure, name: name)


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Give a file another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def report_on(run_paths: RunPaths, path: Path, content: bytes, arguments: list[str]) -> set[str]:
    """Show a run directory one of whose files is damaged, and put the others back; return those that a refusal wrote."""
    with replaced(path, content):
        before = files(run_paths.root)
        code = run(report.main, [str(run_paths.root), *arguments])
        after = files(run_paths.root)
    for name, bytes_before in before.items():
        if run_paths.root / name != path:
            (run_paths.root / name).write_bytes(bytes_before)
    return (
        {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} if code == 2 else set()
    )


@fuzzed
@given(draws=st.data())
def test_architectures(draws: st.DataObject, finished: RunPaths, quick_pictures: None) -> None:
    path = finished.trial("trial_0000").architecture
    valid = path.read_bytes()
    damaged = st.one_of(damaged_trees(json.loads(valid)).map(_json), damaged_bytes(valid))
    assert report_on(finished, path, draws.draw(damaged), ["--format", "html"]) == set()


@fuzzed
@given(draws=st.data(), arguments=FORMATS)
def test_configs_of_a_run(draws: st.DataObject, arguments: list[str], finished: RunPaths) -> None:
    valid = finished.config.read_bytes()
    damaged = st.one_of(damaged_trees(json.loads(valid)).map(_json), damaged_bytes(valid))
    assert report_on(finished, finished.config, draws.draw(damaged), arguments) == set()


@fuzzed
@given(draws=st.data(), arguments=FORMATS)
def test_results_of_a_run(draws: st.DataObject, arguments: list[str], finished: RunPaths) -> None:
    valid = finished.results.read_bytes()
    damaged = st.one_of(damaged_tables(finished.results), damaged_bytes(valid))
    assert report_on(finished, finished.results, draws.draw(damaged), arguments) == set()


@fuzzed
@given(draws=st.data())
def test_what_a_search_goes_on_from(draws: st.DataObject, folder: Path) -> None:
    """Read by the driver once Ray is up, so not through main(argv): each is read, or refused by an error of ours."""
    name, (valid, read) = draws.draw(st.sampled_from(sorted(_states().items())))
    path = folder / "state" / name
    path.parent.mkdir(exist_ok=True)
    damages = [damaged_bytes(valid), st.sampled_from((b"[" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"\n"))]
    if name.endswith(".json"):
        damages.append(damaged_trees(json.loads(valid)).map(_json))
    path.write_bytes(draws.draw(st.one_of(damages)))
    with contextlib.suppress(OrchestratorError):
        read(path)


@cache
def _states() -> dict[str, tuple[bytes, Callable[[Path], Any]]]:
    """Return name -> content and reader of what lies in a run directory beside tables, configs and architectures."""
    with tempfile.TemporaryDirectory() as folder:
        decisions, journal = Path(folder, "reports.jsonl"), Path(folder, "study.log")
        for epoch in planted.epochs(3):
            ReportLog(decisions).append("trial_0000", epoch)
        _searcher(journal).suggest("")
        curve = Curve({1: ((1.0, 2.0), (3.0, 4.0))}).to_json().encode()
        result = json.dumps({"version": 1, "top1": 97.0, "params": 100, "latency_ms": None}).encode()
        widths = json.dumps({"channels": {"layer1": {"0": {"conv1": 4}}}}).encode()
        return {
            decisions.name: (decisions.read_bytes(), lambda path: list(ReportLog(path).read())),
            journal.name: (journal.read_bytes(), _searcher),
            "latency_curve.json": (curve, lambda path: Curve.from_json(path.read_bytes())),
            "result.json": (result, train._read_result),
            "widths.json": (widths, lambda path: architecture_of(_graph(), str(path))),
        }


def _searcher(journal: Path) -> OptunaSearcher:
    return OptunaSearcher(planted.search_config(), journal, [], lambda trial_id, params, parent: {"trial_id": trial_id})


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@st.composite
def damaged_tables(draw: st.DrawFn, path: Path) -> bytes:
    """Return the Parquet file with values of any type in some places, columns left out, or other metadata."""
    table = pq.ParquetFile(path).read()
    metadata = dict(table.schema.metadata or {})
    columns = {name: table[name].to_pylist() for name in table.column_names}
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(("value", "column", "leave out", "add", "metadata", "no rows")))
        name = draw(st.sampled_from(sorted(columns) or ["x"]))
        if change == "leave out":
            columns.pop(name, None)
        elif change == "metadata" and metadata:
            value = st.one_of(st.binary(max_size=20), st.sampled_from((b"{}", b"[]", b"0")))
            metadata[draw(st.sampled_from(sorted(metadata)))] = draw(value)
        elif change == "no rows":
            columns = {name: [] for name in columns}
        elif columns.get(name):
            values = columns[name]
            other = (
                draw(st.lists(trees, min_size=len(values), max_size=len(values)))
                if change == "column"
                else list(values)
            )
            other[draw(st.integers(0, len(values) - 1))] = draw(trees)
            columns[name] = other
        if change == "add":
            columns[draw(st.text(max_size=8))] = [draw(trees)] * len(next(iter(columns.values()), []))
    arrays = {name: array for name, values in columns.items() if (array := _array(values)) is not None}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays).replace_schema_metadata(metadata), sink)
    return sink.getvalue().to_pybytes()


def _array(values: list[Any]) -> pa.Array | None:
    try:
        array = pa.array(values)
        pq.write_table(pa.table({"x": array}), pa.BufferOutputStream())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        return None  # what no program can have written
    return array


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of packed images."""
    folder = tmp_path_factory.mktemp("images")
    packed(make_tree(folder / "tree", per_class=4), folder / "shards")
    return folder / "shards"


@fuzzed
@given(draws=st.data())
def test_manifests(draws: st.DataObject, shards: Path) -> None:
    path = shards / "manifest.json"
    valid = path.read_bytes()
    damaged = draws.draw(st.one_of(damaged_trees(json.loads(valid)).map(_json), damaged_bytes(valid)))
    with replaced(path, damaged), untouched(shards):
        code = run(data.main, ["check", str(shards)])
        try:
            images = Shards(str(shards))
            assert len(images.read(range(len(images)), capacity=1)) == len(images.labels_N) == len(images)
        except DataError:
            assert code == 2, "checked, and cannot be read"


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", ".hidden", "a/b"])
def test_a_manifest_does_not_lead_out_of_its_folder(name: str, shards: Path) -> None:
    path = shards / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["shards"][0]["name"] = name
    with replaced(path, _json(manifest)), pytest.raises(DataError, match="expected a plain name"):
        read_manifest(StoredFolder(str(shards)))


# --- latency tables ---------------------------------------------------------------------------------------------------


@cache
def _graph() -> gator.ChannelGraph:
    network = build(ModelConfig(name="resnet8_cifar", num_classes=10, kwargs={"width": 4}))
    return gator.trace(network, torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def latency_table(module_patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Return the file of a complete table of a small network, whose graph is traced once for all cases."""
    from gator.latency.measurement import Conditions
    from gator.latency.table import LatencyTable, NetworkTime, OpTime

    texts = {
        "device": "cpu",
        "device_type": "cpu",
        "driver": None,
        "dtype": "float32",
        "layout": "contiguous",
        "allocator": "",
    }
    numbers = {"batch_size": 1, "num_threads": 1, "is_folded": False}
    table = LatencyTable(Conditions(**texts, **numbers, runtime="eager", versions={"torch": "2"}))
    while points := table.missing(_graph()):
        times = {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.1, "n": 5}
        table = table.with_ops(
            OpTime(kind=kind, num_in=i, num_out=o, **times | {"median_ms": 1.0 + i + o}) for kind, i, o in points
        )
    full = gator.Architecture.full(_graph()).widths
    networks = [
        NetworkTime(
            fingerprint=_graph().fingerprint,
            input_shape=(3, 8, 8),
            widths={name: max(1, width // part) for name, width in full.items()},
            median_ms=10.0 / part,
            p10_ms=1.0,
            p90_ms=20.0,
            n=5,
        )
        for part in range(1, 14)
    ]
    path = folder / "table.parquet"
    write_table(path, table.with_networks(networks))
    assert read_table(path).ops
    module_patch.setattr(gator, "trace", lambda *arguments, **settings: _graph())
    return path


@fuzzed
@given(draws=st.data())
def test_latency_tables(draws: st.DataObject, latency_table: Path) -> None:
    damaged = st.one_of(damaged_tables(latency_table), damaged_bytes(latency_table.read_bytes()))
    with replaced(latency_table, draws.draw(damaged)), untouched(latency_table.parent):
        run(
            describe.main,
            ["resnet8_cifar", "--kwargs", "width=4", "--image-size", "8", "--latency", str(latency_table)],
        )


def test_the_undamaged_is_accepted(finished: RunPaths, latency_table: Path) -> None:
    """Or the cases above would show nothing."""
    assert run(search.main, ["digits", "--dry-run"]) == 0
    assert run(report.main, [str(finished.root), "--format", "html"]) == 0
    argv = ["resnet8_cifar", "--kwargs", "width=4", "--image-size", "8", "--latency", str(latency_table)]
    assert run(describe.main, argv) == 0
    with tempfile.TemporaryDirectory() as empty:
        assert run(report.main, [empty]) == 2
