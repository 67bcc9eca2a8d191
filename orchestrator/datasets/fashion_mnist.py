"""Fashion-MNIST: 70,000 grey images of clothes of 28 x 28 pixels, from Debian's package, without a download."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.in_memory import prepare
from orchestrator.errors import DataError

NUM_CLASSES = 10
NUM_TRAIN = 60_000
FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images


def load(data: DataConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) for training, 60,000, and for testing, 10,000.

    data.train and data.test may name the folders of other IDX files; the default is the folder of Debian's package.
    Raises: DataError if the files are missing or damaged.
    """
    train = Path(data.train) if data.train else FOLDER
    test = Path(data.test) if data.test else train
    return _read(train, "train", data.image_size), _read(test, "t10k", data.image_size)


def _read(folder: Path, split: str, image_size: int) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder / f"{split}-images-idx3-ubyte", num_dims=3)
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte", num_dims=1)
    if len(images) != len(labels):
        raise DataError(
            f"Fashion-MNIST: {folder} has {len(images)} images but {len(labels)} labels in its {split} split"
        )
    return prepare(images[:, None].float() / 255, image_size, MEAN, STD), labels.long()


def _read_idx(path: Path, num_dims: int) -> Tensor:
    """Return the bytes of an IDX file, plain or gzipped, as a uint8 tensor of its shape.

    The format: two zero bytes, 0x08 for bytes, the number of dimensions, each dimension as a big-endian int32, the data.
    """
    packed = path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"Fashion-MNIST: found neither {path} nor {packed.name}; install it with "
            "`apt-get install dataset-fashion-mnist`, or name the folder of its four IDX files in data.train"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Fashion-MNIST: {packed} cannot be read ({error})") from error
    start = 4 + 4 * num_dims
    shape = np.frombuffer(content[4:start].ljust(4 * num_dims, b"\0"), dtype=">i4")
    if content[:4] != bytes([0, 0, 8, num_dims]) or shape.prod() != len(content) - start:
        raise DataError(f"Fashion-MNIST: {path} is damaged, expected an IDX file of bytes in {num_dims} dimensions")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())
