"""Fashion-MNIST: 70,000 grey images of clothes, from Debian's package, read from its IDX files without a download."""

import gzip
import shutil
import tempfile
from pathlib import Path

from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from orchestrator.config import DataConfig
from orchestrator.datasets.images import prepare
from orchestrator.errors import DataError

NUM_CLASSES = 10
FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images


def load(data: DataConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) to train on, 60,000, and to validate with, 10,000. data.train may name another folder.

    Raises: DataError if the files are absent.
    """
    folder = Path(data.train) if data.train else FOLDER
    return _read(folder, "train", data), _read(folder, "t10k", data)


def _read(folder: Path, split: str, data: DataConfig) -> tuple[Tensor, Tensor]:
    images = read_image_file(_idx_file(folder, f"{split}-images-idx3-ubyte"))
    labels = read_label_file(_idx_file(folder, f"{split}-labels-idx1-ubyte"))
    return prepare(images[:, None].float() / 255, data.image_size, MEAN, STD), labels


def _idx_file(folder: Path, name: str) -> str:
    """Return an IDX file that torchvision can read, unpacked to a temporary place when it is compressed."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file():
        return str(plain)
    if not packed.is_file():
        raise DataError(
            f"Fashion-MNIST: found neither {plain} nor {packed.name}; install it with `apt-get install dataset-fashion-mnist`, "
            "or name the folder of its four IDX files in data.train"
        )
    target = Path(tempfile.mkdtemp(prefix="fashion-mnist-")) / name
    with gzip.open(packed, "rb") as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)
    return str(target)
