"""Images on disk in ImageNet's layout: a folder for training and one for validation, in each a folder of images per class.

    data: {name: image_folder, train: /data/imagenet/train, val: /data/imagenet/val, image_size: 224, ...}

Classes are numbered by the sorted names of the folders. Images are decoded when they are needed, by data.num_loader_workers
processes per worker; nothing is kept in memory.
"""

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.encoded import EncodedImages, Size, header_size
from orchestrator.datasets.in_memory import stratified
from orchestrator.errors import DataError
from orchestrator.storage.files import wait_until

Names = NDArray[np.bytes_]


class ImageFiles(EncodedImages):
    """Image files below a folder, by their relative paths, and their labels."""

    def __init__(
        self, folder: Path, names_N: Names, labels_N: Tensor, data: DataConfig, *, augment: bool, num_classes: int
    ) -> None:
        super().__init__(labels_N, data, augment=augment, num_classes=num_classes)
        self.folder = folder
        self.names = names_N

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.folder / os.fsdecode(self.names[index])

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """See EncodedImages."""
        return [self._bytes(self.path(index)) for index in indices]

    def name(self, index: int) -> str:
        """See EncodedImages."""
        return str(self.path(index))

    def size(self, index: int, encoded: Tensor) -> Size:
        """See EncodedImages; read from the file's header."""
        return header_size(encoded)

    def _bytes(self, path: Path) -> Tensor:
        try:
            return torch.frombuffer(bytearray(_content(path)), dtype=torch.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise DataError(f"{path} cannot be read ({error}); repair or remove it") from error


def _content(path: Path) -> bytes:
    """Return the content of a file that was there before; if its folder is gone, wait for its storage to come back."""
    try:
        return path.read_bytes()
    except OSError:
        wait_until(lambda: os.path.isdir(path.parent), str(path.parent))
        return path.read_bytes()


def load(data: DataConfig, seed: int) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
    """Return the images for training, held out of the training images, and for validation; the last two are never augmented.

    Raises: DataError if a folder is missing, has no class or an empty one, or the two have different classes.
    """
    train_classes, val_classes = class_names(_folder(data, "train")), class_names(_folder(data, "val"))
    check_same_classes(train_classes, val_classes)
    train, val = _folder(data, "train"), _folder(data, "val")
    names, labels = list_files(train, train_classes)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[: data.num_train]
    held = stratified(labels[order], data.holdout)

    def subset(chosen: Tensor, augment: bool) -> ImageFiles:
        kept = names[chosen.numpy()]
        return ImageFiles(train, kept, labels[chosen], data, augment=augment, num_classes=len(train_classes))

    val_names, val_labels = list_files(val, val_classes)
    all_of_val = ImageFiles(val, val_names, val_labels, data, augment=False, num_classes=len(val_classes))
    return subset(order[~held], data.augment), subset(order[held], False), all_of_val


def check_same_classes(train: list[str], val: list[str]) -> None:
    """Raise DataError unless both splits have the same classes."""
    if train != val:
        odd = sorted(set(train) ^ set(val))
        raise DataError(
            f"data.train and data.val: found different classes, expected the same; {', '.join(odd[:5])} is in one only"
        )


def class_names(folder: Path | str) -> list[str]:
    """Return the names of the class folders, sorted. Raises: DataError if the folder is missing or has none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: folder not found, expected one with a folder of images per class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise DataError(f"{folder}: found no class folders, expected ImageNet's layout: {folder}/CLASS/IMAGE.jpg")
    return names


def num_images(folder: str, enough: int | None) -> int | None:
    """Return the number of images below a folder, counted up to `enough`; None without it: listing millions of files takes minutes."""
    if enough is None:
        return None
    files = (path for name in class_names(folder) for path in (Path(folder) / name).rglob("*"))
    return sum(1 for _ in islice((path for path in files if path.suffix.lower() in IMG_EXTENSIONS), enough))


def _folder(data: DataConfig, split: str) -> Path:
    folder = getattr(data, split)
    if folder is None:
        raise DataError(f"data.{split} is missing; data set image_folder needs the folders data.train and data.val")
    return Path(folder)


def list_files(folder: Path, classes: list[str]) -> tuple[Names, Tensor]:
    """Return the relative paths of the image files in a folder, class by class, and their labels.

    The paths are one block of memory; as Path objects each took 350 bytes in every loader process.
    Raises: DataError if a class has none.
    """
    names, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise DataError(f"{folder / name}: found no image, expected at least one ({', '.join(IMG_EXTENSIONS)})")
        skipped = len(os.fsencode(folder / name)) - len(os.fsencode(name))  # relative_to() takes as long as the listing
        names.append(np.array([os.fsencode(path)[skipped:] for path in found]))
        labels.append(torch.full((len(found),), label))
    return np.concatenate(names), torch.cat(labels)
