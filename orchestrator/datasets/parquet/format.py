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
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from orchestrator.config.base import Config, Count
from orchestrator.datasets.encoded import Size
from orchestrator.datasets.stored.file_groups import FileGroups
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.datasets.stored.group_cache import Group
from orchestrator.datasets.stored.local_cache import LocalCache
from orchestrator.datasets.stored.open_parquet import OpenParquet
from orchestrator.errors import DataError

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


def record_of_file(store: StoredFolder, name: str) -> FileRecord:
    """Return the record of a stored file, from its current content."""
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in store.chunks(name):
        digest.update(chunk)
        num_bytes += len(chunk)
    return FileRecord(bytes=num_bytes, sha256=digest.hexdigest())


def read_manifest(store: StoredFolder) -> Manifest:
    """Return the manifest. Raises: DataError if it is missing, damaged or of another version."""
    place = store.place(MANIFEST)
    if store.sizes([MANIFEST]) == [None]:
        raise DataError(
            f"{place} is missing; expected a folder written by `python -m orchestrator.data pack`, which writes it last; "
            f"rerun the same command to complete it{store.advice()}"
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


def verify(store: StoredFolder, manifest: Manifest, name: str) -> None:
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


def read_classes(store: StoredFolder, manifest: Manifest) -> list[str]:
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


def read_index(store: StoredFolder, manifest: Manifest) -> pa.Table:
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


def _read_verified(store: StoredFolder, name: str, expected: FileRecord) -> bytes:
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


def open_shard(source: Any, place: str, record: ShardRecord, rows_per_group: int) -> pq.ParquetFile:
    """Open a shard for reading. Raises: DataError if it is truncated, or does not match the manifest."""
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True)
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


class Shards(FileGroups):
    """A packed split: the index in memory, the images read by row groups when they are needed.

    Raises: DataError if a file is missing or damaged. The sizes of shards are checked here, their schemas when they
    are opened, and their page checksums when they are read; `orchestrator data check` verifies their SHA-256.
    """

    advice = "`orchestrator data check` says whether it is damaged"

    def __init__(self, address: str, cache: LocalCache | None = None) -> None:
        store = StoredFolder(address, cache)
        self.manifest = read_manifest(store)
        shards, per_group = self.manifest.shards, self.manifest.rows_per_group
        _check_sizes(store, shards)
        index = read_index(store, self.manifest)
        self.sizes_N2 = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
        self.keys = index["key"].combine_chunks()
        sizes_F = [np.diff([*range(0, shard.num_images, per_group), shard.num_images]) for shard in shards]
        labels_N = torch.from_numpy(index["label"].to_numpy().copy())
        super().__init__(store, [shard.name for shard in shards], sizes_F, labels_N, read_classes(store, self.manifest))

    def name(self, image: int) -> str:
        """See FileGroups."""
        return f"{super().name(image)} ({self.keys[image]})"

    def size(self, image: int, encoded: Tensor) -> Size:
        """See FileGroups; known from the index."""
        height, width = self.sizes_N2[image].tolist()
        return height, width

    def opened(self, file: int) -> OpenParquet:
        """See FileGroups."""
        record, store = self.manifest.shards[file], self.store
        source = store.open(record.name, record.bytes)
        shard = open_shard(source, store.place(record.name), record, self.manifest.rows_per_group)
        return OpenParquet(source, shard.metadata, self.is_remote, checks_pages=True)

    def read_groups(self, opened: OpenParquet, file: int, groups: Sequence[int]) -> Sequence[Group]:
        """See FileGroups."""
        return opened.split(opened.read(groups, "image"), groups)


def _check_sizes(store: StoredFolder, shards: Sequence[ShardRecord]) -> None:
    """Raise DataError for a shard that is missing or has a size other than the manifest's; lists the folder, reads nothing."""
    for shard, size in zip(shards, store.sizes([shard.name for shard in shards]), strict=True):
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(
                f"{store.place(shard.name)} {found}, the manifest says {shard.bytes} bytes; pack again, or copy it again"
            )
