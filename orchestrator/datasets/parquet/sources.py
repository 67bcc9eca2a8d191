"""What can be packed: class folders, Hugging Face's Parquet, tars of webdataset; in a folder or an object store."""

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.datasets.image_folder import class_folders, list_files
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.datasets.stored.found_files import FoundFiles
from orchestrator.datasets.stored.hf_parquet import SUFFIX as HF_SUFFIX
from orchestrator.datasets.stored.hf_parquet import HfParquet
from orchestrator.datasets.stored.webdataset import SUFFIX as TAR_SUFFIX
from orchestrator.datasets.stored.webdataset import WebDataset
from orchestrator.errors import DataError

Place = tuple[Any, ...]
"""Where a source finds an image, in plain values."""


@dataclass(frozen=True)
class SourceImage:
    """An image of a source."""

    key: str
    """Its name, which the shards keep."""
    label: int
    size: int
    """Its bytes; 0 if the source does not know them without reading."""
    place: Place


class Source(ABC):
    """Images to pack. It is sent to the tasks, which read some of the images each; so it holds no list of them."""

    store: StoredFolder
    classes: list[str]

    @abstractmethod
    def images(self) -> list[SourceImage]:
        """Return all images, by label and key."""

    @abstractmethod
    def reader(self, places: Sequence[Place]) -> Callable[[int], bytes]:
        """Return a function that reads the image at places[i]; it raises OSError or DataError."""


class ClassFolders(Source):
    """A folder of images per class."""

    def __init__(self, address: str) -> None:
        self.store = StoredFolder(address)
        self.classes = class_folders(self.store)

    def images(self) -> list[SourceImage]:
        """See Source."""
        files = list_files(self.store, self.classes)
        keys = [self._key(name) for name in files.names.tolist()]
        sizes = self.store.sizes(keys) if self.store.is_local else files.sizes.tolist()
        found = zip(keys, files.labels.tolist(), sizes, strict=True)
        return [SourceImage(key, label, size or 0, (key,)) for key, label, size in found]

    def reader(self, places: Sequence[Place]) -> Callable[[int], bytes]:
        """See Source."""
        return lambda position: self.store.read(places[position][0])

    def _key(self, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.store.place()}: the name {os.fsdecode(name)!a} is not UTF-8, as Parquet needs it; rename the file"
            ) from error


class HfFiles(Source):
    """Hugging Face's Parquet files. An image costs its whole row group, which a task reads once."""

    def __init__(self, address: str, image_column: str | None = None, label_column: str | None = None) -> None:
        self._files = HfParquet(FoundFiles.at(address, HF_SUFFIX), image_column, label_column)
        self.store, self.classes = self._files.store, self._files.classes
        self._column = self._files.image_leaf

    def __getstate__(self) -> dict[str, Any]:
        """Leave the labels behind."""
        return {**vars(self), "_files": None}

    def images(self) -> list[SourceImage]:
        """See Source."""
        groups = self._files
        places = groups.places()
        labelled = zip(groups.keys(), groups.labels_N.tolist(), places, strict=True)
        return _sorted([SourceImage(key, label, 0, place) for key, label, place in labelled])

    def reader(self, places: Sequence[Place]) -> Callable[[int], bytes]:
        """See Source."""
        rows = defaultdict(list)
        for position, (file, group, row) in enumerate(places):
            rows[file, group].append((row, position))
        contents: dict[int, bytes | None] = {}
        for (file, group), wanted in sorted(rows.items()):
            column = self._group(file, group)
            contents |= {position: column[row].as_py() for row, position in wanted}
        return lambda position: self._whole(contents[position], places[position])

    def _group(self, file: str, group: int) -> pa.ChunkedArray:
        try:
            table = pq.ParquetFile(self.store.open(file)).read_row_group(group, columns=[self._column])
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.store.place(file)}, row group {group}: cannot be read ({error}); copy the file again"
            ) from error
        return table.flatten().column(0)

    def _whole(self, content: bytes | None, place: Place) -> bytes:
        if content is None:
            raise DataError(
                f"{self.store.place(place[0])}, row group {place[1]}, row {place[2]}: found no bytes of an image"
            )
        return content


class Tars(Source):
    """Tar files of webdataset."""

    def __init__(self, address: str) -> None:
        self._files = WebDataset(FoundFiles.at(address, TAR_SUFFIX))
        self.store, self.classes = self._files.store, self._files.classes

    def __getstate__(self) -> dict[str, Any]:
        """Leave the index behind."""
        return {**vars(self), "_files": None}

    def images(self) -> list[SourceImage]:
        """See Source."""
        files = self._files.files
        rows = self._files.index.to_pylist()
        return _sorted(
            [
                SourceImage(row["key"], row["label"], row["size"], (files[row["file"]], row["offset"], row["size"]))
                for row in rows
            ]
        )

    def reader(self, places: Sequence[Place]) -> Callable[[int], bytes]:
        """See Source."""
        opened = {name: self.store.open(name) for name in sorted({place[0] for place in places})}

        def read(position: int) -> bytes:
            name, offset, size = places[position]
            content: bytes = opened[name].read_at(size, offset)
            return content

        return read


FORMATS = ("image_folder", "hf_parquet", "webdataset")


def open_source(name: str, address: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Return the images at an address. Raises: DataError."""
    if name == "hf_parquet":
        return HfFiles(address, image_column, label_column)
    return Tars(address) if name == "webdataset" else ClassFolders(address)


def _sorted(images: list[SourceImage]) -> list[SourceImage]:
    """Return the images by label and key, as class folders list them."""
    return sorted(images, key=lambda image: (image.label, image.key))
