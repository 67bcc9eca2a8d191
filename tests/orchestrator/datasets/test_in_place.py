"""Data sets that are read where they are: the images of the source, in an order that resumes, and packed into equal shards."""

import gzip
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator import data as data_command
from orchestrator.config.trial import DataConfig
from orchestrator.datasets import splits
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.parquet.format import Shards
from orchestrator.datasets.parquet.sources import open_source
from orchestrator.datasets.stored import hf_parquet
from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.errors import DataError
from tests.orchestrator import in_place
from tests.orchestrator.packed import CLASSES, config, make_tree, packed

FORMATS = ("hf_parquet", "webdataset")
ADDRESSES = {
    "hf_parquet": "{root}/hf/{split}-*.parquet",
    "webdataset": "{root}/tars/{split}-*.tar",
    "image_folder": "{root}/files/{split}",
}


@pytest.fixture(autouse=True)
def index_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the indexes of tars are kept, in place of the home folder."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 and 30 images as files, as Parquet and as tars."""
    root = tmp_path_factory.mktemp("sources")
    for split, per_class in (("train", 20), ("val", 10)):
        tree = make_tree(root / "files" / split, per_class=per_class)
        in_place.write_hf(tree, root / "hf", split)
        in_place.write_tars(tree, root / "tars", split)
    return root


def config_of(name: str, root: Path, **fields: Any) -> DataConfig:
    train, val = (ADDRESSES[name].format(root=root, split=split) for split in ("train", "val"))
    return config(root, **{"name": name, "train": train, "test": val, **fields})


def loader(data: DataConfig, rank: int = 0, world_size: int = 1, workers: int = 0) -> TrainLoader:
    train = splits.load(data, seed=0).train
    return TrainLoader(
        train, global_batch_size=12, seed=1, rank=rank, world_size=world_size, num_loader_workers=workers
    )


def shown(images: Any) -> list[tuple[int, bytes]]:
    """Return the label and the pixels of each image."""
    return [(int(label), image.numpy().tobytes()) for image, label in (images[index] for index in range(len(images)))]


@pytest.mark.parametrize("name", FORMATS)
def test_images_and_labels_are_those_of_the_files(root: Path, name: str) -> None:
    loaded = splits.load(config_of(name, root), seed=0)
    files = splits.load(config_of("image_folder", root), seed=0)
    assert sorted(shown(loaded.test)) == sorted(shown(files.test))
    assert loaded.num_classes == len(CLASSES)
    assert len(loaded.train) + len(loaded.validation) == 60  # type: ignore[arg-type]
    assert splits.num_classes(config_of(name, root)) == 3
    assert splits.num_train(config_of(name, root)) == 60


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_has_every_image_once_and_resumes_with_any_number_of_workers(
    root: Path, name: str, world_size: int
) -> None:
    data = config_of(name, root)
    whole = list(loader(data).batches)
    rest = []
    for rank in range(world_size):
        resumed = loader(data, rank, world_size)
        resumed.load_state_dict({"epoch": 0, "step": 1, "num_ranks": 1})
        resumed.seek(0)
        resumed.batches.first_step = resumed.step
        rest.append(list(resumed.batches))
    assert len({index for batch in whole for index in batch}) == sum(map(len, whole))
    for step, batch in enumerate(whole[1:]):
        assert {index for rank in rest for index in rank[step]} == set(batch)


def test_loader_processes_read_the_same(root: Path) -> None:
    alone, helped = (list(loader(config_of("webdataset", root, augment=True), workers=workers)) for workers in (0, 2))
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(alone, helped, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_packing_gives_the_shards_of_the_files(root: Path, tmp_path: Path, name: str) -> None:
    whole = packed(root / "files" / "train", tmp_path / "files")
    address = ADDRESSES[name].format(root=root, split="train")
    manifest = packed(open_source(name, address), tmp_path / "shards")
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in whole.shards]
    assert Shards(str(tmp_path / "shards")).classes == (list(CLASSES) if name == "hf_parquet" else ["0", "1", "2"])


def test_rows_without_a_path_or_names_of_classes(root: Path, tmp_path: Path) -> None:
    table = pq.read_table(sorted((root / "hf").glob("train-*"))[0])
    images = [row["bytes"] for row in table["image"].to_pylist()]
    pq.write_table(pa.table({"picture": images, "kind": table["label"]}), tmp_path / "a.parquet", row_group_size=4)
    files = hf_parquet.load_split(config(tmp_path, train=str(tmp_path)), "train")
    assert (files.classes, files.keys()[1], len(files)) == (["0", "1", "2"], "a.parquet#1", 30)
    assert bytes(files.read([5], capacity=1)[0].numpy()) == images[5]


def test_a_label_may_be_in_json(root: Path, tmp_path: Path) -> None:
    in_place.write_tars(root / "files" / "val", tmp_path, "val", label_suffix="json")
    data = config_of("webdataset", root, test=str(tmp_path))
    assert sorted(splits.load(data, 0).test.labels.tolist()) == sorted([0, 1, 2] * 10)  # type: ignore[attr-defined]


def test_the_index_of_tars_is_kept(root: Path, index_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits.load(config_of("webdataset", root), 0)
    monkeypatch.setattr(tarfile, "open", None)
    splits.load(config_of("webdataset", root), 0)
    for index in (index_folder / "gator" / "webdataset").iterdir():
        index.write_bytes(b"damaged")
    with pytest.raises(TypeError):
        splits.load(config_of("webdataset", root), 0)


def hf_of_one_class(root: Path, folder: Path) -> str:
    tree = make_tree(folder / "tree", per_class=8)
    table = pa.concat_tables(
        pq.read_table(path) for path in sorted(in_place.write_hf(tree, folder / "hf", "train").glob("*"))
    )
    pq.write_table(table.sort_by("label"), folder / "sorted.parquet", row_group_size=4)
    return str(folder / "sorted.parquet*")


def large_groups(root: Path, folder: Path) -> str:
    image = pa.array([b"x" * 2**20] * 70, pa.binary())
    pq.write_table(
        pa.table({"image": image, "label": [0] * 70}), folder / "a.parquet", compression="none", use_dictionary=False
    )
    return str(folder)


def two_labels(root: Path, folder: Path) -> str:
    pq.write_table(pa.table({"image": [b"x"], "label": [0], "other": [1]}), folder / "a.parquet")
    return str(folder)


def no_bytes(root: Path, folder: Path) -> str:
    image = pa.array(
        [{"bytes": None, "path": "elsewhere.jpg"}] * 8, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": image, "label": [0, 1] * 4}), folder / "a.parquet", row_group_size=4)
    return str(folder)


def truncated(root: Path, folder: Path) -> str:
    (folder / "a.parquet").write_bytes(next((root / "hf").glob("train-*")).read_bytes()[:-100])
    return str(folder)


def truncated_tar(root: Path, folder: Path) -> str:
    (folder / "a.tar").write_bytes(next((root / "tars").glob("train-*")).read_bytes()[:3000])
    return str(folder)


def compressed_tar(root: Path, folder: Path) -> str:
    (folder / "a.tar").write_bytes(gzip.compress(next((root / "tars").glob("train-*")).read_bytes()))
    return str(folder)


def unlabelled_tar(root: Path, folder: Path) -> str:
    with tarfile.open(folder / "a.tar", "w") as tar:
        in_place.add(tar, "one.jpg", b"x")
    return str(folder)


def odd_label(root: Path, folder: Path) -> str:
    with tarfile.open(folder / "a.tar", "w") as tar:
        in_place.add(tar, "one.jpg", b"x")
        in_place.add(tar, "one.cls", b"cat")
    return str(folder)


def several_splits(root: Path, folder: Path) -> str:
    return str(root / "hf")


def nothing(root: Path, folder: Path) -> str:
    return str(folder)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("hf_parquet", hf_of_one_class, r"sorted by class: \d+ of \d+ groups .*\.data pack --format hf_parquet"),
        ("hf_parquet", large_groups, r"a\.parquet: found row groups of 70 MiB, expected at most 64"),
        (
            "hf_parquet",
            two_labels,
            r"a\.parquet: found label, other as the labels, expected one column; set data\.label_column",
        ),
        ("hf_parquet", no_bytes, r"a\.parquet, row groups \[\d\]: found a row without the image's bytes"),
        ("hf_parquet", truncated, r"a\.parquet is not a Parquet file, or is truncated"),
        (
            "hf_parquet",
            several_splits,
            r"found files of several splits \(train, val\); name those of one: .*train\*\.parquet",
        ),
        ("hf_parquet", nothing, r"found no file, expected \.parquet files"),
        ("webdataset", truncated_tar, r"a\.tar is not an uncompressed tar file, or is truncated"),
        ("webdataset", compressed_tar, r"a\.tar is not an uncompressed tar file"),
        (
            "webdataset",
            unlabelled_tar,
            r"a\.tar: found one\.jpg without a label, expected one\.cls or \.json as well",
        ),
        ("webdataset", odd_label, r"a\.tar, one\.cls: found b'cat' as the label, expected a number"),
    ],
)
def test_what_cannot_be_read_is_one_message(root: Path, tmp_path: Path, name: str, make: Any, message: str) -> None:
    address = make(root, tmp_path)
    with pytest.raises(DataError, match=message):
        splits.load(config_of(name, root, train=address, test=address), 0).train[0]


@pytest.mark.parametrize(("folder", "name"), [("hf", "hf_parquet"), ("tars", "webdataset")])
def test_a_folder_of_another_format_is_told_by_its_word(
    root: Path, folder: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=f"it looks like the data set {name}"):
        splits.load(config_of("image_folder", root, train=str(root / folder)), 0)
    assert data_command.main(["pack", str(root / folder), str(root / "out")]) == 2
    assert name in capsys.readouterr().err


def test_the_cache_holds_what_was_used_last(tmp_path: Path) -> None:
    cache, fetched = LocalCache(tmp_path / "cache", max_bytes=25), []

    def content(name: str) -> Any:
        fetched.append(name)
        return iter([name.encode() * 5, name.encode() * 5])

    def path(name: str) -> Path:
        found = cache.path(name, 10, lambda: content(name))
        assert found is not None
        return found

    assert path("a").read_bytes() == b"a" * 10
    opened = path("a").open("rb")
    path("b")
    path("a")
    path("c")  # the third of 10 bytes: b was used longest ago
    path("a")
    assert fetched == ["a", "b", "c"]
    path("a").write_bytes(b"short")
    assert path("a").read_bytes() == b"a" * 10
    assert opened.read() in (b"a" * 10, b"short")
    with pytest.raises(DataError, match="d: found 10 bytes, expected 11"):
        cache.path("d", 11, lambda: content("d"))
    assert cache.path("e", 26, lambda: content("e")) is None
    shutil.rmtree(tmp_path / "cache")
    assert path("a").read_bytes() == b"a" * 10


def test_the_cache_keeps_small_files_and_fetches_damaged_ones_again(tmp_path: Path) -> None:
    cache, fetched = LocalCache(tmp_path / "cache", max_bytes=25), []

    def read(name: str, num_bytes: int) -> bytes:
        return cache.read(name, num_bytes, lambda: fetched.append(name) or iter([name.encode() * 5] * 2))

    assert [read(name, 10) for name in ("a", "b", "a")] == [b"a" * 10, b"b" * 10, b"a" * 10]
    assert fetched == ["a", "b"]
    cache.path("shard", 20, lambda: iter([b"s" * 20]))  # a shard that needs room leaves them alone
    assert read("b", 10) == b"b" * 10
    assert fetched == ["a", "b"]
    for copy in (tmp_path / "cache" / "small").rglob("*"):
        if copy.is_file():
            copy.write_bytes(b"short")
    assert read("a", 10) == b"a" * 10
    assert fetched == ["a", "b", "a"]
    with pytest.raises(DataError, match="a: found 10 bytes, expected 11"):
        read("a", 11)
    assert not list((tmp_path / "cache").glob(".tmp*"))
