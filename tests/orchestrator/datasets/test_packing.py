"""`orchestrator data pack`: bytes untouched, resumed, damaged images named, damaged shards found."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

from orchestrator import data as data_data
from orchestrator.cluster import interrupts as data_interrupts
from orchestrator.cluster.processes import spread
from orchestrator.datasets.parquet.format import SCHEMA, Shards, read_manifest, record_of, verify
from orchestrator.datasets.parquet.packing import ShardTask
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.errors import ClusterError, DataError, OrchestratorError
from tests.orchestrator.packed import CLASSES, break_off, counting, make_tree, packed
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
    store = StoredFolder(str(tmp_path / "out"))
    assert read_manifest(store) == manifest
    for shard in manifest.shards:
        verify(store, manifest, shard.name)
    index = pq.ParquetFile(tmp_path / "out" / "index.parquet").read().to_pylist()
    assert index == [
        {name: row[name] for name in ("label", "key", "width", "height")} for row in rows(tmp_path / "out")
    ]


def test_packing_that_was_broken_off_writes_only_what_is_missing(tree: Path, tmp_path: Path) -> None:
    break_off(tree, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    calls: list[str] = []
    manifest = packed(tree, tmp_path / "out", run=counting(calls))
    assert calls == ["shard-00001.parquet", "shard-00003.parquet"]
    assert manifest == packed(tree, tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out" / ".pack").iterdir()] == ["lock"]
    packed(tree, tmp_path / "out", run=lambda function, tasks: pytest.fail("Ray was started for nothing"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_images_do_not_overwrite_what_is_packed(tree: Path, tmp_path: Path) -> None:
    packed(tree, tmp_path / "out")
    before = contents(tmp_path / "out")
    next(tree.glob("n01/*")).unlink()
    with pytest.raises(DataError, match=r"shards of other images.*nothing was changed"):
        packed(tree, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_images_do_not_overwrite_what_was_broken_off(tree: Path, tmp_path: Path) -> None:
    break_off(tree, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = make_tree(tmp_path / "other")  # of the very same names
    with pytest.raises(
        DataError, match=r"plan\.json: packing of other images.* was interrupted here; nothing was changed"
    ):
        packed(other, tmp_path / "out")
    with pytest.raises(DataError, match="interrupted here"):
        packed(tree, tmp_path / "out", rows_per_group=8)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["classes.json", "index.parquet", "shard-00003.parquet"])
def test_file_of_somebody_else_is_not_overwritten(name: str, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("somebody else's")
    with pytest.raises(DataError, match=rf"{name}: it would be overwritten, .*; nothing was changed"):
        packed(tree, tmp_path / "out")
    assert contents(tmp_path) == contents(tree) | {tmp_path / "out" / name: b"somebody else's"}


def test_what_else_lies_in_the_folder_stays(tree: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "out" / "records" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    (tmp_path / "out" / ".tmp.thesis.tex.01234567").write_text("years of work")
    (tmp_path / "out" / ".pack").mkdir()
    for leftover in (".tmp.shard-00001.parquet.01234567", ".pack/.tmp.plan.json.01234567"):  # a process was killed
        (tmp_path / "out" / leftover).write_bytes(b"half")
    packed(tree, tmp_path / "out")
    assert thesis.read_text() == "years of work"
    assert [path.name for path in (tmp_path / "out").rglob(".tmp.*")] == [".tmp.thesis.tex.01234567"]


@pytest.mark.parametrize("below", ["", "packed", "n01/packed"])
def test_shards_do_not_go_among_the_images(below: str, tree: Path) -> None:
    before = contents(tree)
    with pytest.raises(DataError, match=r"is inside the folder of images .*; name a folder outside of it"):
        packed(tree, tree / below)
    assert contents(tree) == before


def test_two_processes_do_not_pack_into_one_folder(tree: Path, tmp_path: Path) -> None:
    def meanwhile(function: Any, tasks: list[ShardTask]) -> Any:
        with pytest.raises(DataError, match=r"another process is using .*out; wait for it, or name another folder"):
            packed(tree, tmp_path / "out")
        return map(function, tasks)

    packed(tree, tmp_path / "out", run=meanwhile)


def test_address_of_a_local_folder_is_that_folder(tree: Path, tmp_path: Path) -> None:
    packed(tree, f"file://{tmp_path}/out")
    assert len(Shards(f"file://{tmp_path}/out")) == len(Shards(str(tmp_path / "out"))) == 60
    with pytest.raises(DataError, match="is inside the folder of images"):
        packed(tree, f"file://{tree}/out")


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


def test_damaged_image_that_is_repaired_goes_in_and_the_other_shards_are_kept(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="repair them"):
        packed(damaged, tmp_path / "out")
    for name in DAMAGED:
        (damaged / name).write_bytes((damaged / "n01" / "n01_0.JPEG").read_bytes())
    calls: list[str] = []
    assert packed(damaged, tmp_path / "out", run=counting(calls)).num_images == 60
    assert 0 < len(calls) < 4


def test_link_to_nowhere_is_an_image_that_cannot_be_decoded(tree: Path, tmp_path: Path) -> None:
    (tree / "n01" / "lost.JPEG").symlink_to(tree / "nowhere")
    with pytest.raises(DataError, match=r"1 images cannot be decoded.*\n.*n01/lost\.JPEG: .*No such file"):
        packed(tree, tmp_path / "out")
    assert packed(tree, tmp_path / "out", on_error="skip").num_images == 60


def test_image_at_which_pillow_stumbles_cannot_be_decoded(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(file: Any) -> None:
        raise TypeError("'bytes' object cannot be interpreted as an integer")  # seen with a damaged TIFF

    monkeypatch.setattr("PIL.Image.open", stumble)
    with pytest.raises(DataError, match="60 images cannot be decoded"):
        packed(tree, tmp_path / "out")


def test_class_without_an_image_is_told_and_none_at_all_refused(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in tree.glob("n02/*"):
        path.write_bytes(b"")
    assert packed(tree, tmp_path / "out", on_error="skip").num_images == 40
    assert [line for line in caplog.messages if line.startswith("class")] == [
        "class n02: none of its images can be decoded, so no network can learn it"
    ]
    for path in tree.glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 60 images can be decoded"):
        packed(tree, tmp_path / "none", on_error="skip")


def test_name_that_is_no_utf_8_is_named(tree: Path, tmp_path: Path) -> None:
    (tree / "n01" / os.fsdecode(b"caf\xe9.JPEG")).write_bytes(b"")
    with pytest.raises(DataError, match=r"the name 'n01/caf\\udce9\.JPEG' is not UTF-8.*; rename the file"):
        packed(tree, tmp_path / "out", on_error="skip")


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

    with pytest.raises(DataError, match=r"node \S+ does not see .*tree; the images must be in a folder that every"):
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


def test_shard_that_was_damaged_is_packed_again(tree: Path, out: Path) -> None:
    before = contents(out)
    (out / "shard-00000.parquet").write_bytes(bytes(len((out / "shard-00000.parquet").read_bytes())))
    flip_a_bit(out / "shard-00002.parquet")
    calls: list[str] = []
    packed(tree, out, run=counting(calls))
    assert calls == ["shard-00000.parquet", "shard-00002.parquet"]
    assert contents(out) == before


def flip_a_bit(shard: Path) -> None:
    """Flip one in the middle of the first image."""
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)


def test_flipped_bit_is_found_where_it_is_read(out: Path) -> None:
    flip_a_bit(out / "shard-00003.parquet")
    shards = Shards(str(out))
    shards.read(range(48), capacity=1)
    with pytest.raises(DataError, match=r"shard-00003\.parquet, groups \[0\]: cannot be read \(.*CRC"):
        shards.read([48], capacity=1)


def test_counts_that_disagree_are_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((out / "manifest.json").read_text())
    for num_images in (999, 61, 40):
        (out / "manifest.json").write_text(json.dumps(whole | {"num_images": num_images}))
        with pytest.raises(
            DataError, match=rf"manifest\.json: found {num_images} images, expected the 60 of all shards"
        ):
            Shards(str(out))
    (out / "manifest.json").write_text(json.dumps(whole | {"num_classes": 4}))
    with pytest.raises(DataError, match=r"classes\.json: found 3 classes, the manifest says 4"):
        Shards(str(out))
    assert data_data.main(["check", str(out)]) == 2
    assert "found 3 classes, the manifest says 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.parquet", lambda table: table.drop(["width"]), r"found the columns .*expected .*'width'"),
        ("index.parquet", lambda table: table.slice(0, 50), "found 50 images, the manifest says 60"),
        ("index.parquet", None, "is damaged"),
        ("classes.json", None, "is damaged"),
    ],
    ids=["columns", "rows", "no-parquet", "no-json"],
)
def test_index_that_is_none_is_refused_though_its_checksum_is_right(
    name: str, change: Any, message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"[" * 100_000
    if change is not None:
        sink = pa.BufferOutputStream()
        pq.write_table(change(pq.ParquetFile(out / name).read()), sink)
        content = sink.getvalue().to_pybytes()
    (out / name).write_bytes(content)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][name] = record_of(content).model_dump()
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"{name}:? {message}"):
        Shards(str(out))
    assert data_data.main(["check", str(out)]) == 2
    assert "1 of 6 files are damaged" in capsys.readouterr().err


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
    assert data_data.main(["check", str(out)]) == 0
    flip_a_bit(out / "shard-00003.parquet")
    assert data_data.main(["check", str(out)]) == 2
    said = capsys.readouterr()
    assert "60 images in 4 shards, all match the manifest" in said.out
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
        ("[" * 100_000, r"manifest\.json is damaged"),
        ('{"version": 1}', r"manifest\.json has version 1, this program reads 2"),
        ('{"version": 2}', r"manifest\.json is damaged"),
    ],
    ids=["missing", "no-json", "depth", "version", "fields"],
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
    store = StoredFolder(f"gs://anonymous@bucket/imagenet/train?{nobody}")
    assert not store.is_local
    with pytest.raises(DataError, match=r"^gs://bucket/imagenet/train/manifest\.json cannot be read \(.*connect"):
        store.read("manifest.json")


@pytest.mark.parametrize("address", ["s3://", "gs://"])
def test_address_without_a_bucket_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_data.main(["check", address]) == 2
    assert f"{address.rstrip('/')} cannot be listed" in capsys.readouterr().err


@pytest.mark.slow
def test_command_packs_on_ray(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["pack", str(tree), str(tmp_path / "out"), "--images-per-shard", "30", "--rows-per-group", "4"]
    assert data_data.main(command) == 0
    assert "60 images of 3 classes in 2 shards" in capfd.readouterr().out
    assert len(Shards(str(tmp_path / "out"))) == 60


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [("nowhere", 2, "folder not found"), ("tree", 2, "found no class folders")],
)
def test_command_tells_the_users_mistake(
    source: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tree").mkdir()
    assert data_data.main(["pack", str(tmp_path / source), str(tmp_path / "out")]) == code
    assert message in capsys.readouterr().err


def test_target_is_named_without_its_credentials(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = packed(tree, tmp_path / "out")
    monkeypatch.setattr("orchestrator.datasets.parquet.packing.pack", lambda *arguments, **options: manifest)
    assert data_data.main(["pack", str(tree), "s3://KEY:SECRET@bucket/train?region=eu-west-1"]) == 0
    assert capsys.readouterr().out.startswith("s3://bucket/train: 60 images of 3 classes")


def test_relative_target_lies_in_the_home_folder_inside_a_ray_job(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: list[str] = []

    def pack(source: Path, target: str, **options: Any) -> Any:
        targets.append(target)
        raise DataError("enough")

    monkeypatch.setattr("orchestrator.datasets.parquet.packing.pack", pack)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    data_data.main(["pack", str(tree), "out"])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for target in ("out", "~/out", "/shared/out"):
        data_data.main(["pack", str(tree), target])
    assert targets == [str(tmp_path / "out"), str(tmp_path / "home/out"), str(tmp_path / "home/out"), "/shared/out"]


def test_nodes_have_to_share_the_target(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(folder: Path, advice: str) -> None:
        raise ClusterError(f"{folder} is not the same folder on every node; {advice}")

    monkeypatch.setattr("orchestrator.cluster.connection.connect", lambda cluster: None)
    monkeypatch.setattr("orchestrator.cluster.connection.check_nodes_share", differs)
    monkeypatch.setattr(data_interrupts.Interrupts, "install", lambda self: None)
    assert data_data.main(["pack", str(tree), str(tmp_path / "out")]) == 2
    assert f"{tmp_path}/out is not the same folder on every node; name a folder that all" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [WorkerCrashedError(), NodeDiedError("node 10.0.0.2 died"), OutOfMemoryError("memory")]
)
def test_process_that_is_lost_is_told_in_a_message(error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(task: ShardTask) -> None:
        raise error

    monkeypatch.setattr("ray.remote", lambda **options: lambda function: SimpleNamespace(remote=lambda task: task))
    monkeypatch.setattr("ray.wait", lambda tasks: (tasks[:1], tasks[1:]))
    monkeypatch.setattr("ray.get", get)
    tasks = {f"shard-0000{number}.parquet": number for number in range(2)}
    with pytest.raises(
        OrchestratorError, match=rf"shard-00000\.parquet: .* was lost \({type(error).__name__}: .*resume"
    ):
        list(spread(lambda task: task, tasks))
