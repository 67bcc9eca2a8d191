"""Shards in an object store: pyarrow's S3 client against moto's server on a loopback address, real processes on both sides."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator import data
from orchestrator.datasets import splits
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.parquet.format import Shards
from orchestrator.datasets.parquet.sources import open_source
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.errors import DataError
from tests.orchestrator import in_place
from tests.orchestrator.datasets.test_in_place import ADDRESSES, config_of
from tests.orchestrator.packed import break_off, config, counting, make_tree, packed
from tests.orchestrator.servers import object_store

pytest.importorskip("moto", reason="needs the test extra")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where moto writes a line per request."""
    return tmp_path_factory.mktemp("moto") / "log"


@pytest.fixture(scope="module")
def bucket(log: Path) -> Iterator[str]:
    """The address of an empty bucket."""
    with object_store(log) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield "s3://bucket"


def num_requests(log: Path) -> int:
    """Return how many objects moto has been asked for so far."""
    return log.read_text().count("GET /bucket/")


@pytest.fixture(scope="module")
def sources(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Images as files, as Parquet and as tars, in the bucket and in a folder."""
    root = tmp_path_factory.mktemp("sources")
    for split, per_class in (("train", 20), ("val", 10)):
        tree = make_tree(root / "files" / split, per_class=per_class)
        in_place.write_hf(tree, root / "hf", split)
        in_place.write_tars(tree, root / "tars", split)
    store = StoredFolder(f"{bucket}/sources")
    for path in root.rglob("*.*"):
        store.write(str(path.relative_to(root)), path.read_bytes())
    return f"{bucket}/sources", root


@pytest.mark.parametrize("name", ADDRESSES)
def test_sources_are_read_where_they_are(
    sources: tuple[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batches = []
    for root, workers in ((sources[0], 2), (sources[1], 0)):
        data = config_of(name, root, augment=True)
        train = TrainLoader(splits.load(data, 0).train, global_batch_size=12, seed=1, num_loader_workers=workers)
        train.load_state_dict({"epoch": 0, "step": 1, "num_ranks": 1})  # in the middle of an epoch
        batches.append(list(train))
    assert len(batches[0]) > 0
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ADDRESSES)
def test_sources_are_packed(
    sources: tuple[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = packed(sources[1] / "files" / "train", tmp_path / "files")
    address = ADDRESSES[name].format(root=sources[0], split="train")
    again = packed(open_source(name, address), f"{sources[0]}/packed-{name}")
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in whole.shards]


@pytest.mark.parametrize("name", ["parquet", "hf_parquet", "webdataset"])
def test_second_epoch_with_a_cache_asks_for_nothing(
    sources: tuple[str, Path], packed_splits: tuple[str, Path], name: str, log: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = config(packed_splits[0]) if name == "parquet" else config_of(name, sources[0])
    data = place.model_copy(update={"cache": str(tmp_path / "cache")})
    train = TrainLoader(splits.load(data, 0).train, global_batch_size=12, seed=1, num_loader_workers=2)
    first = list(train)
    asked = num_requests(log)
    train.seek(1)
    second = list(train)
    train.load_state_dict({"epoch": 0, "step": 0, "num_ranks": 1})
    assert num_requests(log) == asked > 0
    assert len(first) == len(second) > 0
    assert all(torch.equal(one[0], other[0]) for one, other in zip(first, train, strict=True))


@pytest.fixture(scope="module")
def packed_splits(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Packed splits in the bucket, and the same in a folder."""
    root = tmp_path_factory.mktemp("files")
    for split in ("train", "val"):
        packed(make_tree(root / split), f"{bucket}/imagenet/{split}")
        packed(root / split, str(root / "local" / split))
    return f"{bucket}/imagenet", root / "local"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_the_same_images_from_a_bucket(packed_splits: tuple[str, Path], workers: int) -> None:
    def batches(folder: str | Path, num_workers: int) -> list[torch.Tensor]:
        train = splits.load(config(folder, augment=True), seed=0).train
        loader = TrainLoader(train, global_batch_size=12, seed=0, num_loader_workers=num_workers)
        return [images for images, _ in loader]

    remote, local = batches(packed_splits[0], workers), batches(packed_splits[1], 0)
    assert len(local) == len(remote) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(remote, local, strict=True))


def test_packing_into_a_bucket_goes_on_where_it_was(bucket: str, tmp_path: Path) -> None:
    tree, calls = make_tree(tmp_path / "tree"), []  # type: ignore[var-annotated]
    break_off(tree, f"{bucket}/again")
    StoredFolder(f"{bucket}/again").write("shard-00000.parquet", b"half a shard of an earlier call")
    packed(tree, f"{bucket}/again", run=counting(calls))
    packed(tree, f"{bucket}/again", run=counting(calls))
    assert calls == ["shard-00000.parquet", "shard-00001.parquet", "shard-00003.parquet"]
    assert len(Shards(f"{bucket}/again")) == 60
    assert StoredFolder(f"{bucket}/again").sizes([".pack/plan.json", ".pack/shard-00000.json"]) == [None, None]


def test_check_reads_a_bucket(packed_splits: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    address, _ = packed_splits
    assert data.main(["check", f"{address}/train"]) == 0
    StoredFolder(f"{address}/val").write("shard-00001.parquet", b"something else")
    assert data.main(["check", f"{address}/val"]) == 2
    assert "bucket/imagenet/val/shard-00001.parquet: found 14 bytes" in capsys.readouterr().err


def test_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(DataError, match=r"s3://no-such-bucket/train/manifest\.json"):
        Shards("s3://no-such-bucket/train")
