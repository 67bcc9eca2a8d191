"""Data set parquet: the same images as the files, cut from them in the same way, whoever reads them and in what order."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from orchestrator.config.trial import DataConfig, with_values
from orchestrator.datasets import encoded
from orchestrator.datasets import splits as datasets
from orchestrator.datasets.encoded import CentreCrop, RandomCrop, decode, normalised
from orchestrator.datasets.loading import Batch, TrainLoader, load_batches
from orchestrator.datasets.parquet.format import SCHEMA
from orchestrator.datasets.parquet.packing import WRITER_OPTIONS
from orchestrator.datasets.seeds import drawing
from orchestrator.datasets.stored.grouped import GroupedImages
from orchestrator.errors import ConfigError, DataError
from orchestrator.training.evaluation import calibration_batches, count_correct
from orchestrator.training.ranks import Ranks
from tests.orchestrator.packed import config, make_tree, packed
from tests.orchestrator.tiny_trial import tiny


@pytest.fixture(scope="module")
def splits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed splits of 60 and 30 images, beside the trees they were packed from."""
    root = tmp_path_factory.mktemp("data")
    for split, per_class in (("train", 20), ("val", 10)):
        packed(make_tree(root / "files" / split, per_class=per_class), root / split)
    return root


def load(folder: Path, **fields: object) -> datasets.DataSplits:
    return datasets.load(config(folder, **fields), seed=0)


def all_of(split: object, batch_size: int = 7) -> tuple[Tensor, Tensor]:
    assert isinstance(split, GroupedImages)
    batches = [list(range(first, min(first + batch_size, len(split)))) for first in range(0, len(split), batch_size)]
    images, labels = zip(*load_batches(split, batches), strict=True)
    return torch.cat(images), torch.cat(labels)


def keys(split: object) -> set[str]:
    assert isinstance(split, GroupedImages)
    return {split.source.keys[image].as_py() for image in split.images}


def train_loader(folder: Path, rank: int = 0, world_size: int = 1, workers: int = 0, **fields: object) -> TrainLoader:
    return TrainLoader(
        load(folder, augment=True, **fields).train,
        global_batch_size=12,
        seed=1,
        rank=rank,
        world_size=world_size,
        num_loader_workers=workers,
    )


def test_images_are_those_of_the_files(splits_folder: Path) -> None:
    val = load(splits_folder).test
    files = load(splits_folder / "files", name="image_folder").test
    by_name = {name.decode(): index for index, name in enumerate(files.names)}  # type: ignore[attr-defined]
    images, labels = all_of(val)
    assert (images.shape, images.dtype, labels.dtype) == ((30, 3, 16, 16), torch.float32, torch.int64)
    for position, image in enumerate(val.images):  # type: ignore[attr-defined]
        expected, label = files[by_name[val.source.keys[image].as_py()]]  # type: ignore[attr-defined]
        assert torch.equal(images[position], normalised(expected))
        assert labels[position] == label


def test_validation_is_whole_row_groups_apart_from_train(splits_folder: Path) -> None:
    splits = load(splits_folder, validation_share=0.2)
    assert len(splits.validation) == 12  # type: ignore[arg-type]  # a fifth of 60, three row groups of four
    assert not keys(splits.train) & keys(splits.validation)
    assert len(keys(splits.train) | keys(splits.validation)) == 60
    shards = splits.train.source  # type: ignore[attr-defined]
    groups = [set(shards.group_N[part.images]) for part in (splits.train, splits.validation)]  # type: ignore[attr-defined]
    assert not groups[0] & groups[1]


def test_num_train_counts_the_held_out_images_too(splits_folder: Path) -> None:
    splits = load(splits_folder, num_train=30)
    assert len(splits.train) + len(splits.validation) == 30  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.num_train: found 61, expected at most the 60 .*=60$"):
        load(splits_folder, num_train=61)
    with pytest.raises(ConfigError, match=r"whole row groups are held out, so at least two are needed"):
        load(splits_folder, num_train=3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])  # of 4 shards
def test_every_image_is_seen_once_an_epoch_also_by_more_ranks_than_shards(splits_folder: Path, world_size: int) -> None:
    loaders = [train_loader(splits_folder, rank, world_size) for rank in range(world_size)]
    seen = [images for one in loaders for images, _ in one]
    num_images = len(loaders[0].dataset)  # type: ignore[arg-type]
    assert num_images == 48
    assert sum(map(len, seen)) == 48  # four global batches of 12
    indices = [index for one in loaders for batch in one.batches for index in batch]
    assert sorted(indices or range(48)) == list(range(48))


def batches_of(loader: TrainLoader) -> list[Tensor]:
    return [images for images, _ in loader]


@pytest.mark.parametrize("workers", [1, 2])
def test_augmented_epoch_does_not_depend_on_loader_processes_or_on_what_ran_before(
    splits_folder: Path, workers: int
) -> None:
    torch.manual_seed(1)
    expected = batches_of(train_loader(splits_folder, mixup=0.2, trivial_augment=True))
    torch.manual_seed(2)
    found = batches_of(train_loader(splits_folder, workers=workers, mixup=0.2, trivial_augment=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_epoch_goes_on_in_its_middle_with_the_very_same_pixels(splits_folder: Path) -> None:
    whole = batches_of(train_loader(splits_folder, workers=1))
    begun = train_loader(splits_folder)
    next(iter(begun))
    continued = train_loader(splits_folder, workers=2)
    continued.load_state_dict(begun.state_dict())
    rest = batches_of(continued)
    assert len(rest) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rest, whole[1:], strict=True))


def test_next_epoch_has_other_crops(splits_folder: Path) -> None:
    split = load(splits_folder, augment=True).train
    first, again, other = (
        split.__getitems__(Batch([5], epoch=0, seed=seed))[0][0]  # type: ignore[attr-defined]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_leaves_the_generator_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with drawing(5):
        torch.rand(10)
    assert torch.equal(torch.rand(3), expected)


def test_row_groups_are_read_once_an_epoch(splits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = train_loader(splits_folder)
    shards = loader.dataset.source  # type: ignore[attr-defined]
    read: list[tuple[int, int]] = []
    original = shards.read_groups

    def noting(opened: object, shard: int, groups: list[int]) -> object:
        read.extend((shard, group) for group in groups)
        return original(opened, shard, groups)

    monkeypatch.setattr(shards, "read_groups", noting)
    batches_of(loader)
    assert len(read) == len(set(read)) == 12  # 48 images in row groups of four


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_evaluation_counts_every_image_once(splits_folder: Path, num_ranks: int) -> None:
    class Bright(torch.nn.Module):
        """Tells the class by the mean brightness: 60, 130 or 200 of 255."""

        def forward(self, images: Tensor) -> Tensor:
            means = images.mean((1, 2, 3), keepdim=True).flatten(1)
            centres = normalised(torch.tensor([60, 130, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1))
            return -(means - centres.mean((1, 2, 3))).abs()

    val = load(splits_folder).test
    counts = [
        count_correct(Bright(), val, tiny(evaluation__batch_size=8), Ranks(rank=rank, world_size=num_ranks))
        for rank in range(num_ranks)
    ]
    assert sum(counts, torch.zeros(2, dtype=torch.int64)).tolist() == [30, 30]


def test_batchnorm_is_estimated_on_training_images_of_full_size(splits_folder: Path) -> None:
    train = load(splits_folder, augment=True, image_size=64, start_size=32, full_size_epoch=2).train
    trial, cpu = tiny(evaluation__bn_batches=2, evaluation__batch_size=5, seed=3), torch.device("cpu")
    first, again = (list(calibration_batches(train, trial, cpu)) for _ in range(2))
    assert [batch.shape for batch in first] == [(5, 3, 64, 64)] * 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
    elsewhere = list(calibration_batches(train, with_values(trial, {"data.num_loader_workers": 2}), cpu))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(elsewhere, first, strict=True))


def test_images_grow_with_the_epochs(splits_folder: Path) -> None:
    loader = train_loader(splits_folder, image_size=96, start_size=32, full_size_epoch=2)
    sizes = []
    for epoch in range(3):
        loader.seek(epoch)
        sizes.append({images.shape[-1] for images in batches_of(loader)})
    assert sizes == [{32}, {64}, {96}]


def test_mixed_labels_are_shares_of_two_classes(splits_folder: Path) -> None:
    images, labels = next(iter(train_loader(splits_folder, mixup=0.4, cutmix=1.0)))
    assert (images.shape, labels.shape) == ((12, 3, 16, 16), (12, 3))
    torch.testing.assert_close(labels.sum(1), torch.ones(12))
    assert (labels > 0).sum(1).max() == 2


def test_row_group_that_is_remembered_holds_no_other_in_memory(splits_folder: Path) -> None:
    train = load(splits_folder).train
    assert isinstance(train, GroupedImages)
    images = train.source.read(range(16), capacity=4)  # the four row groups of a shard, read at once
    for first in range(0, 16, 4):
        group = images[first : first + 4]
        assert {image.untyped_storage().data_ptr() for image in group} == {group[0].untyped_storage().data_ptr()}
        assert group[0].untyped_storage().nbytes() == sum(map(len, group))


def test_damaged_row_is_named_also_from_a_loader_process(tmp_path: Path) -> None:
    for split in ("train", "val"):
        packed(make_tree(tmp_path / "files" / split, per_class=8), tmp_path / split)
    val = load(tmp_path).test
    assert isinstance(val, GroupedImages)
    place = val.source.manifest.shards[0].name
    table = pq.ParquetFile(tmp_path / "val" / place).read()
    first, *others = table["image"].to_pylist()
    images = pa.array([bytes(len(first)), *others])  # whole for Parquet, and of the same size
    table = table.set_column(0, SCHEMA.field("image"), images)
    pq.write_table(table, tmp_path / "val" / place, row_group_size=4, **WRITER_OPTIONS)
    for workers in (0, 1):
        with pytest.raises(DataError, match=rf"^\S+/{place}, image 0 \(n0\d/n0\d_\d\.JPEG\) cannot be decoded"):
            list(load_batches(load(tmp_path).test, [[0, 1]], num_loader_workers=workers))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test": None}, r"data\.test is missing; data set parquet needs"),
        ({"train": "/nowhere"}, r"/nowhere/manifest\.json is missing; expected a folder written by"),
        ({"train": "s4://bucket/x"}, r"s4://bucket/x: the folder cannot be opened"),
    ],
)
def test_folder_that_is_no_packed_split_is_told(splits_folder: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(splits_folder, **fields)


def test_splits_of_other_classes_are_refused(splits_folder: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "files")
    (tree / "n03").rename(tree / "n99")
    packed(tree, tmp_path / "val")
    with pytest.raises(DataError, match="found different classes, expected the same; n03, n99 is in one only"):
        load(splits_folder, test=str(tmp_path / "val"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": 0.2, "augment": False}, "mixup without augment"),
        ({"start_size": 8}, "start_size and full_size_epoch belong together"),
        ({"start_size": 32, "full_size_epoch": 1}, "start_size 32 exceeds image_size 16"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("/data", **{"augment": True, **fields})


def test_options_of_image_files_are_refused_for_other_data_sets() -> None:
    data = DataConfig(name="synthetic", image_size=8, global_batch_size=8, augment=True, cutmix=1.0)
    with pytest.raises(
        ConfigError,
        match=r"data\.cutmix: data set synthetic does not support it, image_folder, parquet, hf_parquet, webdataset do",
    ):
        datasets.load(data, seed=0)


def smooth(height: int, width: int) -> tuple[Tensor, np.ndarray]:
    """Return a JPEG of a smooth picture as bytes, and its pixels."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 255 - 255 * rows / height], axis=2).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=95)
    return torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8), pixels


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_reduced_image_is_the_whole_one_made_smaller(reduction: int) -> None:
    data, pixels = smooth(160, 240)
    image = decode(data, (160, 240), reduction)
    assert (image.shape, image.dtype) == ((3, 160 // reduction, 240 // reduction), torch.uint8)
    expected = pixels.reshape(160 // reduction, reduction, 240 // reduction, reduction, 3).mean((1, 3))
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 6  # JPEG rounds


def test_crops_are_torchvisions() -> None:
    data, _ = smooth(90, 120)
    whole = decode_jpeg(data)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip()])(whole)
        torch.manual_seed(seed)
        assert torch.equal(RandomCrop(64, is_varied=False)(data, (90, 120)), expected)
    expected = v2.Compose([v2.Resize(round(64 / 0.875)), v2.CenterCrop(64)])(whole)
    assert torch.equal(CentreCrop(64)(data, (90, 120)), expected)


def test_crop_of_a_large_image_is_decoded_smaller_and_looks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = smooth(1200, 1600)
    reductions = []
    original = encoded.decode
    monkeypatch.setattr(encoded, "decode", lambda data, size, by: reductions.append(by) or original(data, size, by))  # type: ignore[func-returns-value]
    for seed in range(6):
        torch.manual_seed(seed)
        small = RandomCrop(64, is_varied=False)(data, (1200, 1600))
        torch.manual_seed(seed)
        expected = v2.Compose([v2.RandomResizedCrop(64), v2.RandomHorizontalFlip()])(decode_jpeg(data))
        assert (small.float() - expected.float()).abs().mean() < 3
    assert max(reductions) == 8


def test_images_of_other_formats_and_colours_are_decoded(tmp_path: Path) -> None:
    pixels: Sequence[tuple[str, str]] = [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")]
    for mode, kind in pixels:
        Image.new("RGB", (20, 10), (200, 30, 30)).convert(mode).save(tmp_path / "image", kind)
        data = torch.frombuffer(bytearray((tmp_path / "image").read_bytes()), dtype=torch.uint8)
        image = decode(data, (10, 20))
        assert image.shape == (3, 10, 20)
        red = 80 if mode == "L" else 200
        assert math.isclose(float(image[0].float().mean()), red, abs_tol=8), (mode, kind)
