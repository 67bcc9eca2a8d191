"""Images in ImageNet's layout: a folder for training and one for testing, in each a folder of images per class.

    data: {name: image_folder, train: /data/imagenet/train, test: s3://bucket/imagenet/val, image_size: 224, ...}

Classes are numbered by the sorted names of the folders. Images are decoded when they are needed, by data.num_loader_workers
processes per worker; nothing is kept in memory. From an object store each image is a request of its own, unless data.cache has
a copy of it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.encoded import EncodedImages, Size, header_size
from orchestrator.datasets.in_memory import stratified
from orchestrator.datasets.order import Indices
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.errors import DataError
from orchestrator.storage.files import wait_until

Names = NDArray[np.bytes_]
NUM_REQUESTS = 32
"""Images that a loader process requests from an object store at once."""


class ImageFiles(EncodedImages):
    """Image files below a folder, by their relative paths, and their labels.

    copied_N: bytes of the files that are copied to the cache, 0 for the others.
    """

    def __init__(
        self,
        folder: StoredFolder,
        names_N: Names,
        labels_N: Tensor,
        copied_N: Indices,
        data: DataConfig,
        *,
        augment: bool,
        num_classes: int,
    ) -> None:
        super().__init__(labels_N, data, augment=augment, num_classes=num_classes)
        self.store = folder
        self.names = names_N
        self.copied = copied_N
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave requests behind: loader processes read for themselves."""
        return {**vars(self), "_pool": None, "_coming": {}}

    @property
    def is_remote(self) -> bool:
        """Whether the images are in an object store."""
        return not self.store.is_local

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """See EncodedImages. From an object store the images that later calls will ask for are requested as well."""
        if self.store.is_local:
            return [self._bytes(index) for index in indices]
        pool = self._pool = self._pool or ThreadPoolExecutor(NUM_REQUESTS)
        wanted, ahead = (
            {index: self._coming.get(index) or pool.submit(self._bytes, index) for index in some}
            for some in (indices, getattr(indices, "ahead", ()))
        )
        self._coming = ahead
        try:
            return [wanted[index].result() for index in indices]
        except BaseException:
            for image in (*wanted.values(), *ahead.values()):  # the process need not wait for these at its end
                image.cancel()
            self._coming = {}
            raise

    def name(self, index: int) -> str:
        """See EncodedImages."""
        return self.store.place(os.fsdecode(self.names[index]))

    def size(self, index: int, encoded: Tensor) -> Size:
        """See EncodedImages; read from the file's header."""
        return header_size(encoded)

    def _bytes(self, index: int) -> Tensor:
        try:
            return torch.frombuffer(bytearray(self._content(index)), dtype=torch.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise DataError(f"{self.name(index)} cannot be read ({error}); repair or remove it") from error

    def _content(self, index: int) -> bytes:
        """Return the content of a file that was there before; if its storage is away, wait for it to come back."""
        try:
            return self._read(index)
        except (OSError, DataError):
            folder = os.fsdecode(self.names[index]).rpartition("/")[0]
            wait_until(lambda: self.store.is_there(folder), self.store.place(folder))
            return self._read(index)

    def _read(self, index: int) -> bytes:
        name = os.fsdecode(self.names[index])
        if self.store.folder is not None:
            return (self.store.folder / name).read_bytes()
        return self.store.content(name, int(self.copied[index]))


def load(data: DataConfig, seed: int) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
    """Return the images for training, for validation (held out of them), and for testing; the last two are never augmented.

    Raises: DataError if a folder is missing, has no class or an empty one, or the two have different classes.
    """
    cache = LocalCache.of(data)
    train, test = _folder(data, "train", cache), _folder(data, "test", cache)
    train_classes, test_classes = class_folders(train), class_folders(test)
    check_same_classes(train_classes, test_classes)
    files, test_files = list_files(train, train_classes), list_files(test, test_classes)
    sizes = np.concatenate([files.sizes, test_files.sizes])
    fits = np.cumsum(sizes) <= (0 if cache is None else cache.max_bytes)
    copied, test_copied = np.split(np.where(fits, sizes, 0), [len(files.sizes)])
    order = torch.randperm(len(files.names), generator=torch.Generator().manual_seed(seed))[: data.num_train]
    held = stratified(files.labels[order], data.validation_share)

    def subset(chosen: Tensor, augment: bool) -> ImageFiles:
        """Return the training images with these indices."""
        at = chosen.numpy()
        return ImageFiles(
            train,
            files.names[at],
            files.labels[chosen],
            copied[at],
            data,
            augment=augment,
            num_classes=len(train_classes),
        )

    all_of_test = ImageFiles(
        test, test_files.names, test_files.labels, test_copied, data, augment=False, num_classes=len(test_classes)
    )
    return subset(order[~held], data.augment), subset(order[held], False), all_of_test


def check_same_classes(train: list[str], test: list[str]) -> None:
    """Raise DataError unless both splits have the same classes."""
    if train != test:
        odd = sorted(set(train) ^ set(test))
        raise DataError(
            f"data.train and data.test: found different classes, expected the same; {', '.join(odd[:5])} is in one only"
        )


def class_names(data: DataConfig) -> list[str]:
    """Return the classes of data.train. Raises: DataError."""
    return class_folders(_folder(data, "train", None))


def num_images(data: DataConfig, enough: int | None) -> int | None:
    """Return the number of images in data.train, counted up to `enough`; None without it: listing millions of files takes minutes."""
    folder = _folder(data, "train", None).folder
    if enough is None or folder is None:
        return None
    files = (path for name in class_names(data) for path in (folder / name).rglob("*"))
    return sum(1 for _ in islice((path for path in files if path.suffix.lower() in IMG_EXTENSIONS), enough))


def _folder(data: DataConfig, split: str, cache: LocalCache | None) -> StoredFolder:
    address = getattr(data, split)
    if address is None:
        raise DataError(f"data.{split} is missing; data set image_folder needs the folders data.train and data.test")
    return StoredFolder(address, cache)


def class_folders(folder: StoredFolder) -> list[str]:
    """Return the names of the class folders, sorted. Raises: DataError if the folder is missing or has none."""
    names = folder.folders()
    if not names:
        raise DataError(
            f"{folder.place()}: found no class folders, expected ImageNet's layout: "
            f"{folder.place('CLASS/IMAGE.jpg')}{_other_format(folder)}"
        )
    return names


def _other_format(folder: StoredFolder) -> str:
    """Return a hint if the folder holds another format."""
    for pattern, name in (("manifest.json", "parquet"), ("*.parquet", "hf_parquet"), ("*.tar", "webdataset")):
        if folder.find(pattern):
            return f"; found {pattern}: it looks like the data set {name}"
    return ""


@dataclass(frozen=True)
class Listing:
    """Image files below a folder, class by class."""

    names: Names
    """Their paths, in one block of memory; as Path objects each took 350 bytes in every loader process."""
    labels: Tensor
    sizes: Indices
    """Their bytes; 0 in a folder on this machine, where each would be a call of its own."""


def list_files(folder: StoredFolder, classes: list[str]) -> Listing:
    """Return the image files below a folder. Raises: DataError if a class has none."""
    remote = _remote_files(folder) if folder.folder is None else {}
    names, labels, sizes = [], [], []
    for label, name in enumerate(classes):
        files = _local_files(folder.folder, name) if folder.folder else remote.get(name, {})
        if not files:
            raise DataError(
                f"{folder.place(name)}: found no image, expected at least one ({', '.join(IMG_EXTENSIONS)})"
            )
        names.append(np.array(list(files)))
        labels.append(torch.full((len(files),), label))
        sizes.append(np.array(list(files.values())))
    return Listing(np.concatenate(names), torch.cat(labels), np.concatenate(sizes))


def _local_files(folder: Path, name: str) -> dict[bytes, int]:
    found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    skipped = len(os.fsencode(folder / name)) - len(os.fsencode(name))  # relative_to() takes as long as the listing
    return {os.fsencode(path)[skipped:]: 0 for path in found}


def _remote_files(folder: StoredFolder) -> dict[str, dict[bytes, int]]:
    """Return the image files of each class, with their bytes; one listing of everything."""
    files: dict[str, dict[bytes, int]] = {}
    for name, num_bytes in folder.find("*/*").items():
        if Path(name).suffix.lower() in IMG_EXTENSIONS:
            files.setdefault(name.partition("/")[0], {})[name.encode()] = num_bytes
    return files
