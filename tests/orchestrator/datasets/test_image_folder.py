"""Real JPEG files in ImageNet's layout."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from orchestrator.config.trial import DataConfig
from orchestrator.datasets import splits as datasets
from orchestrator.datasets.encoded import MEAN, STD, normalised
from orchestrator.datasets.loading import Batch, load_batches
from orchestrator.errors import ConfigError, DataError

SIZES = [(40, 60), (75, 50), (32, 32), (48, 64)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, dark and bright, of four training and two test images each, of several sizes."""
    for split, num in (("train", 4), ("val", 2)):
        for value, name in ((40, "dark"), (200, "bright")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(num):
                Image.new("RGB", SIZES[number], (value,) * 3).save(tmp_path / split / name / f"{number}.jpg")
    return tmp_path


def config(folder: Path, **fields: object) -> DataConfig:
    values = {"name": "image_folder", "image_size": 16, "global_batch_size": 2, "validation_share": 0.25}
    return DataConfig.model_validate({**values, "train": str(folder / "train"), "test": str(folder / "val"), **fields})


def test_classes_are_numbered_by_their_sorted_names_and_images_are_normalised(folder: Path) -> None:
    splits = datasets.load(config(folder), seed=0)
    assert (splits.num_classes, splits.input_shape) == (2, (3, 16, 16))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [6, 2, 4]  # type: ignore[arg-type]
    for images, labels in load_batches(splits.test, [[index] for index in range(4)]):
        image, label = images[0], labels[0]
        assert (image.shape, image.dtype, label.dtype) == ((3, 16, 16), torch.float32, torch.int64)
        value = (200, 40)[int(label)]  # bright comes before dark
        expected = (torch.tensor([value / 255] * 3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        torch.testing.assert_close(image.mean((1, 2)), expected, atol=0.02, rtol=0)  # JPEG rounds


def test_validation_is_apart_from_train_and_the_same_for_the_same_seed(folder: Path) -> None:
    first, again = (datasets.load(config(folder), seed=3) for _ in range(2))
    assert not set(first.train.names) & set(first.validation.names)  # type: ignore[attr-defined]
    assert first.train.names.tolist() == again.train.names.tolist()  # type: ignore[attr-defined]
    assert sorted(first.validation.labels.tolist()) == [0, 1]  # type: ignore[attr-defined]


def test_augmented_are_the_training_images_alone(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(50, 50, 3), dtype=np.uint8)
    for path in [*folder.glob("train/*/*.jpg"), *folder.glob("val/*/*.jpg")]:
        Image.fromarray(pixels).save(path)
    splits = datasets.load(config(folder, augment=True), seed=0)
    torch.manual_seed(0)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    for part in (splits.validation, splits.test):
        assert torch.equal(part[0][0], part[0][0])


def test_a_name_that_is_no_utf8_is_read(folder: Path) -> None:
    (folder / "train/dark/0.jpg").rename(folder / os.fsdecode(b"train/dark/\xff 0.jpg"))
    assert len(list(datasets.load(config(folder), seed=0).train)) == 6  # type: ignore[call-overload]


def test_loader_processes_read_them(folder: Path) -> None:
    splits = datasets.load(config(folder), seed=0)
    labels = torch.cat([labels for _, labels in DataLoader(splits.train, batch_size=4, num_workers=2)])
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_images_in_a_store_are_requested_once_and_a_batch_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train: Any = datasets.load(config(folder), seed=0).train
    expected, root, asked = train.read([0, 1, 2, 3]), folder / "train", list[str]()
    monkeypatch.setattr(train.store, "folder", None)  # as in an object store
    monkeypatch.setattr(train.store, "content", lambda name, _: asked.append(name) or (root / name).read_bytes())
    found = train.read(Batch([0, 1], epoch=0, seed=0, ahead=[2, 3]))
    for image in train._coming.values():
        image.result()
    assert len(asked) == 4
    found += train.read(Batch([2, 3], epoch=0, seed=0))
    assert sorted(asked) == sorted(name.decode() for name in train.names[:4])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not train._coming


def test_damaged_image_is_named(folder: Path) -> None:
    path = folder / "val" / "dark" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    splits = datasets.load(config(folder), seed=0)
    with pytest.raises(DataError, match=r"val/dark/0\.jpg cannot be decoded"):
        list(splits.test)


def test_what_is_missing_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.test is missing; data set image_folder needs"):
        datasets.load(config(folder, test=None), seed=0)
    with pytest.raises(DataError, match="nowhere: folder not found"):
        datasets.load(config(folder, train=str(folder / "nowhere")), seed=0)
    (folder / "train" / "grey").mkdir()
    with pytest.raises(DataError, match="found different classes, expected the same; grey is in one only"):
        datasets.load(config(folder), seed=0)
    (folder / "val" / "grey").mkdir()
    with pytest.raises(DataError, match="grey: found no image"):
        datasets.load(config(folder), seed=0)
    with pytest.raises(ConfigError, match="did you mean image_folder"):
        datasets.load(config(folder, name="image_foler"), seed=0)


def test_number_of_classes_is_known_where_the_folder_is(folder: Path) -> None:
    assert datasets.num_classes(config(folder)) == 2
    assert datasets.num_classes(config(folder, train="/not/on/this/machine")) is None


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (0, 3, 4, 5)], ids=["image", "batch", "nothing"])
def test_normalised_images_are_those_of_torchvision(shape: tuple[int, ...]) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = v2.functional.normalize(images / 255, list(MEAN), list(STD))
    torch.testing.assert_close(normalised(images), expected, rtol=0, atol=1e-5)  # it multiplies by the inverse
