"""`orchestrator data pack`: bytes untouched, resumed, damaged images named, damaged shards found."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator import data
from orchestrator.datasets.shards import SCHEMA, Shards, read_manifest, record_of, verify
from orchestrator.datasets.store import Store
from orchestrator.errors import DataError
from orchestrator.packing import ShardTask
from tests.orchestrator.packed import CLASSES, counting, make_tree, packed
from tests.orchestrator.servers import free_port


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in sorted(folder.glob("shard-*")) for row in pq.ParquetFile(shard).read().to_pylist()]


def truncate(path: Path, *, by: int = 0) -> None:
    path.write_bytes(path.read_bytes()[: -by or len(path.read_bytes()) // 2])


def test_shards_hold_every_file_as_it_is(tree: Path, tmp_path: Path) -> None:
    manifest = packed(tree, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert {row["key"]: row["image"] for row in found} == {
        path.relative_to(tree).as_posix(): path.read_bytes() for path in tree.glob("*/*")
    }
    for row in found:
        assert CLASSES[row["label"]] == row["key"].partition("/")[0]
        assert (row["width"], row["height"]) == Image.open(tree / row["key"]).size
    assert [shard.num_images for shard in manifest.shards] == [16, 16, 16, 12]  # 60 images
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"n01": 0, "n02": 1, "n03": 2}


def test_images_are_shuffled_and_lie_in_small_row_groups(tree: Path, tmp_path: Path) -> None:
    packed(tree, tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out" / "shard-00000.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4, 4, 4, 4]
    assert len({row["label"] for row in file.read().to_pylist()}) == 3


def test_index_and_manifest_agree_with_the_shards(tree: Path, tmp_path: Path) -> None:
    manifest = packed(tree, tmp_path / "out")
    store = Store(str(tmp_path / "out"))
    assert read_manifest(store) == manifest
    for shard in manifest.shards:
        verify(store, manifest, shard.name)
    index = pq.ParquetFile(tmp_path / "out" / "index.parquet").read().to_pylist()
    assert index == [
        {name: row[name] for name in ("label", "key", "width", "height")} for row in rows(tmp_path / "out")
    ]


def test_packing_that_was_broken_off_writes_only_what_is_missing(tree: Path, tmp_path: Path) -> None:
    class Lost(Exception):
        pass

    def breaks_off(function: Any, tasks: list[ShardTask]) -> Any:
        yield function(tasks[0])
        yield function(tasks[2])
        raise Lost

    with pytest.raises(Lost):
        packed(tree, tmp_path / "out", run=breaks_off)
    assert not (tmp_path / "out" / "manifest.json").exists()
    calls: list[str] = []
    manifest = packed(tree, tmp_path / "out", run=counting(calls))
    assert calls == ["shard-00001.parquet", "shard-00003.parquet"]
    assert manifest == packed(tree, tmp_path / "whole")
    assert not (tmp_path / "out" / "records").exists()
    packed(tree, tmp_path / "out", run=lambda function, tasks: pytest.fail("Ray was started for nothing"))


def test_other_images_do_not_overwrite_what_is_packed(tree: Path, tmp_path: Path) -> None:
    packed(tree, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    next(tree.glob("n01/*")).unlink()
    with pytest.raises(DataError, match=r"shards of other images.*nothing was changed"):
        packed(tree, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.fixture
def damaged(tree: Path) -> Path:
    """The tree with three files that cannot be decoded: cut off by 40 bytes, empty, and no image at all."""
    truncate(tree / "n01" / "n01_3.JPEG", by=40)
    (tree / "n02" / "n02_4.JPEG").write_bytes(b"")
    (tree / "n03" / "n03_5.JPEG").write_bytes(b"not an image at all")
    return tree


DAMAGED = ["n01/n01_3.JPEG", "n02/n02_4.JPEG", "n03/n03_5.JPEG"]


def test_damaged_images_are_refused_by_name_and_the_other_shards_kept(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 images cannot be decoded; repair them, or .* --on-error skip") as refused:
        packed(damaged, tmp_path / "out")
    assert all(f"{damaged}/{name}: " in str(refused.value) for name in DAMAGED)
    assert not (tmp_path / "out" / "manifest.json").exists()
    calls: list[str] = []
    packed(damaged, tmp_path / "out", on_error="skip", run=counting(calls))
    assert 0 < len(calls) < 4  # of four shards, those that have no damaged image were kept


def test_damaged_images_are_skipped_and_listed(damaged: Path, tmp_path: Path) -> None:
    manifest = packed(damaged, tmp_path / "out", on_error="skip")
    assert sorted(image.key for image in manifest.skipped) == DAMAGED
    assert {row["key"] for row in rows(tmp_path / "out")} == {
        path.relative_to(damaged).as_posix() for path in damaged.glob("*/*")
    } - set(DAMAGED)
    assert len(Shards(str(tmp_path / "out"))) == manifest.num_images == 57


def test_empty_class_and_missing_classes_are_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "n04").mkdir()
    with pytest.raises(DataError, match="n04: found no image, expected at least one"):
        packed(tree, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no class folders, expected ImageNet's layout"):
        packed(tmp_path / "empty", tmp_path / "out")


def test_node_that_does_not_see_the_images_is_named(tree: Path, tmp_path: Path) -> None:
    def elsewhere(function: Any, tasks: list[ShardTask]) -> Any:
        tree.rename(tmp_path / "moved")
        return map(function, tasks)

    with pytest.raises(DataError, match=r"node \S+ does not see .*tree; the images have to lie in a folder that every"):
        packed(tree, tmp_path / "out", run=elsewhere)


@pytest.fixture
def out(tree: Path, tmp_path: Path) -> Path:
    packed(tree, tmp_path / "out")
    return tmp_path / "out"


def test_truncated_shard_is_named_before_anything_is_read(out: Path) -> None:
    truncate(out / "shard-00002.parquet")
    with pytest.raises(DataError, match=r"shard-00002\.parquet has \d+ bytes, the manifest says \d+"):
        Shards(str(out))
    (out / "shard-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-00002\.parquet is missing, the manifest says"):
        Shards(str(out))


def test_shard_that_was_removed_is_packed_again(tree: Path, out: Path) -> None:
    before = (out / "shard-00002.parquet").read_bytes()
    (out / "shard-00002.parquet").unlink()
    calls: list[str] = []
    packed(tree, out, run=counting(calls))
    assert calls == ["shard-00002.parquet"]
    assert (out / "shard-00002.parquet").read_bytes() == before


def change_manifest(out: Path, shard: int, content: bytes) -> None:
    """Write another content of a shard, and a manifest that has its size and checksum."""
    manifest = json.loads((out / "manifest.json").read_text())
    name = manifest["shards"][shard]["name"]
    (out / name).write_bytes(content)
    manifest["shards"][shard] |= record_of(content).model_dump()
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(["key"]), r"shard-00001\.parquet: found the columns .*expected .*'key'"),
        (lambda table: table.slice(0, 12), r"shard-00001\.parquet: found 12 images in 1 row groups.* says 16 in 4"),
    ],
    ids=["schema", "rows"],
)
def test_shard_of_another_kind_is_named_when_it_is_read(out: Path, change: Any, message: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(change(pq.ParquetFile(out / "shard-00001.parquet").read()), sink)
    change_manifest(out, 1, sink.getvalue().to_pybytes())
    with pytest.raises(DataError, match=message):
        Shards(str(out)).read(list(range(60)), capacity=2)


def test_shard_that_lost_its_end_is_named_when_it_is_read(out: Path) -> None:
    change_manifest(out, 0, (out / "shard-00000.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard-00000\.parquet is damaged or truncated"):
        Shards(str(out)).read([0], capacity=2)


def test_checksum_that_disagrees_is_found_by_check(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["check", str(out)]) == 0
    content = bytearray((out / "shard-00003.parquet").read_bytes())
    content[200] ^= 1  # in the middle of an image: same size, and Parquet does not notice
    (out / "shard-00003.parquet").write_bytes(content)
    assert data.main(["check", str(out)]) == 2
    said = capsys.readouterr()
    assert "60 images in 4 shards, all as the manifest says" in said.out
    assert "1 of 6 files are damaged" in said.err
    assert "shard-00003.parquet: found" in said.err


def test_index_whose_checksum_disagrees_is_refused(out: Path) -> None:
    (out / "classes.json").write_bytes((out / "classes.json").read_bytes().replace(b"n02", b"n99"))
    with pytest.raises(DataError, match=r"classes\.json: found 39 bytes with SHA-256 .* the manifest says 39"):
        Shards(str(out))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"manifest\.json is missing; expected a folder written by `python -m orchestrator.data pack`"),
        ("{", r"manifest\.json is damaged"),
        ('{"version": 2}', r"manifest\.json has version 2, this program reads 1"),
        ('{"version": 1}', r"manifest\.json is damaged"),
    ],
    ids=["missing", "no-json", "version", "fields"],
)
def test_manifest_that_does_not_serve_is_refused(out: Path, content: str | None, message: str) -> None:
    (out / "manifest.json").unlink()
    if content is not None:
        (out / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Shards(str(out))


def test_schema_names_the_promised_columns() -> None:
    assert SCHEMA.names == ["image", "label", "key", "width", "height"]


def test_google_storage_that_does_not_answer_is_named() -> None:
    nobody = f"endpoint_override=127.0.0.1:{free_port()}&scheme=http&retry_limit_seconds=0.1"
    store = Store(f"gs://anonymous@bucket/imagenet/train?{nobody}")
    assert not store.is_local
    with pytest.raises(DataError, match=r"^gs://bucket/imagenet/train/manifest\.json cannot be read \(.*connect"):
        store.read("manifest.json")


def test_command_packs_on_ray(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["pack", str(tree), str(tmp_path / "out"), "--images-per-shard", "30", "--rows-per-group", "4"]
    assert data.main(command) == 0
    assert "60 images of 3 classes in 2 shards" in capfd.readouterr().out
    assert len(Shards(str(tmp_path / "out"))) == 60


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [("nowhere", 2, "there is no such folder"), ("tree", 2, "found no class folders")],
)
def test_command_tells_the_users_mistake(
    source: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tree").mkdir()
    assert data.main(["pack", str(tmp_path / source), str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err
