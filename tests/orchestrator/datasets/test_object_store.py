"""Shards in an object store: pyarrow's S3 client against moto's server on a loopback address, real processes on both sides."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator import data
from orchestrator.datasets import splits as datasets
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.parquet.format import Shards
from orchestrator.datasets.parquet.shard_folder import ShardFolder
from orchestrator.errors import DataError
from tests.orchestrator.packed import break_off, config, counting, make_tree, packed
from tests.orchestrator.servers import free_port

pytest.importorskip("moto", reason="needs the test extra")
pytestmark = pytest.mark.slow

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty bucket."""
    port = free_port()
    with open(tmp_path_factory.mktemp("moto") / "log", "w") as log, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            patch.setenv(name, value)
        try:
            _create_bucket(f"http://127.0.0.1:{port}/bucket")
            yield "s3://bucket"
        finally:
            server.terminate()
            server.wait()


def _create_bucket(url: str) -> None:
    """Wait until the server answers, and create a bucket; moto takes unsigned requests."""
    for _ in range(600):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{url}: no answer in a minute")


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
        train = datasets.load(config(folder, augment=True), seed=0).train
        loader = TrainLoader(train, global_batch_size=12, seed=0, num_loader_workers=num_workers)
        return [images for images, _ in loader]

    remote, local = batches(packed_splits[0], workers), batches(packed_splits[1], 0)
    assert len(local) == len(remote) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(remote, local, strict=True))


def test_packing_into_a_bucket_goes_on_where_it_was(bucket: str, tmp_path: Path) -> None:
    tree, calls = make_tree(tmp_path / "tree"), []  # type: ignore[var-annotated]
    break_off(tree, f"{bucket}/again")
    ShardFolder(f"{bucket}/again").write("shard-00000.parquet", b"half a shard of an earlier call")
    packed(tree, f"{bucket}/again", run=counting(calls))
    packed(tree, f"{bucket}/again", run=counting(calls))
    assert calls == ["shard-00000.parquet", "shard-00001.parquet", "shard-00003.parquet"]
    assert len(Shards(f"{bucket}/again")) == 60
    assert ShardFolder(f"{bucket}/again").sizes([".pack/plan.json", ".pack/shard-00000.json"]) == [None, None]


def test_check_reads_a_bucket(packed_splits: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    address, _ = packed_splits
    assert data.main(["check", f"{address}/train"]) == 0
    ShardFolder(f"{address}/val").write("shard-00001.parquet", b"something else")
    assert data.main(["check", f"{address}/val"]) == 2
    assert "bucket/imagenet/val/shard-00001.parquet: found 14 bytes" in capsys.readouterr().err


def test_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(DataError, match=r"s3://no-such-bucket/train/manifest\.json"):
        Shards("s3://no-such-bucket/train")
