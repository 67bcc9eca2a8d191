from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.report import main
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.paper import comparison_text, matches
from orchestrator.storage.paths import RunPaths
from tests.orchestrator import planted

NOWHERE = RunPaths(Path("nowhere"))


def outcome(model: str, *rows: dict[str, object]) -> Outcome:
    config = planted.search_config()
    base = config.base.model_copy(update={"model": config.base.model.model_copy(update={"name": model})})
    found = (planted.unpruned(), *rows)
    return Outcome(config.model_copy(update={"base": base}), found)


def test_trial_is_compared_with_the_row_of_equal_macs() -> None:
    near = planted.finished(0, top1=97.0, latency_ms=2.0, macs_ratio=0.51)
    far = planted.finished(1, top1=97.5, latency_ms=2.0, macs_ratio=0.97)
    found = {match.method: match for match in matches(outcome("resnet50", near, far), NOWHERE)}
    half = found["GATOR FLOPs 0.5"]  # 49.91 % removed, 75.19 of 76.00
    assert (half.trial, half.paper_ratio) == (near, pytest.approx(0.5009))
    assert half.paper_diff == pytest.approx(-0.81)
    assert half.diff == pytest.approx(-1.0)
    assert found["GATOR FLOPs 4"].trial is None
    assert "Mobilenet V2" not in found  # not the paper's own


def test_text_says_what_differs_in_the_recipe() -> None:
    text = comparison_text(outcome("resnet56_cifar", planted.finished(0, 93.0, 2.0, macs_ratio=0.45)), NOWHERE)
    (line,) = [line for line in text.splitlines() if line.startswith("Gator flops 2 ")]
    assert line.split()[-1] == "-4.51"  # -5.00 here, -0.49 there
    assert "recipe: data.name is digits here, cifar10 in the paper" in text
    assert "recipe: each trial starts from the unpruned network here" in text
    assert "gating.momentum" not in text  # 0.9 on both sides
    assert "recipe: gating.lr is 0.1 here, 0.01 in the paper" in text


def test_rows_under_the_same_pressure_come_first_and_doubtful_counts_are_marked() -> None:
    lines = comparison_text(
        outcome("resnet56_cifar", planted.finished(0, 93.0, 2.0, macs_ratio=0.45)), NOWHERE
    ).splitlines()
    gap = lines.index("")
    above, below = (
        {line.split("  ")[0] for line in part} for part in (lines[1:gap], lines[gap + 1 : lines.index("", gap + 1)])
    )
    assert {"Gator flops 4", "Gator flops direct 4"} <= above
    assert below == {"Gator memory 0.25", "Gator memory 0.5", "Gator memory 1", "Gator memory 2", "Gator memory 4"}
    (doubtful,) = [line for line in lines if line.startswith("Gator memory 2")]
    assert "0.240?" in doubtful
    assert any(line.startswith("?: ") for line in lines)


def test_model_without_a_table_is_told() -> None:
    with pytest.raises(UserError, match="no table for resnet20_cifar; it has resnet50, resnet56_cifar"):
        matches(outcome("resnet20_cifar"), NOWHERE)


def test_verb_prints_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunPaths(tmp_path / "planted")
    halved = planted.finished(0, top1=97.0, latency_ms=2.0, macs_ratio=0.51)
    mobile = planted.finished(1, top1=72.0, latency_ms=1.0) | {"trial_id": "mobilenet_v2", "kind": "reference"}
    config = outcome("resnet50").config
    profile = config.base.profile.model_copy(update={"batch_sizes": (8, 32)})
    config = config.model_copy(update={"base": config.base.model_copy(update={"profile": profile})})
    planted.plant(run, config, [planted.unpruned(), halved, mobile])
    assert main([str(run.root), "--against", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("GATOR FLOPs 0.5 ")]
    # diff there -0.81, here -1.00; the planted trials gate at weight 1
    assert row[-6:] == ["trial_0000", "0.510", "1", "97.00", "-1.00", "-0.19"]
    (network,) = [line.split() for line in lines if line.startswith("mobilenet_v2")]
    # the paper's 14.16 / 6.17 and 49.82 / 20.76 ms; here 4.0 / 1.0, and nothing at batch size 32
    assert network[1:] == ["71.87", "2.30x", "2.40x", "72.00", "4.00x", "-"]
