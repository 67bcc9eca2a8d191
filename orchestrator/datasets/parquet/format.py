"""The format that `orchestrator data pack` writes, and its reader: a folder of Parquet shards for each split.

    manifest.json            counts, and the bytes and SHA-256 of every other file
    classes.json             {"n01440764": 0, ...}: the class folders and their labels
    index.parquet            a row per image, in the order of the shards: label, key, width, height
    shard-00000.parquet ...  a row per image: the file's bytes, unchanged, and the columns of the index

Images are shuffled before they are packed, so that a row group, which is read as a whole, holds images of all classes.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from orchestrator.config.base import Config, Count
from orchestrator.datasets.parquet.shard_folder import ShardFolder
from orchestrator.errors import DataError
from orchestrator.storage.files import wait_until

VERSION = 2
MANIFEST, CLASSES, INDEX = "manifest.json", "classes.json", "index.parquet"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),  # path below the packed folder: n01440764/n01440764_10026.JPEG
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
SCHEMA = pa.schema([pa.field("image", pa.binary(), nullable=False), *INDEX_SCHEMA])
_AGAIN = "empty the folder and pack again, or copy it again"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NUM_OPEN_SHARDS = 32
"""Shards that a reader keeps open; at any time an order reads from about as many as a rank has lanes."""
Indices = NDArray[np.int64]


class FileRecord(Config):
    """Size and checksum of a file in the manifest's folder."""

    bytes: int
    """Its size."""
    sha256: str
    """The SHA-256 of its content, as hex digits."""


class ShardRecord(FileRecord):
    """Name, size and checksum of a shard."""

    name: str
    """Its file name."""
    num_images: Count
    """Number of its rows."""


class Skipped(Config):
    """An image that was left out."""

    key: str
    """Its path below the packed folder."""
    error: str
    """Why it cannot be decoded."""


def columns() -> dict[str, str]:
    """Return the column names and types of a shard."""
    return _types(SCHEMA)


class Manifest(Config):
    """What a folder of shards holds."""

    version: int = VERSION
    """Version of this format."""
    fingerprint: str
    """Fingerprint of what was packed: the names and sizes of the files, and their layout in shards."""
    num_images: int
    """Number of rows in all shards."""
    num_classes: int
    """Number of entries in classes.json."""
    rows_per_group: Annotated[Count, Field(lt=2**31)]
    """Images in a row group; the last one of a shard may have fewer."""
    columns: dict[str, str]
    """Maps each column of a shard to its Arrow type."""
    files: dict[str, FileRecord]
    """classes.json and index.parquet."""
    shards: tuple[ShardRecord, ...]
    """The shards, in the order of the index."""
    skipped: tuple[Skipped, ...] = ()
    """Images that could not be decoded and were left out."""


def record_of(content: bytes | pa.Buffer) -> FileRecord:
    """Return the record of a file with this content."""
    return FileRecord(bytes=len(memoryview(content)), sha256=hashlib.sha256(content).hexdigest())


def record_of_file(store: ShardFolder, name: str) -> FileRecord:
    """Return the record of a stored file, from its current content."""
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in store.chunks(name):
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileRecord(bytes=num_bytes, sha256=digest.hexdigest())


def read_manifest(store: ShardFolder) -> Manifest:
    """Return the manifest. Raises: DataError if it is missing, damaged or of another version."""
    place = store.place(MANIFEST)
    if store.sizes([MANIFEST]) == [None]:
        raise DataError(
            f"{place} is missing; expected a folder written by `python -m orchestrator.data pack`, which writes it last; "
            "rerun the same command to complete it"
        )
    try:
        content = json.loads(store.read(MANIFEST))
        if isinstance(content, dict) and content.get("version") != VERSION:
            raise DataError(
                f"{place} has version {content.get('version')}, this program reads {VERSION}; pack again, into another folder"
            )
        manifest = Manifest.model_validate(content)
    except (ValueError, RecursionError) as error:  # what pydantic and json raise; the latter also for deep nesting
        raise DataError(f"{place} is damaged ({error}); {_AGAIN}") from error
    names = [*manifest.files, *(shard.name for shard in manifest.shards)]
    if odd := [
        name for name in names if not _FILE_NAME.fullmatch(name)
    ]:  # a name from elsewhere may lead out of the folder
        raise DataError(f"{place}: found {odd[0][:60]!r} as a file, expected a plain name; {_AGAIN}")
    if missing := {CLASSES, INDEX} - manifest.files.keys():
        raise DataError(f"{place}: found no record of {missing.pop()}, expected one; {_AGAIN}")
    if manifest.columns != columns():
        raise DataError(f"{place}: found the columns {manifest.columns}, expected {columns()}; {_AGAIN}")
    if (found := sum(shard.num_images for shard in manifest.shards)) != manifest.num_images:
        raise DataError(f"{place}: found {manifest.num_images} images, expected the {found} of all shards; {_AGAIN}")
    return manifest


def verify(store: ShardFolder, manifest: Manifest, name: str) -> None:
    """Raise DataError unless a file exists and matches the manifest in size, checksum and content."""
    shards = {shard.name: shard for shard in manifest.shards}
    if name == CLASSES:
        read_classes(store, manifest)
    elif name == INDEX:
        read_index(store, manifest)
    else:
        content = _read_verified(store, name, shards.get(name) or manifest.files[name])
        if name in shards:
            open_shard(pa.BufferReader(content), store.place(name), shards[name], manifest.rows_per_group)


def read_classes(store: ShardFolder, manifest: Manifest) -> list[str]:
    """Return the class folders in the order of their labels. Raises: DataError if the file is damaged."""
    content, place = _read_verified(store, CLASSES, manifest.files[CLASSES]), store.place(CLASSES)
    try:
        labels = TypeAdapter(dict[str, int]).validate_json(content)
    except ValidationError as error:
        raise DataError(f"{place} is damaged ({error.errors()[0]['msg']}); {_AGAIN}") from error
    if sorted(labels.values()) != list(range(len(labels))) or len(labels) != manifest.num_classes:
        raise DataError(
            f"{place}: found {len(labels)} classes, the manifest says {manifest.num_classes}, labelled 0, 1, ...; {_AGAIN}"
        )
    return sorted(labels, key=labels.__getitem__)


def read_index(store: ShardFolder, manifest: Manifest) -> pa.Table:
    """Return the rows of all shards without the images. Raises: DataError if the file is damaged."""
    content, place = _read_verified(store, INDEX, manifest.files[INDEX]), store.place(INDEX)
    try:
        index = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{place} is damaged ({error}); {_AGAIN}") from error
    if not index.schema.equals(INDEX_SCHEMA):
        raise DataError(f"{place}: found the columns {_types(index.schema)}, expected {_types(INDEX_SCHEMA)}; {_AGAIN}")
    if len(index) != manifest.num_images:
        raise DataError(f"{place}: found {len(index)} images, the manifest says {manifest.num_images}; {_AGAIN}")
    return index


def _read_verified(store: ShardFolder, name: str, expected: FileRecord) -> bytes:
    """Return the content of a file. Raises: DataError unless it has the size and the checksum of the manifest."""
    content = store.read(name)
    found = record_of(content)
    if (found.bytes, found.sha256) != (expected.bytes, expected.sha256):
        raise DataError(
            f"{store.place(name)}: found {found.bytes} bytes with SHA-256 {found.sha256[:12]}..., the manifest says "
            f"{expected.bytes} with {expected.sha256[:12]}...; pack again, or copy it again"
        )
    return content


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def open_shard(
    source: Any, place: str, record: ShardRecord, rows_per_group: int, in_parallel: bool = False
) -> pq.ParquetFile:
    """Open a shard for reading. Raises: DataError if it is truncated, or does not match the manifest.

    in_parallel: request all row groups of a call at once, which is faster if each request takes long.
    """
    try:
        file = pq.ParquetFile(source, pre_buffer=in_parallel, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{place} is damaged or truncated ({error}); pack again, or copy it again") from error
    if not file.schema_arrow.equals(SCHEMA):
        raise DataError(
            f"{place}: found the columns {_types(file.schema_arrow)}, expected {columns()}; pack again, or copy it again"
        )
    metadata = file.metadata
    num_groups = -(-record.num_images // rows_per_group)
    if (metadata.num_rows, metadata.num_row_groups) != (record.num_images, num_groups):
        raise DataError(
            f"{place}: found {metadata.num_rows} images in {metadata.num_row_groups} row groups, the manifest says "
            f"{record.num_images} in {num_groups}; pack again, or copy it again"
        )
    return file


class Shards:
    """A packed split: the index in memory, the images read by row groups when they are needed.

    Raises: DataError if a file is missing or damaged. The sizes of shards are checked here, their schemas when they
    are opened, and their page checksums when they are read; `orchestrator data check` verifies their SHA-256.
    """

    def __init__(self, address: str) -> None:
        self.store = ShardFolder(address)
        self.manifest = read_manifest(self.store)
        self._check_sizes()
        self.classes = read_classes(self.store, self.manifest)
        index = read_index(self.store, self.manifest)
        self.labels_N = torch.from_numpy(index["label"].to_numpy().copy())
        self.sizes_N2 = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
        self.keys = index["key"].combine_chunks()
        self._first_image_S, self._first_group_S, self.group_N = self._layout()
        self.shard_G = np.repeat(np.arange(len(self.manifest.shards)), np.diff(self._first_group_S))
        self._reader = _Reader(self.store, self.manifest)

    def __len__(self) -> int:
        return self.manifest.num_images

    def read(self, images: Sequence[int], *, capacity: int) -> list[Tensor]:
        """Return the bytes of image files, (bytes,) uint8 each, as views of their row groups.

        capacity: number of row groups to keep for the next call.
        """
        groups = self.group_N[np.asarray(images)]
        shards = self.shard_G[groups]
        wanted = list(zip(shards.tolist(), (groups - self._first_group_S[shards]).tolist(), strict=True))
        found = self._reader.read(wanted, capacity)
        rows = (np.asarray(images) - self._first_image_S[shards]) % self.manifest.rows_per_group
        return [found[place].image(row) for place, row in zip(wanted, rows.tolist(), strict=True)]

    def name(self, image: int) -> str:
        """Return the location of an image, for messages."""
        shard = int(self.shard_G[self.group_N[image]])
        place = self.store.place(self.manifest.shards[shard].name)
        return f"{place}, row {image - int(self._first_image_S[shard])} ({self.keys[image]})"

    def _check_sizes(self) -> None:
        """Raise DataError for a shard that is missing or has a size other than the manifest's; lists the folder, reads nothing."""
        shards = self.manifest.shards
        for shard, size in zip(shards, self.store.sizes([shard.name for shard in shards]), strict=True):
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{self.store.place(shard.name)} {found}, the manifest says {shard.bytes} bytes; "
                    "pack again, or copy it again"
                )

    def _layout(self) -> tuple[Indices, Indices, Indices]:
        """Return the first image and the first row group of each shard, and the row group of each image."""
        per_group = self.manifest.rows_per_group
        sizes = np.array([shard.num_images for shard in self.manifest.shards], dtype=np.int64)
        first_image = np.concatenate([[0], np.cumsum(sizes)])
        first_group = np.concatenate([[0], np.cumsum(-(-sizes // per_group))])
        rows = np.arange(first_image[-1]) - np.repeat(first_image[:-1], sizes)
        return first_image, first_group, np.repeat(first_group[:-1], sizes) + rows // per_group


class _RowGroup:
    """The image files of a row group, copied: Arrow reads several row groups into one buffer of up to twice their size."""

    def __init__(self, images: pa.Array) -> None:
        _, offsets, values = images.buffers()
        ends = np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1]
        self._ends = (ends - ends[0]).tolist()
        self._bytes = torch.from_numpy(np.frombuffer(values, np.uint8)[ends[0] : ends[-1]].copy())

    def image(self, row: int) -> Tensor:
        """Return the bytes of one image file."""
        return self._bytes[self._ends[row] : self._ends[row + 1]]


class _Reader:
    """Reads row groups, identified by (shard, row group of the shard), and keeps those that were used last."""

    def __init__(self, store: ShardFolder, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _RowGroup] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Drop open files and cached row groups: loader processes open their own."""
        return {**vars(self), "_files": OrderedDict(), "_groups": OrderedDict()}

    def read(self, wanted: Sequence[tuple[int, int]], capacity: int) -> dict[tuple[int, int], _RowGroup]:
        """Return the row groups, and keep the last `capacity` for later calls."""
        found = {place: self._groups[place] for place in wanted if place in self._groups}
        missing: dict[int, list[int]] = {}
        for shard, group in sorted(set(wanted) - found.keys()):
            missing.setdefault(shard, []).append(group)
        for shard, groups in missing.items():
            found.update({(shard, group): content for group, content in self._read_shard(shard, groups)})
        for place, content in found.items():
            self._groups[place] = content
            self._groups.move_to_end(place)
        while len(self._groups) > capacity:
            self._groups.popitem(last=False)
        return found

    def _read_shard(self, shard: int, groups: list[int]) -> list[tuple[int, _RowGroup]]:
        """Return row groups of a shard; an object store is read with parallel requests."""
        record = self._manifest.shards[shard]
        try:
            column = self._images(shard, groups)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._store.place(record.name)}, row groups {groups}: cannot be read ({error}); "
                "`orchestrator data check` says whether it is damaged"
            ) from error
        rows_per_group, first, read = self._manifest.rows_per_group, 0, []
        for group in groups:
            part = column.slice(first, min(rows_per_group, record.num_images - group * rows_per_group))
            read.append((group, _RowGroup(part.chunk(0) if part.num_chunks == 1 else part.combine_chunks())))
            first += len(part)
        return read

    def _images(self, shard: int, groups: list[int]) -> pa.ChunkedArray:
        """Return the images of row groups; after a failure wait until the store is reachable, by its manifest, and read once more."""
        try:
            return self._open(shard).read_row_groups(groups, columns=["image"], use_threads=False).column(0)
        except (pa.ArrowException, OSError, DataError):
            self._files.pop(shard, None)  # it was opened before the failure
            wait_until(lambda: self._store.has(MANIFEST), self._store.place(MANIFEST))
            return self._open(shard).read_row_groups(groups, columns=["image"], use_threads=False).column(0)

    def _open(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            record = self._manifest.shards[shard]
            source, place = self._store.open(record.name), self._store.place(record.name)
            self._files[shard] = open_shard(
                source, place, record, self._manifest.rows_per_group, in_parallel=not self._store.is_local
            )
        self._files.move_to_end(shard)
        if len(self._files) > NUM_OPEN_SHARDS:
            self._files.popitem(last=False)
        return self._files[shard]
