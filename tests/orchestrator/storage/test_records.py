import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.errors import RunDirError
from orchestrator.storage.records import (
    append_result,
    latency_columns,
    read_metrics,
    read_results,
    searched_params,
    update_results,
    write_metrics,
)


def finished(trial_id: str, **more: object) -> dict[str, object]:
    return {"trial_id": trial_id, "kind": "trial", "status": "finished", "top1": 97.5, "macs": 1000, **more}


def epoch_row(epoch: int, **more: object) -> dict[str, object]:
    return {"epoch": epoch, "stage": "gate", "timestamp_ms": 1_700_000_000_000 + epoch, **more}


def test_columns_stand_in_the_documented_order(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    append_result(
        path,
        finished(
            "trial_0000",
            **{"gating.loss_weight": 0.5, "latency_ms_b128": 9.0, "latency_ms_b32": 3.0, "latency_p10_ms_b32": 2.0},
        ),
    )
    assert pq.ParquetFile(path).schema_arrow.names == [
        "trial_id", "kind", "status", "stopped_epoch", "error", "top1", "top5", "latency_ms", "latency_ms_b32",
        "latency_p10_ms_b32", "latency_ms_b128", "latency_p10_ms", "latency_p90_ms", "latency_device", "latency_noisy",
        "latency_conditions", "macs", "macs_ratio", "params",
        "gating.loss_weight", "mlflow_run_id", "train_s", "eval_s", "measure_s",
    ]  # fmt: skip


def test_updated_rows_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    for number in range(3):
        append_result(path, finished(f"trial_{number:04d}", latency_ms=float(number)))
    update_results(path, [finished("trial_0001", latency_ms=7.0)])
    assert [(row["trial_id"], row["latency_ms"]) for row in read_results(path)] == [
        ("trial_0000", 0.0),
        ("trial_0001", 7.0),
        ("trial_0002", 2.0),
    ]


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    append_result(path, finished("trial_0000", **{"gating.lr": 0.1}))
    append_result(path, finished("trial_0001", **{"gating.lr": 0.2}))
    assert [(row["trial_id"], row["gating.lr"], row["macs"]) for row in read_results(path)] == [
        ("trial_0000", 0.1, 1000),
        ("trial_0001", 0.2, 1000),
    ]


def test_a_second_row_of_a_trial_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    append_result(path, finished("trial_0000", top1=1.0))
    append_result(path, finished("trial_0000", top1=2.0))
    assert [row["top1"] for row in read_results(path)] == [2.0]


def test_stopped_trial_has_nulls_and_keeps_integer_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    append_result(path, finished("trial_0000"))
    append_result(
        path, {"trial_id": "trial_0001", "kind": "trial", "status": "stopped", "stopped_epoch": 3, "top1": math.nan}
    )
    schema = pq.ParquetFile(path).schema_arrow
    assert schema.field("macs").type == pa.int64()
    assert schema.field("stopped_epoch").type == pa.int64()
    stopped = read_results(path)[1]
    assert (stopped["stopped_epoch"], stopped["top1"], stopped["macs"]) == (3, None, None)


def test_searched_params_that_only_later_rows_have_are_null_before(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    append_result(path, {"trial_id": "unpruned", "kind": "unpruned", "status": "finished"})
    append_result(path, finished("trial_0000", **{"gating.lr": 0.1}))
    rows = read_results(path)
    assert [row["gating.lr"] for row in rows] == [None, 0.1]
    assert searched_params(rows) == ["gating.lr"]


def test_choices_of_mixed_types_become_text_once(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    for number, value in enumerate([0.5, "auto", False, None]):
        append_result(path, finished(f"trial_{number:04d}", **{"model.kwargs.x": value}))
    assert [row["model.kwargs.x"] for row in read_results(path)] == ["0.5", "auto", "false", None]


def test_latency_columns_are_sorted_by_number() -> None:
    assert latency_columns([{"latency_ms_b128": 1.0, "latency_ms_b32": 1.0}]) == [
        "latency_ms",
        "latency_ms_b32",
        "latency_ms_b128",
    ]


def test_latency_that_no_epoch_has_measured_yet_is_read_back(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.parquet", [epoch_row(1, latency_ms_b4=None)])
    assert read_metrics(tmp_path / "metrics.parquet")[0]["latency_ms_b4"] is None


def test_metrics_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "metrics.parquet"
    write_metrics(path, [epoch_row(1, loss=2.5), epoch_row(2, final=True, latency_ms_b32=4.0)])
    first, last = read_metrics(path)
    assert (first["epoch"], first["loss"], first["final"]) == (1, 2.5, None)
    assert (last["final"], last["latency_ms_b32"], last["timestamp_ms"]) == (True, 4.0, 1_700_000_000_002)


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_results(tmp_path / "results.parquet") == []


def test_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    path.write_bytes(b"PAR1 half a file")
    with pytest.raises(RunDirError, match="cannot be read as Parquet"):
        read_results(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.parquet"
    pq.write_table(pa.table({"trial_id": ["trial_0000"]}).replace_schema_metadata({b"version": b"99"}), path)
    with pytest.raises(RunDirError, match="has version 99, this program reads version 1"):
        read_results(path)


def _written_by_somebody_else(path: Path, **columns: pa.Array | None) -> None:
    """Replace columns of a good results.parquet, or leave them out where the value is None."""
    append_result(path, finished("trial_0000", **{"gating.loss_weight": 0.5}))
    table = pq.ParquetFile(path).read()
    arrays = {name: table[name] for name in table.column_names} | columns
    changed = pa.table({name: array for name, array in arrays.items() if array is not None})
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"kind": None}, "column kind was found 0 times", id="a column is gone"),
        pytest.param({"top1": pa.array(["high"])}, "column top1 is string, expected double", id="another type"),
        pytest.param({"trial_id": pa.array([None], pa.string())}, "column trial_id lacks values", id="no value"),
        pytest.param({"status": pa.array(["great"])}, "found status 'great'", id="unknown status"),
        pytest.param({"gating.lr": pa.array([[1]])}, "gating.lr is list", id="parameter of an odd type"),
        pytest.param(
            {"error": pa.array([b"\xff"]).cast(pa.string(), safe=False)}, "utf-8", id="text that is not UTF-8"
        ),
    ],
)
def test_table_that_this_program_did_not_write_is_refused(
    columns: dict[str, pa.Array | None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.parquet"
    _written_by_somebody_else(path, **columns)
    with pytest.raises(RunDirError, match=message):
        read_results(path)


def test_flipped_bit_in_the_values_is_seen(tmp_path: Path) -> None:
    """By the checksum of the page: the file would still be Parquet, with another trial in it."""
    path = tmp_path / "results.parquet"
    append_result(path, finished("trial_0000"))
    content = path.read_bytes()
    assert content.count(b"trial_0000") >= 1
    path.write_bytes(content.replace(b"trial_0000", b"trial_0001", 1))
    with pytest.raises(RunDirError, match="cannot be read as Parquet"):
        read_results(path)
