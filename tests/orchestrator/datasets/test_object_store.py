"""Shards in an object store: pyarrow's S3 client against moto's server on a loopback address, real processes on both sides."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from orchestrator import data
from orchestrator.config.trial import DataConfig
from orchestrator.datasets import splits
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.parquet.format import Shards
from orchestrator.datasets.parquet.sources import open_source
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.errors import DataError
from orchestrator.storage.addresses import joined
from tests.orchestrator import in_place
from tests.orchestrator.datasets.test_in_place import ADDRESSES, config_of
from tests.orchestrator.packed import break_off, config, counting, make_tree, packed
from tests.orchestrator.servers import closed_store, google_store, object_store

pytest.importorskip("moto", reason="needs the test extra")
pytestmark = pytest.mark.slow
PLACES = {**ADDRESSES, "parquet": "{root}/packed/{split}"}


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


@pytest.mark.parametrize("step", [0, 1], ids=["whole epoch", "rest of an epoch"])
@pytest.mark.parametrize("name", ADDRESSES)
def test_sources_are_read_where_they_are(
    sources: tuple[str, Path], name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batches = []
    for root, workers in ((sources[0], 2), (sources[1], 0)):
        data = config_of(name, root, augment=True)
        train = TrainLoader(splits.load(data, 0).train, global_batch_size=12, seed=1, num_loader_workers=workers)
        train.load_state_dict({"epoch": 0, "step": step, "num_ranks": 1})
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


@pytest.mark.parametrize("name", PLACES)
def test_second_epoch_with_a_cache_asks_for_nothing(
    sources: tuple[str, Path], packed_splits: tuple[str, Path], name: str, log: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = place_of(name, sources, packed_splits).model_copy(update={"cache": str(tmp_path / "cache")})
    images = splits.load(data, 0).train
    assert name != "image_folder" or len(images) % 6 == 0  # type: ignore[arg-type]  # else an epoch leaves some out
    train = TrainLoader(images, global_batch_size=6, seed=1, num_loader_workers=2)
    first = list(train)
    asked = num_requests(log)
    train.seek(1)
    second = list(train)
    train.load_state_dict({"epoch": 0, "step": 0, "num_ranks": 1})
    assert len(first) == len(second) > 0
    assert all(torch.equal(one[0], other[0]) for one, other in zip(first, train, strict=True))
    assert num_requests(log) == asked > 0


def test_image_files_are_copied_as_far_as_they_fit(sources: tuple[str, Path], log: Path, tmp_path: Path) -> None:
    root = sources[1] / "files" / "train"
    first = sorted(root.rglob("*.JPEG"))[:40]
    room = sum(path.stat().st_size for path in first)
    data = config_of("image_folder", sources[0], cache=str(tmp_path), cache_gb=(room + 0.5) / 1e9)
    images = splits.load(data, 0).train
    used = [root / name.decode() for name in images.names]  # type: ignore[attr-defined]  # the others are held out
    kept = [path for path in used if path in first]
    asked = []
    for _ in range(3):
        before = num_requests(log)
        list(DataLoader(images, batch_size=7, num_workers=2, multiprocessing_context="forkserver"))
        asked.append(num_requests(log) - before)
    assert asked == [len(used), len(used) - len(kept), len(used) - len(kept)]
    copied = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(path.stat().st_size for path in kept)


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
    folder = StoredFolder(f"{address}/val")
    content = folder.read("shard-00001.parquet")
    folder.write("shard-00001.parquet", b"something else")
    assert data.main(["check", f"{address}/val"]) == 2
    folder.write("shard-00001.parquet", content)  # for the tests after this one
    assert "bucket/imagenet/val/shard-00001.parquet: found 14 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, case) for name in PLACES for case in ("wrong bucket", "no access")), ("hf_parquet", "no region")],
)
def test_a_store_that_cannot_be_read_is_one_error(
    name: str, case: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = "s3://no-such-bucket/sources" if case == "wrong bucket" else f"{bucket}/sources"
    place = PLACES[name].format(root=root, split="train")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with closed_store() as url:
        if case == "no access":
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        elif case == "no region":
            for variable in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
                monkeypatch.delenv(variable)
        with pytest.raises(
            DataError, match=f"^{place.partition('*')[0].rpartition('/')[0]}.*; check the bucket's name"
        ):
            splits.load(config(tmp_path, name=name, train=place, test=place), 0)


def place_of(name: str, sources: tuple[str, Path], packed_splits: tuple[str, Path]) -> DataConfig:
    data: DataConfig = config(packed_splits[0]) if name == "parquet" else config_of(name, sources[0])
    return data.model_copy(update={"shuffle_buffer": 8})


@pytest.mark.parametrize("name", PLACES)
def test_an_epoch_waits_for_a_bucket_that_is_away(
    name: str,
    sources: tuple[str, Path],
    packed_splits: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = place_of(name, sources, packed_splits)
    calm, disturbed = (TrainLoader(splits.load(data, 0).train, global_batch_size=12, seed=1) for _ in range(2))
    (server,) = [one for one in psutil.Process().children() if "moto.server" in one.cmdline()]
    expected = list(calm)
    server.send_signal(signal.SIGSTOP)  # requests get no answer
    Timer(8, server.send_signal, [signal.SIGCONT]).start()
    for one, other in zip(expected, disturbed, strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ("cut", "hf_parquet", r"hf/train.*\.parquet: found \d+ bytes, it had \d+ when the training began; put the file back"),
        ("cut", "webdataset", r"tars/train.*\.tar: found \d+ bytes, it had \d+ when the training began; put the file back"),
        ("cut", "image_folder", r"files/train/n0.*JPEG cannot be decoded .*; repair or remove it"),
        ("cut", "parquet", r"shard-.*\.parquet is damaged or truncated .*; pack again, or copy it again"),
        ("other", "hf_parquet", r"hf/train.*\.parquet is not a Parquet file, or is truncated"),
        ("other", "webdataset", r"tars/train.*\.tar, image \d+ cannot be decoded .*; repair or remove it"),
        ("other", "image_folder", r"files/train/n0.*JPEG cannot be decoded .*; repair or remove it"),
        ("other", "parquet", r"shard-.*\.parquet is damaged or truncated .*; pack again, or copy it again"),
    ],
)  # fmt: skip
def test_what_changes_while_it_is_read_is_one_error(
    change: str, name: str, message: str, bucket: str, sources: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store, root = StoredFolder(f"{bucket}/{change}-{name}"), tmp_path / "copy"
    shutil.copytree(sources[1], root)
    packed(root / "files" / "train", root / "packed" / "train")
    files = [path for path in root.rglob("*.*") if path.is_file() and not path.name.startswith(".")]
    for path in files:
        store.write(str(path.relative_to(root)), path.read_bytes())
    place = PLACES[name].format(root=store.address, split="train")
    train = splits.load(config(tmp_path, name=name, train=place, test=place), 0).train
    for path in files:
        content = path.read_bytes()
        store.write(
            str(path.relative_to(root)), content[: len(content) // 2] if change == "cut" else bytes(len(content))
        )
    with pytest.raises(DataError, match=message):
        list(TrainLoader(train, global_batch_size=12, seed=1))


def test_a_file_that_is_replaced_meanwhile_is_read_whole(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, writer = StoredFolder(f"{bucket}/replaced"), StoredFolder(f"{bucket}/replaced")
    writer.write("row", b"short")

    class Replaced:
        """The file system, on which another process writes a longer file whenever one has been opened."""

        def __init__(self, real: Any) -> None:
            self.real = real
            self.contents = [b"longer than before"]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def open_input_stream(self, path: str) -> Any:
            """Open a file, and replace it."""
            stream = self.real.open_input_stream(path)
            if self.contents:
                writer.write("row", self.contents.pop())
            return stream

    monkeypatch.setattr(store, "_fs", Replaced(store._fs))
    assert store.read("row") == b"longer than before"


@pytest.mark.parametrize("name", ADDRESSES)
def test_sources_are_read_from_google_cloud_storage(
    name: str, sources: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gcp_storage_emulator", reason="needs the test extra")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with google_store(tmp_path / "log") as address:
        store = StoredFolder(address)
        for path in sources[1].rglob("*.*"):
            store.write(str(path.relative_to(sources[1])), path.read_bytes())
        train, val = (joined(address, ADDRESSES[name].format(root="", split=split)[1:]) for split in ("train", "val"))
        remote = splits.load(config(tmp_path, name=name, train=train, test=val), 0).train
        ours, theirs = (
            list(TrainLoader(one, global_batch_size=12, seed=1))
            for one in (remote, splits.load(config_of(name, sources[1]), 0).train)
        )
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one[0], other[0]) for one, other in zip(ours, theirs, strict=True))
