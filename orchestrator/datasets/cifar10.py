"""CIFAR-10: 60,000 colour images of 32 x 32 pixels, from the files of its binary version, which contain no code.

data: {name: cifar10, train: /data/cifar-10-batches-bin, image_size: 32, ...}
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.config.trial import DataConfig
from orchestrator.errors import ConfigError, DataError

NUM_CLASSES = 10
NUM_TRAIN = 50_000
SIZE = 32
IMAGES_A_FILE = 10_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the 50,000 training images
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)


def load(data: DataConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) for training, 50,000, and for testing, 10,000.

    Raises: ConfigError for images of another size, DataError if the files are missing or damaged.
    """
    if data.image_size != SIZE:
        raise ConfigError(f"data.image_size: found {data.image_size}, expected {SIZE} for cifar10")
    if data.train is None:
        raise DataError(f"data.train is missing: the folder of CIFAR-10's binary version; {_how_to_place('FOLDER')}")
    train = Path(data.train)
    test = Path(data.test) if data.test else train
    return _read(train, TRAIN_FILES), _read(test, TEST_FILES)


def _read(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 32, 32) float32, normalised, and labels (N,) int64.

    The format: for each image one byte for its label and 3,072 bytes for its pixels: red, green and blue plane, row by row.
    """
    records = np.concatenate([_records(folder / name) for name in names])
    pixels = torch.from_numpy(records[:, 1:]).reshape(-1, 3, SIZE, SIZE).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, torch.from_numpy(records[:, 0]).long()


def _records(path: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    try:
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"CIFAR-10: {path} cannot be read ({error}); {_how_to_place(path.parent)}") from error
    length = 1 + 3 * SIZE * SIZE
    if len(content) != IMAGES_A_FILE * length or content[::length].max() >= NUM_CLASSES:
        raise DataError(
            f"CIFAR-10: {path} is damaged: found {len(content):,} bytes, expected {IMAGES_A_FILE * length:,} with a label below "
            f"{NUM_CLASSES} before each image; {_how_to_place(path.parent)}"
        )
    return content.reshape(IMAGES_A_FILE, length)


def _how_to_place(folder: object) -> str:
    return (
        "download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpack it and put its six .bin files into "
        f"{folder}, or name their folder in data.train"
    )
