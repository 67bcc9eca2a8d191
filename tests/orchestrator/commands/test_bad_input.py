"""What people mistype and what disks spoil is one message of ours: never a library's traceback, never a hang, nothing written."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import gator
from orchestrator import describe, export, report, search, train
from orchestrator.cli import run_command
from orchestrator.config.cluster import ClusterConfig, load_cluster
from orchestrator.config.trial import ModelConfig
from orchestrator.config.yaml_files import MAX_DEPTH, apply_overrides, load_yaml, read_extended
from orchestrator.errors import ConfigError, LatencyTableError, RunDirError, TrackingError
from orchestrator.latency.curve import Curve
from orchestrator.models import networks
from orchestrator.models.networks import check, count_macs
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths, TrainPaths
from orchestrator.storage.records import append_result, read_results
from orchestrator.tracking.replay import recorded_trial
from orchestrator.tracking.tracker import Tracker
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.trial.fixed_networks import architecture_of
from orchestrator.trial.train_runs import TrainRuns
from orchestrator.tuning.report_log import ReportLog
from tests.orchestrator import planted

DEEP = "[" * 100_000
DEEP_JSON = (DEEP + "]" * 100_000).encode()

# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!int x", "a value is not what its tag or its digits say"),
        ('!!float ""', "a value is not what its tag or its digits say"),
        ("!!bool x", "a value is not what its tag or its digits say"),
        ("!!timestamp 2024-11-28", "line 1: could not determine a constructor for the tag .*timestamp"),
        ("a: 1\nb: !!set {x}", "line 2: could not determine a constructor for the tag .*set"),
        ("0b_", "invalid literal"),
        ("9" * 5000, "4300 digits"),
        ("0x" + "f" * 5000, "4300 digits"),
        (DEEP, f"line 1: nested deeper than {MAX_DEPTH} levels"),
        ("{a: " * 3000, f"line 1: nested deeper than {MAX_DEPTH} levels"),
        ("a: &x [1]\nb: *x", r"line 2: found \*x, expected the value itself"),
    ],
    ids=["int", "float", "bool", "date", "set", "binary", "digits", "hexadecimal", "lists", "mappings", "alias"],
)
def test_yaml_that_says_more_than_json_is_one_message(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^here: .*{message}"):
        load_yaml(text, "here")
    with pytest.raises(ConfigError, match=message):
        apply_overrides({}, [f"name={text}"])
    (tmp_path / "file.yaml").write_text(text if text.startswith("a:") else f"name: {text}")
    for read in (lambda file: load_cluster(str(file)), lambda file: read_extended(file, "space")):
        with pytest.raises(ConfigError, match=message.replace("line 1", "line [12]")):
            read(tmp_path / "file.yaml")
    with pytest.raises(SystemExit, match="2"):
        describe.main(["resnet20_cifar", "--kwargs", f"width={text}"])


def test_a_date_is_its_text() -> None:
    assert load_yaml("{name: 2024-11-28, other: 2024-13-45}", "") == {"name": "2024-11-28", "other": "2024-13-45"}


@pytest.mark.timeout(10)
def test_a_dotted_key_has_so_many_parts() -> None:
    with pytest.raises(ConfigError, match=f"found a key of 3000 parts, expected at most {MAX_DEPTH}"):
        apply_overrides({}, [".".join("a" * 3000) + "=1"])


def test_a_space_that_extends_no_possible_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(f"extends: {'x' * 300}")
    with pytest.raises(ConfigError, match=r"extends: .* not found"):
        read_extended(tmp_path / "space.yaml", "space")


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mobilenet_v2", {"round_nearest": 0}, "cannot be built with .*ZeroDivisionError"),
        ("vit_b_16", {"image_size": 225}, "cannot be built with .*AssertionError: Input shape indivisible"),
        ("..a:b", {}, "cannot be imported as package.module:function: TypeError"),
    ],
)
def test_a_network_that_cannot_be_made_is_one_message(name: str, kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(ModelConfig(name=name, num_classes=10, kwargs=kwargs))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("alexnet", 8, "alexnet takes no images of 8 pixels per side: RuntimeError"),
        ("resnet8_cifar", 10**10, "found 10000000000 pixels per side, for which no image can be created"),
        ("resnet8_cifar", 10**30, "for which no image can be created: TypeError"),
    ],
)
def test_an_image_size_that_does_not_fit_is_one_message(name: str, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        count_macs(ModelConfig(name=name, num_classes=10), size)
    assert describe.main([name, "--image-size", str(size)]) == 2


@pytest.mark.parametrize("main", [search.main, train.main], ids=["search", "train"])
def test_a_network_that_gator_prunes_wrongly_is_one_message_before_ray_starts(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        """Find what a defect of gator would leave."""
        raise gator.VerificationError("CifarResNet: when channels of group 'conv' are removed, the networks differ")

    monkeypatch.setattr("gator.checking.traced.verify_graph", fail)
    monkeypatch.setattr("ray.init", lambda *args, **kwargs: pytest.fail("Ray has started"))
    networks._verify.cache_clear()
    assert main(["digits", "--run-dir", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "when channels of group 'conv' are removed, the networks differ" in last


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [search.main, train.main], ids=["search", "train"])
@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "proc", "lock"])
def test_a_run_directory_that_cannot_be_one_is_one_message(
    main: Callable[[list[str]], int], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path("/proc/x") if kind == "proc" else tmp_path / kind
    if kind == "file":
        place.write_text("")
    elif kind == "lock":
        for name in ("digits", "digits-train"):
            (place / name / ".lock").mkdir(parents=True)
    elif kind != "proc":
        place.symlink_to(tmp_path / "nowhere" / "x" if kind == "dangling" else place)
    before = sorted(tmp_path.rglob("*"))
    assert main(["digits", "--run-dir", str(place)]) == 2
    assert "cannot be a run directory" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """Return a run directory with one finished trial that has no weights."""
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, planted.search_config(), [planted.unpruned(), planted.finished(0, 97.0, 2.0)])
    return run


@pytest.mark.parametrize("name", ["report", "front_png", "pareto"])
def test_a_folder_in_the_place_of_a_report_is_told_and_nothing_written(
    name: str, run: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.reporting.page.front_png", lambda *arguments: b"")  # drawing takes a second
    getattr(run, name).mkdir()
    before = sorted(run.root.iterdir())
    assert report.main([str(run.root), "--format", "html"]) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err
    assert sorted(run.root.iterdir()) == before


def test_report_and_export_tell_what_the_system_says_of_a_path(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["x" * 5000]) == 1
    assert "File name too long" in capsys.readouterr().err
    options = [str(run.root), "--trial", "trial_0000", "--format", "pt2", "--out"]
    assert export.main([*options, f"{'x' * 300}.pt2"]) == 1
    assert "File name too long" in capsys.readouterr().err
    (run.root / "folder.pt2").mkdir()
    assert export.main([*options, str(run.root / "folder.pt2")]) == 2
    assert "found a folder" in capsys.readouterr().err


def test_what_a_disk_says_needs_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run_command("report", [], lambda: write_atomic(tmp_path / "file" / "x", "") or 0) == 1
    assert "report: [Errno" in capsys.readouterr().err


def test_a_pipe_is_not_waited_for(run: RunPaths) -> None:
    run.results.unlink()
    os.mkfifo(run.results)
    with pytest.raises(RunDirError, match="missing or not a file"):
        read_results(run.results)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b'{"version": 1, "top', "is damaged"),
        (b"[]", "found a list, expected a mapping"),
        (b'{"version": 1, "top1": "x"}', "top1 is 'x', expected a number"),
        (b"\xff", "cannot be read"),
        (b'{"version": 99}', "version 99, this program reads version 1"),
        (b'{"top1": 97.0}', "version None, this program reads version 1"),
        (DEEP_JSON, "nested too deeply"),
    ],
    ids=["empty", "cut", "list", "text", "no-text", "version", "no-version", "deep"],
)
def test_a_damaged_result_of_a_training_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    result = TrainPaths(tmp_path).result
    result.write_bytes(content)
    with pytest.raises(RunDirError, match=message):
        train._read_result(result)


def test_a_changed_report_of_a_scheduler_is_told(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    ReportLog(path).append("trial_0000", {"epoch": 1, "top1": 97.0})
    whole = path.read_text()
    for old, new in (
        ('"epoch": 1', '"epoch": "1"'),
        ("97.0", "17.0"),
        ('"trial_0000"', "[1]"),
        ('"crc32": ', '"crc32": 1'),
    ):
        path.write_text(whole.replace(old, new))
        with pytest.raises(RunDirError, match="line 2 is damaged"):
            list(ReportLog(path).read())
    path.write_bytes(whole.encode() + DEEP_JSON + b"\n")
    with pytest.raises(RunDirError, match="line 3 is damaged"):
        list(ReportLog(path).read())


@pytest.mark.parametrize(
    "points",
    ["{}", '{"1": [[], []]}', '{"1": [["x"], [1]]}', '{"1": [[1, 2], [1]]}', '{"1": [[2, 1], [1, 2]]}', '{"1": [[1], [NaN]]}', DEEP],
    ids=["none", "empty", "text", "lengths", "falling", "nan", "deep"],
)  # fmt: skip
def test_a_curve_without_a_course_is_told(points: str) -> None:
    with pytest.raises(LatencyTableError, match="the latency curve is damaged"):
        Curve.from_json(f'{{"version": 1, "points": {points}}}')


@pytest.mark.parametrize(
    "channels", ['"x"', "1.5", "null", "[]", "true", DEEP, '{"a":' * 5000 + "1" + "}" * 5000],
    ids=["text", "fraction", "null", "list", "true", "deep", "deep-mapping"],
)  # fmt: skip
def test_widths_that_are_no_numbers_are_told(channels: str, tmp_path: Path) -> None:
    file = tmp_path / "widths.json"
    for content in (f'{{"channels": {{"conv1": {channels}}}}}', f'{{"channels": {channels}}}'):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"widths\.json"):
            architecture_of(None, str(file))  # type: ignore[arg-type]  # the file is read first


def test_conditions_that_are_no_mapping_are_told(tmp_path: Path) -> None:
    for number, text in enumerate(("x", "[1]", DEEP)):
        path = tmp_path / f"{number}.parquet"
        append_result(path, planted.finished(0, 97.0, 2.0) | {"latency_conditions": text})
        with pytest.raises(RunDirError, match="latency_conditions holds other text than JSON mappings"):
            read_results(path)


def test_results_without_conditions_are_told(run: RunPaths) -> None:
    pq.write_table(pq.ParquetFile(run.results).read().drop_columns("latency_conditions"), run.results)
    with pytest.raises(RunDirError, match="column latency_conditions was found 0 times"):
        read_results(run.results)


def test_checkpoints_that_cannot_be_read_do_not_hold_up_the_search(tmp_path: Path) -> None:
    for number, content in enumerate((DEEP_JSON, b'{"version": 3, "world_size": 7}', b"[]")):
        folder = tmp_path / f"trial_{number:04d}" / "checkpoint_1"
        folder.mkdir(parents=True)
        (folder / "state.json").write_bytes(content)
    TrainRuns(tmp_path).check_world_size(2)
    with pytest.raises(Exception, match="is missing, cut short or changed"):
        Checkpoint.load(tmp_path / "trial_0000" / "checkpoint_1", "cpu")  # type: ignore[arg-type]


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"planted' OR '1'='1\n"], ids=["no-text", "empty", "other"])
def test_a_damaged_search_id_is_told(content: bytes, run: RunPaths) -> None:
    run.search_id.write_bytes(content)
    with pytest.raises(RunDirError, match=r"search_id .*delete it"):
        Tracker(None, "", "0", planted.search_config(), run, ClusterConfig())  # type: ignore[arg-type]  # the id is read first


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "uri",
    ["mssql://u:secret@host/db", "http://host:notaport", "http://[::1", "sqlite:////nowhere/x/y.db", "sqlite:///{}"],
)
def test_an_address_that_is_none_is_told_and_nothing_made(uri: str, tmp_path: Path) -> None:
    uri = uri.format(tmp_path)
    with pytest.raises(TrackingError) as refused:
        recorded_trial("5f0c", ClusterConfig(storage=str(tmp_path), mlflow_uri=uri))
    assert "secret" not in str(refused.value)
    if "nowhere" not in uri:
        cluster = ClusterConfig(mlflow_uri=uri)
        with pytest.raises(TrackingError):
            Tracker.open(planted.search_config(), RunPaths(tmp_path / "run"), StoragePaths(tmp_path), cluster)
    assert not list(tmp_path.iterdir())
    assert not Path("/nowhere").exists()


# --- terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [[], ["--format", "csv"], ["--best-under", "latency_ms=9"]], ids=["table", "csv", "best"]
)
def test_names_in_files_do_not_steer_the_terminal(
    options: list[str], run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    append_result(run.results, planted.finished(1, 98.0, 1.0) | {"\x1b]0;x\x07": "\x9b31m", "error": "\x1b[2J"})
    assert report.main([str(run.root), *options]) == 0
    printed = capsys.readouterr()
    assert r"\x1b]0;x\x07" in printed.out
    assert not {"\x1b", "\x07", "\x9b"} & set(printed.out + printed.err)


def test_messages_do_not_steer_the_terminal() -> None:
    assert str(RunDirError("a\nb \x1b[31m")) == "a\nb \\x1b[31m"
