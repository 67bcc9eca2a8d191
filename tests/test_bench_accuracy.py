"""The accuracy benchmark: its sides at settings so small that a cell takes seconds, its order, its locks."""

import multiprocessing
from pathlib import Path

import pytest

from benchmarks import bench_accuracy, lab
from benchmarks.bench_accuracy import CUT, FIRST, GRID, METHODS, Cell
from benchmarks.cells import Cells
from benchmarks.lab import Lab, count_macs
from benchmarks.row_file import RowFile, locked
from tests.orchestrator.tiny_trial import tiny


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_cuts_to_its_share_and_trains_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method.startswith("tp_"):
        pytest.importorskip("torch_pruning")
    monkeypatch.setattr(lab, "CACHE", tmp_path)
    small = Lab(tiny(gating__target_ratio=None, model__kwargs={"width": 8}, gating__epochs=8))
    network = CUT[method](small, 0.4, GRID[method][0])
    share = count_macs(network, small.splits.input_shape) / small.macs.full
    assert 0.3 < share < 0.46  # the nearer of two networks; of 8 channels one is no small step
    assert small.top1(small.finetune(network, 1)) > 0


def test_the_most_telling_cells_come_first_and_wait_for_their_learning_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_accuracy, "ROWS", rows := RowFile(tmp_path / "rows.jsonl"))
    assert {Cell.named(name).tuning is None for name in bench_accuracy.runnable()} == {False}  # nothing is chosen yet
    for place, cell in enumerate(bench_accuracy.tuning_cells("ours")):
        rows.write({"model": str(cell), "source": bench_accuracy.source(cell, {}), "validation_top1": 80 + place % 2})
    assert bench_accuracy.tuned("ours", rows.read()) == GRID["ours"][1]
    chosen = [cell for cell in map(Cell.named, bench_accuracy.runnable()) if cell.tuning is None]
    assert (chosen[0].ratio, chosen[1].ratio) == (0.15, 0.08)
    assert {cell.method for cell in chosen} == {"ours"} < set(FIRST)


def test_the_name_of_a_tuning_cell_says_what_is_tried() -> None:
    for cell in (cell for method in METHODS for cell in bench_accuracy.tuning_cells(method)):
        assert Cell.named(str(cell)) == cell


def _fill(path: Path) -> None:
    rows = RowFile(path)

    def measure(name: str) -> dict[str, str]:
        with open(path.with_suffix(".log"), "a") as log:
            log.write(f"{name}\n")
        return {"model": name, "source": "one"}

    names = [f"cell{number}" for number in range(20)]
    Cells(
        rows=rows, names=lambda _: names, source=lambda _: "one", measure=measure, line=str, render=lambda: None
    ).fill(1, 60)


def test_two_processes_share_the_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    processes = [multiprocessing.get_context("fork").Process(target=_fill, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(RowFile(path).read()) == sorted(path.with_suffix(".log").read_text().split())  # each once


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as first, locked(tmp_path / "lock", wait=False) as second:
        assert first
        assert not second
