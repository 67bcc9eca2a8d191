"""The reproduction on Fashion-MNIST, at settings so small that a cell takes a second."""

from pathlib import Path

import pytest

import gator
from benchmarks import lab, reproduce_fashion_mnist
from benchmarks.row_file import RowFile
from orchestrator.config.trial import TrialConfig
from tests.orchestrator.tiny_trial import tiny


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make all cells small, and let them write to an empty folder."""

    def make_config(seed: int) -> TrialConfig:
        return tiny(seed=seed, gating__target_ratio=None)

    monkeypatch.setattr(reproduce_fashion_mnist, "make_config", make_config)
    monkeypatch.setattr(reproduce_fashion_mnist, "RATIOS", (0.6, 0.3))
    monkeypatch.setattr(lab, "CACHE", tmp_path / "base")
    for name, value in {
        "CACHE": tmp_path / "links",
        "ROWS": RowFile(tmp_path / "rows.jsonl"),
        "TABLE": tmp_path / "table.md",
        "PICTURE": tmp_path / "picture.png",
    }.items():
        monkeypatch.setattr(reproduce_fashion_mnist, name, value)
    return tmp_path


@pytest.mark.slow
def test_cells_are_filled_once_and_drawn(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce_fashion_mnist.main(["--all", "--render"])
    rows = reproduce_fashion_mnist.ROWS.read()
    assert set(rows) == {f"{method}:{ratio}:0" for method in ("chain", "uniform", "random") for ratio in (0.6, 0.3)}
    for row in rows.values():
        assert row["macs"] <= 1.05 * row["ratio"] * row["unpruned_macs"]  # one of four channels is no small step
    # two epochs of gating a link, two of fine-tuning; the plain choices train as long
    assert [rows[f"{method}:0.3:0"]["epochs"] for method in ("chain", "random")] == [6, 6]

    first, second = (next((small / "links").glob(f"{ratio}-*")) for ratio in (0.6, 0.3))
    kept, later = (gator.Architecture.load(folder / "architecture.json").keep for folder in (first, second))
    assert all(set(later[name]) <= set(kept[name]) for name in kept)  # what a link closed stays closed

    assert (small / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (small / "table.md").read_text().count("(n = 1)") == len(rows)
    capsys.readouterr()
    reproduce_fashion_mnist.main(["--all"])
    assert "top1" not in capsys.readouterr().out  # nothing was left to do
