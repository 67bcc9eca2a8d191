"""The data set `webdataset`: images in tar files as the webdataset library has them, read where they are.

    data: {name: webdataset, train: "s3://bucket/imagenet/train-*.tar", test: "s3://bucket/imagenet/val-*.tar", image_size: 224, ...}

A sample is what follows one another under one name: KEY.jpg (jpeg, png, webp) and KEY.cls, its label as a number, or KEY.json with
a "label". A tar has no table of contents: the first use reads every tar once from end to end, and keeps what it found in an index.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.stored.file_groups import FileGroups
from orchestrator.datasets.stored.found_files import FoundFiles
from orchestrator.datasets.stored.group_cache import Group
from orchestrator.errors import DataError
from orchestrator.storage.files import write_atomic

SUFFIX = ".tar"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGES_PER_GROUP = 32
"""Images that are read together: they follow one another in a tar."""
NUM_READERS = 8
SCHEMA = pa.schema(
    [("file", pa.int32()), ("key", pa.string()), ("label", pa.int64()), ("offset", pa.int64()), ("size", pa.int64())]
)
Samples = list[tuple[str, int, int, int]]
"""Name in the tar, label, place of the image's first byte in the tar, and its number of bytes."""


class WebDataset(FileGroups):
    """The images of a split. Raises: DataError if a tar is damaged, compressed, or holds an image without a label."""

    def __init__(self, found: FoundFiles) -> None:
        index = _index(found)
        self.found = found
        self.index = index
        self._offset_N, self._size_N = index["offset"].to_numpy(), index["size"].to_numpy()
        labels_N = torch.from_numpy(index["label"].to_numpy().copy())
        num_images = np.bincount(index["file"].to_numpy(), minlength=len(found.names))
        sizes_F = [np.diff([*range(0, number, IMAGES_PER_GROUP), number]) for number in num_images.tolist()]
        classes = [str(label) for label in range(int(labels_N.max()) + 1)]
        super().__init__(found.store, found.names, sizes_F, labels_N, classes)

    def opened(self, file: int) -> Any:
        """See FileGroups."""
        return self.found.open(self.files[file])

    def read_groups(self, opened: Any, file: int, groups: Sequence[int]) -> Sequence[Group]:
        """See FileGroups; a request a group."""
        return [self._group(opened, int(self._first_group_F[file]) + group) for group in groups]

    def keys(self) -> list[str]:
        """Return the names of the images in their tars."""
        keys: list[str] = self.index["key"].to_pylist()
        return keys

    def _group(self, opened: Any, group: int) -> Group:
        first = int(self.first_image_G[group])
        last = first + int((self.group_N[first : first + IMAGES_PER_GROUP] == group).sum())
        begin, sizes = int(self._offset_N[first]), self._size_N[first:last].tolist()
        num_bytes = int(self._offset_N[last - 1]) + sizes[-1] - begin
        content = torch.frombuffer(bytearray(opened.read_at(num_bytes, begin)), dtype=torch.uint8)
        if len(content) != num_bytes:
            raise DataError(f"{self.name(first)}: the tar ends early")
        offsets = (self._offset_N[first:last] - begin).tolist()
        return [content[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]


def load_split(data: DataConfig, split: str) -> WebDataset:
    """Return the images of data.train or data.test."""
    return WebDataset(FoundFiles.of(data, split, SUFFIX))


def _index(found: FoundFiles) -> pa.Table:
    """Return a row per image, in the order of the tars: from an earlier use on this machine, or by reading every tar once."""
    parts = (found.store.place(), sorted(found.sizes.items()))
    kept = _cache_folder() / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.parquet"
    try:
        index = pq.read_table(kept)
        if index.schema.equals(SCHEMA):
            return index
    except (OSError, pa.ArrowException):  # not there, or damaged: made again
        pass
    with ThreadPoolExecutor(NUM_READERS) as pool:
        samples = list(pool.map(lambda name: _samples(found, name), found.names))
    rows = [(file, *sample) for file, part in enumerate(samples) for sample in part]
    if not rows:
        raise DataError(
            f"{found.store.place()}: found no image in {len(found.names)} tar files, expected KEY.jpg and KEY.cls"
        )
    index = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(index, sink)
    write_atomic(kept, sink.getvalue().to_pybytes())
    return index


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gator" / "webdataset"


@dataclass
class _Sample:
    key: str
    image: tuple[str, int, int] | None = None
    label: int | None = None


def _samples(found: FoundFiles, name: str) -> Samples:
    place, size = found.store.place(name), found.sizes[name]
    samples: Samples = []
    if size < tarfile.BLOCKSIZE or any(found.open(name).read_at(tarfile.BLOCKSIZE, size - tarfile.BLOCKSIZE)):
        raise DataError(
            f"{place} is not an uncompressed tar file, or is truncated; copy it again"
        )  # tarfile would say nothing
    try:
        with tarfile.open(fileobj=_Stream(found.store.chunks(name)), mode="r|") as tar:
            for sample in _grouped(tar, place):
                if sample.image is None:
                    continue
                if sample.label is None:
                    raise DataError(
                        f"{place}: found {sample.image[0]} without a label, expected {sample.key}.cls or .json as well"
                    )
                key, offset, num_bytes = sample.image
                samples.append((key, sample.label, offset, num_bytes))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{place} is not an uncompressed tar file, or is truncated ({error}); copy it again") from error
    return samples


def _grouped(tar: tarfile.TarFile, place: str) -> Iterator[_Sample]:
    """Yield the samples of a tar: members that follow one another with the same name up to the first dot of the last part."""
    sample = _Sample("")
    for member in tar:
        if not member.isfile():
            continue
        folder, _, last = member.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != sample.key:
            yield sample
            sample = _Sample(key)
        if suffix.lower() in IMAGE_SUFFIXES:
            sample.image = (member.name, member.offset_data, member.size)
        elif suffix in ("cls", "json") and sample.label is None:
            content = tar.extractfile(member)
            sample.label = _label(content.read() if content else b"", suffix, f"{place}, {member.name}")
    yield sample


def _label(content: bytes, suffix: str, place: str) -> int:
    try:
        label = json.loads(content)
        label = label["label"] if suffix == "json" else label
        if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
            return label
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(f"{place}: found {content[:40]!r} as the label, expected a number from 0 on")


class _Stream(io.RawIOBase):
    """A file's pieces as a stream for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        parts: list[bytes] = []
        while size > 0:
            if not self._rest and not self._next():
                break
            part = self._rest[:size]
            parts.append(bytes(part))
            self._rest, size = self._rest[len(part) :], size - len(part)
        return b"".join(parts)

    def _next(self) -> bool:
        self._rest = memoryview(next(self._chunks, b""))
        return len(self._rest) > 0
