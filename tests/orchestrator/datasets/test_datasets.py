"""Data sets by name: shapes, splits, seeds, and what is told when the files are absent or damaged."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config.trial import DataConfig
from orchestrator.datasets import cifar10, fashion_mnist
from orchestrator.datasets import in_memory as datasets_in_memory
from orchestrator.datasets import splits as datasets_splits
from orchestrator.datasets.splits import ImageDataset
from orchestrator.errors import ConfigError, DataError


def config(**fields: Any) -> DataConfig:
    return DataConfig(
        **{"name": "synthetic", "image_size": 8, "global_batch_size": 8, "validation_share": 0.25} | fields
    )


def stacked(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    return torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_items_are_float_images_of_the_asked_size_and_int_labels(name: str) -> None:
    splits = datasets_splits.load(config(name=name, image_size=12), seed=0)
    assert splits.input_shape == (3, 12, 12)
    for split in (splits.train, splits.validation, splits.test):
        image, label = split[0]
        assert (image.shape, image.dtype) == ((3, 12, 12), torch.float32)
        assert label.dtype == torch.int64
        assert 0 <= int(label) < splits.num_classes == datasets_splits.num_classes(config(name=name))


def test_digits_are_1797_normalised_images_of_three_equal_channels() -> None:
    splits = datasets_splits.load(config(name="digits"), seed=0)
    images = torch.cat([stacked(split)[0] for split in (splits.train, splits.validation, splits.test)])
    assert images.shape == (1797, 3, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=0.01)
    assert images.std().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(images[:, 0], images[:, 2])


def test_digits_validation_split_is_fixed_and_stratified() -> None:
    first, second = (stacked(datasets_splits.load(config(name="digits"), seed=seed).test)[1] for seed in (0, 1))
    assert torch.equal(first, second)
    assert len(first) == 359
    assert set(first.bincount().tolist()) <= {34, 35, 36, 37, 38}  # a fifth of 174 to 183 images of each digit


def test_validation_is_apart_from_train_and_stratified() -> None:
    splits = datasets_splits.load(config(validation_share=0.25), seed=3)
    (train_images, _), (held_images, held_labels) = stacked(splits.train), stacked(splits.validation)
    # 512 training images of 4 classes: 32 of the 128 of each are held out.
    assert held_labels.bincount().tolist() == [32, 32, 32, 32]
    distances = torch.cdist(train_images.flatten(1), held_images.flatten(1))
    assert distances.shape == (384, 128)
    assert distances.min() > 0


def test_seed_decides_what_is_held_out() -> None:
    first, again, other = (stacked(datasets_splits.load(config(), seed=seed).validation)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_num_train_counts_the_held_out_images_too() -> None:
    splits = datasets_splits.load(config(num_train=100, validation_share=0.2), seed=0)
    assert len(splits.train) + len(splits.validation) == 100  # type: ignore[arg-type]


def test_augmentation_shifts_training_images_only_and_follows_the_global_seed() -> None:
    plain, shifted = (datasets_splits.load(config(augment=augment), seed=0) for augment in (False, True))
    torch.manual_seed(0)
    first = stacked(shifted.train)[0]
    torch.manual_seed(0)
    assert torch.equal(stacked(shifted.train)[0], first)
    assert not torch.equal(stacked(plain.train)[0], first)
    assert torch.equal(stacked(plain.validation)[0], stacked(shifted.validation)[0])


def test_shift_moves_the_image_by_at_most_an_eighth() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8)
    images = datasets_in_memory.InMemoryImages(image[None], torch.zeros(1, dtype=torch.int64), max_shift=1)
    offsets = {int(images[0][0][0, 4, 4] - image[0, 4, 4]) for _ in range(200)}
    assert offsets == {8 * down + right for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_synthetic_images_can_be_learned() -> None:
    splits = datasets_splits.load(config(), seed=0)
    images, labels = stacked(splits.train)
    torch.manual_seed(0)
    model = nn.Linear(3 * 8 * 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.flatten(1)), labels).backward()
        optimizer.step()
    val_images, val_labels = stacked(splits.test)
    assert (model(val_images.flatten(1)).argmax(1) == val_labels).float().mean() > 0.9  # chance is 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"name": "digts"}, r"data\.name: found 'digts', .*did you mean digits\?", id="typo"),
        pytest.param({"num_train": 513}, r"data\.num_train: found 513, expected at most the 512", id="too-many"),
        pytest.param({"num_train": 3}, r"data\.num_train: found 3, expected enough", id="nothing-left"),
    ],
)
def test_wrong_data_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        datasets_splits.load(config(**fields), seed=0)


def write_idx(folder: Path, name: str, shape: tuple[int, ...], *, packed: bool) -> None:
    size = torch.Size(shape).numel()
    header = bytes([0, 0, 8, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
    content = header + bytes(index % 10 for index in range(size))
    (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture(params=[False, True], ids=["plain", "gzip"])
def fashion_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for split, count in (("train", 40), ("t10k", 10)):
        write_idx(tmp_path, f"{split}-images-idx3-ubyte", (count, 4, 4), packed=request.param)
        write_idx(tmp_path, f"{split}-labels-idx1-ubyte", (count,), packed=request.param)
    return tmp_path


def test_fashion_mnist_reads_idx_files(fashion_folder: Path) -> None:
    data = config(name="fashion_mnist", image_size=4, train=str(fashion_folder))
    splits = datasets_splits.load(data, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 10)  # type: ignore[arg-type]
    image, label = splits.test[3]
    assert label == 3
    # Image 3 starts at byte 48, whose value is 48 % 10 = 8.
    assert float(image[0, 0, 0]) == pytest.approx((8 / 255 - fashion_mnist.MEAN) / fashion_mnist.STD)


def test_absent_fashion_mnist_names_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found neither .*`apt-get install dataset-fashion-mnist`"):
        datasets_splits.load(config(name="fashion_mnist", train=str(tmp_path)), seed=0)


@pytest.mark.parametrize("keep", [3, 6, 20], ids=["magic", "header", "data"])
def test_truncated_idx_file_is_refused(fashion_folder: Path, keep: int) -> None:
    path = next(fashion_folder.glob("train-images*"))
    content = path.read_bytes()
    is_packed = path.suffix == ".gz"
    path.write_bytes(gzip.compress(gzip.decompress(content)[:keep]) if is_packed else content[:keep])
    with pytest.raises(DataError, match="is damaged, expected an IDX file"):
        datasets_splits.load(config(name="fashion_mnist", train=str(fashion_folder)), seed=0)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "train-images-idx3-ubyte", (40, 4, 4), packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:10] + b"\xff" * 40)
    with pytest.raises(DataError, match=r"gz cannot be read \(Error -3"):
        datasets_splits.load(config(name="fashion_mnist", train=str(tmp_path)), seed=0)


@pytest.mark.skipif(not fashion_mnist.FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_package_of_debian_is_read() -> None:
    images, labels = fashion_mnist._read(fashion_mnist.FOLDER, "t10k", 28)
    assert images.shape == (10_000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10


def cifar10_files(folder: Path) -> None:
    """Write the files of CIFAR-10's binary version, four images each: file i has label i, image j is of brightness 10 j."""
    for label, name in enumerate((*cifar10.TRAIN_FILES, *cifar10.TEST_FILES)):
        records = [bytes([label]) + bytes([10 * image]) * 3072 for image in range(4)]
        (folder / name).write_bytes(b"".join(records))


def test_cifar10_is_read_from_its_binary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "IMAGES_A_FILE", 4)
    cifar10_files(tmp_path)
    (images, labels), (val_images, val_labels) = cifar10.load(
        config(name="cifar10", image_size=32, train=str(tmp_path))
    )
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [label for label in range(5) for _ in range(4)]
    assert val_labels.tolist() == [5] * 4
    assert images[2, 1, 3, 4].item() == pytest.approx((20 / 255 - 0.4822) / 0.2435)
    assert torch.equal(val_images, images[:4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"data_batch_3\.bin cannot be read .*cifar-10-binary\.tar\.gz"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged: found 12,291 bytes, expected 12,292"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "with a label below 10"),
    ],
    ids=["absent", "cut-short", "label"],
)
def test_cifar10_that_cannot_be_read_says_how_to_place_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], message: str
) -> None:
    monkeypatch.setattr(cifar10, "IMAGES_A_FILE", 4)
    cifar10_files(tmp_path)
    damage(tmp_path / "data_batch_3.bin")
    with pytest.raises(DataError, match=message):
        cifar10.load(config(name="cifar10", image_size=32, train=str(tmp_path)))


def test_cifar10_without_a_folder_or_of_another_size_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train is missing.*cifar-10-binary\.tar\.gz"):
        cifar10.load(config(name="cifar10", image_size=32))
    with pytest.raises(ConfigError, match="found 28, expected 32"):
        cifar10.load(config(name="cifar10", image_size=28, train=str(tmp_path)))


def test_mirrored_images_are_the_image_or_its_mirror() -> None:
    image = torch.arange(12.0).view(1, 3, 2, 2)
    torch.manual_seed(0)
    items = [datasets_in_memory.InMemoryImages(image, torch.zeros(1), mirror=True)[0][0] for _ in range(20)]
    num_mirrored = sum(torch.equal(item, image[0].flip(-1)) for item in items)
    assert 0 < num_mirrored < 20
    assert all(torch.equal(item, image[0]) or torch.equal(item, image[0].flip(-1)) for item in items)
