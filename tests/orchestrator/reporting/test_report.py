import csv
import io
import json
import re
from pathlib import Path

import pytest

from orchestrator.report import main
from orchestrator.reporting.figures import front_figure
from orchestrator.reporting.outcome import Outcome, load_architectures
from orchestrator.reporting.page import write_report
from orchestrator.reporting.table import speedup_text, summary_text, table_cells, table_text
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths
from orchestrator.tracking.trial_run import _final_numbers
from tests.orchestrator import planted

TABLE = """\
   trial       status               top1  latency_ms  macs_ratio  params  top1_diff  speedup  gating.loss_weight
   unpruned    finished            98.00       4.000       1.000     500      +0.00    1.00x                   -
*  trial_0000  finished            97.00       2.000       0.400     200      -1.00    2.00x                 0.5
*  trial_0001  finished            90.00       1.000       0.250     125      -8.00    4.00x                 1.5
   trial_0003  finished            97.90       3.000       0.750     375      -0.10    1.33x                 3.5
   trial_0002  finished            89.00       1.500       0.400     200      -9.00    2.67x                 2.5
   trial_0004  stopped at epoch 2      -           -           -       -          -        -                 4.5
   trial_0005  failed                  -           -           -       -          -        -                 5.5"""


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, planted.search_config(), planted.all_rows())
    return run


def show(run: RunPaths, *arguments: str) -> int:
    return main([str(run.root), *arguments])


def test_table_is_plain_aligned_text_in_reading_order(run: RunPaths) -> None:
    outcome = Outcome.load(run)
    assert table_text(outcome) == TABLE


def test_verb_prints_the_table_and_what_is_best(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run) == 0
    out = capsys.readouterr().out
    assert "6 trials: 4 finished, 1 stopped early, 1 failed" in out
    assert "best top1 with macs_ratio <= 0.5: trial_0000: top1 97.00, latency_ms 2.000, macs_ratio 0.400" in out


def test_csv_holds_every_column_at_full_precision(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["trial_id"] for row in rows if row["on_front"] == "True"] == ["trial_0000", "trial_0001"]
    assert (rows[1]["latency_p10_ms"], rows[1]["gating.loss_weight"], rows[1]["train_s"]) == ("1.9", "0.5", "6.0")
    assert rows[-1]["top1"] == ""


def test_best_under_shows_one_network_beside_the_unpruned(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run, "--best-under", "latency_ms=1.6") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^.{3}(\w+)", out, flags=re.M)[:3] == ["trial", "unpruned", "trial_0001"]
    assert "best top1 with latency_ms <= 1.6: trial_0001" in out


def test_best_under_that_nothing_meets_exits_1(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run, "--best-under", "latency_ms=0.5") == 1
    assert "no finished trial has latency_ms <= 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--best-under", "latency=4"], "did you mean latency_ms", id="unknown metric"),
        pytest.param(["--best-under", "latency_ms=4", "--format", "html"], "table or csv", id="best under as a page"),
    ],
)
def test_arguments_that_do_not_fit_exit_2(
    run: RunPaths, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert show(run, *arguments) == 2
    assert message in capsys.readouterr().err


def test_limit_without_a_number_exits_2(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        show(run, "--best-under", "latency_ms")
    assert exit_info.value.code == 2
    assert "expected METRIC=LIMIT" in capsys.readouterr().err


def test_folder_that_is_no_run_directory_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a run directory: it has no search.json" in capsys.readouterr().err


def test_damaged_config_exits_2(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    write_atomic(run.config, "{")
    assert show(run) == 2
    assert "search.json" in capsys.readouterr().err


def test_search_without_results_yet_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, planted.search_config(), [])
    assert show(run) == 0
    assert "no trial has ended yet" in capsys.readouterr().out


def test_front_that_no_trial_reaches_is_explained_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, planted.search_config(), [planted.unpruned(), planted.finished(0, 97, 3, macs_ratio=0.75)])
    outcome = write_report(run)
    assert show(run) == 0
    message = "none of 1 finished trials meets the constraints (macs_ratio must be at most 0.5, the smallest is 0.75)"
    assert message in str(outcome.why_empty)
    assert message in capsys.readouterr().out
    assert message in run.report.read_text()
    assert (json.loads(run.pareto.read_text())["front"], json.loads(run.pareto.read_text())["hypervolume"]) == ([], 0.0)


def test_written_front_is_that_of_the_results(run: RunPaths) -> None:
    write_report(run)
    document = json.loads(run.pareto.read_text())
    assert [entry["trial_id"] for entry in document["front"]] == ["trial_0000", "trial_0001"]
    assert document["hypervolume"] == (97 - 10) * (4 - 2) + (90 - 10) * (2 - 1)
    assert run.front_png.read_bytes().startswith(b"\x89PNG")


def test_page_loads_nothing_from_elsewhere(run: RunPaths) -> None:
    write_report(run)
    page = run.report.read_text()
    assert "Plotly.newPlot" in page
    assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=", page) == []


def test_page_names_every_network_its_parameter_and_its_removed_blocks(run: RunPaths) -> None:
    write_report(run)
    page = run.report.read_text()
    body = page[page.rindex("<body>") :]
    for row in planted.all_rows():
        assert row["trial_id"] in body
    assert "trial_0001: removed layer1.0" in body
    assert "a test CPU" in body
    assert "load_trial(" in body


def test_page_escapes_what_it_shows(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "planted")
    row = planted.finished(0, 97, 2) | {"latency_device": "<b>cpu</b>"}
    planted.plant(run, planted.search_config(), [planted.unpruned(), row])
    write_report(run)
    assert "&lt;b&gt;cpu&lt;/b&gt;" in run.report.read_text()


def test_the_first_lines_of_the_page_say_what_to_deploy_and_how(run: RunPaths) -> None:
    run.trial("trial_0001").weights.write_bytes(bytes(65_000))
    write_report(run)
    first = run.report.read_text().partition('<div class="tiles">')[2].partition("Accuracy and cost")[0]
    assert first.count('class="tile"') == 3  # the unpruned network, and two on the front: one is the best balance too
    assert "-8.00 points, 4.00x as fast, 25 % of the MACs" in first
    assert "125 parameters, weights 65 kB" in first
    assert f"python -m orchestrator.export {run.root} --trial trial_0001 --format onnx" in first


def test_html_prints_where_the_page_lies(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run, "--format", "html") == 0
    assert Path(capsys.readouterr().out.strip()) == run.report
    assert run.report.is_file()


def test_held_out_accuracy_and_estimates_are_never_next_to_final_numbers() -> None:
    final = {"accuracy_split": "test", "latency_source": "measured"}
    last_epoch = {"top1": 99.5, "latency_ms": 0.5, "accuracy_split": "validation", "latency_source": "estimated"}
    rows = [
        planted.unpruned() | final,
        planted.finished(0, 97.0, 2.0) | final,
        planted.stopped(4, epoch=2) | last_epoch,
    ]
    outcome = Outcome(planted.search_config(), rows)
    header, *lines = ([cell for cell in line if cell] for line in table_cells(outcome))
    stopped = dict(zip(header, lines[-1], strict=True))
    shown = {name: stopped[name] for name in ("top1", "validation_top1", "latency_ms", "top1_diff", "speedup")}
    assert list(shown.values()) == ["-", "99.50", "~0.500", "-", "-"]
    points = {trace.name: list(trace.y) for trace in front_figure(outcome, {}).data}
    assert points == {"Pareto front": [97.0], "unpruned network": [98.0]}
    assert not {"top1", "latency_ms"} & set(_final_numbers(rows[-1]))


@pytest.mark.parametrize("other", ["A10G", "T4"])
def test_latencies_of_two_kinds_of_gpu_are_said_not_to_compare(other: str) -> None:
    rows = [
        planted.finished(number, 97, 2) | {"latency_source": "measured", "latency_device": device}
        for number, device in enumerate(["A10G", other])
    ]
    text = summary_text(Outcome(planted.search_config(), rows))
    assert ("latencies were measured on A10G and T4 and do not compare" in text) == (other == "T4")


def test_baselines_stand_in_the_table_and_the_picture_but_never_on_the_front() -> None:
    config = planted.search_config(baselines=["uniform"])
    best = planted.finished(7, top1=99.9, latency_ms=0.1) | {"trial_id": "uniform", "kind": "uniform"}
    outcome = Outcome(config, [*planted.all_rows(), best])
    _, *lines = table_cells(outcome)
    (line,) = [line for line in lines if line[1] == "uniform"]
    assert (line[0], line[3]) == ("", "99.90")  # no star
    figure = front_figure(outcome, {})
    points = {trace.name: list(trace.y) for trace in figure.data}
    assert points["plain baseline"] == [99.9]
    assert 99.9 not in points["Pareto front"]


def test_hovering_over_a_network_of_the_front_shows_its_widths(run: RunPaths) -> None:
    outcome = Outcome.load(run)
    figure = front_figure(outcome, load_architectures(outcome, run))
    (front,) = [trace for trace in figure.data if trace.name == "Pareto front"]
    hover = {text.partition("</b>")[0].removeprefix("<b>"): text for text in front.hovertext}
    assert hover["trial_0000"].endswith("<br>widths 6 4")
    assert hover["trial_0001"].endswith("<br>widths 6 0")


def test_name_of_a_search_stands_for_its_folder(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere" / "runs").mkdir(parents=True)
    run.root.rename(tmp_path / "elsewhere" / "runs" / "planted")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["planted"]) == 0
    assert "trial_0000" in capsys.readouterr().out


def test_importance_names_the_parameter_that_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {
        "gating.loss_weight": {"type": "float", "low": 0.1, "high": 40.0},
        "gating.schedule": {"type": "categorical", "choices": ["constant", "cosine"]},
    }
    rows = [
        planted.finished(number, 60.0 + number, 1.0) | {"gating.schedule": "constant" if number % 3 else "cosine"}
        for number in range(24)
    ]
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, planted.search_config(params=params), rows)
    assert show(run, "--importance") == 0
    printed = capsys.readouterr().out.strip()  # latency is the same for all and explains nothing
    assert re.fullmatch(r"top1: gating.loss_weight (9\d|100)%, gating.schedule \d%", printed), printed


@pytest.mark.parametrize(("name", "value"), [("gating.loss_weight", 99.0), ("gating.schedule", "linear")])
def test_importance_of_a_value_outside_its_domain_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    params = {
        "gating.loss_weight": {"type": "float", "low": 0.1, "high": 40.0},
        "gating.schedule": {"type": "categorical", "choices": ["constant", "cosine"]},
    }
    kinds = ["constant", "cosine"] * 2
    rows = [planted.finished(number, 60.0 + number, 1.0) | {"gating.schedule": kinds[number]} for number in range(4)]
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, planted.search_config(params=params), [*rows[:3], rows[3] | {name: value}])
    assert show(run, "--importance") == 2
    assert "trial_0003 has a value outside its domain in search.json" in capsys.readouterr().err


def test_importance_of_trials_that_are_alike_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four points to try first and no more, say: Optuna's forest has nothing to split."""
    params = {name: {"type": "float", "low": 0.1, "high": 40.0} for name in ("gating.loss_weight", "gating.lr")}
    run = RunPaths(tmp_path / "planted")
    rows = [planted.finished(number, 60.0 + number, 1.0) | {"gating.lr": 0.1} for number in range(6)]
    planted.plant(run, planted.search_config(params=params), rows)
    assert show(run, "--importance") == 1
    assert "differ in two searched parameters" in capsys.readouterr().err


def test_importance_of_too_few_trials_is_refused(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(run, "--importance") == 1
    assert "6 trials: 4 finished" in capsys.readouterr().err


def test_damaged_architecture_is_told_and_nothing_is_written(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    best = Outcome.load(run).front[0]["trial_id"]
    run.trial(best).architecture.write_text("{}")
    assert show(run, "--format", "html") == 2
    assert "not a gator.architecture file" in capsys.readouterr().err
    assert not any(path.exists() for path in (run.pareto, run.front_png, run.report))


def test_network_without_groups_has_no_widths_to_show(run: RunPaths) -> None:
    best = Outcome.load(run).front[0]["trial_id"]
    path = run.trial(best).architecture
    path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": {}}))
    assert load_architectures(write_report(run), run)[best].widths == {}


def conditions(fingerprint: str) -> str:
    return json.dumps({"runtime": "onnxruntime", "fingerprint": fingerprint})


@pytest.mark.parametrize(
    ("of_trial", "of_unpruned", "text"),
    [
        pytest.param(conditions("a"), conditions("a"), "2.00x", id="the same"),
        pytest.param(conditions("a"), conditions("b"), "-", id="others"),
        pytest.param(None, conditions("b"), "2.00x", id="an estimate"),
    ],
)
def test_latencies_of_other_conditions_are_not_compared(of_trial: str | None, of_unpruned: str, text: str) -> None:
    trial = {"latency_ms": 1.0, "latency_conditions": of_trial}
    unpruned = {"latency_ms": 2.0, "latency_conditions": of_unpruned}
    assert speedup_text(trial, unpruned) == text
