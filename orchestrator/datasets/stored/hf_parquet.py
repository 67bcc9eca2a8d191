"""The data set `hf_parquet`: images in Parquet files as Hugging Face's datasets have them, read where they are.

    data: {name: hf_parquet, train: "s3://bucket/imagenet/data/train-*.parquet", test: "...", image_size: 224, ...}

A row holds an image as struct<bytes, path> or as bytes, and an integer label; the names of the classes are in the files' metadata.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.stored.file_groups import FileGroups
from orchestrator.datasets.stored.found_files import FoundFiles
from orchestrator.datasets.stored.group_cache import Group
from orchestrator.datasets.stored.open_parquet import OpenParquet
from orchestrator.errors import DataError

SUFFIX = ".parquet"
NUM_READERS = 8
"""Threads that read the labels of the files, a request each."""
MAX_GROUP_BYTES = 64 * 2**20
"""A worker keeps about 70 row groups, and from a store those of the next 256 images."""


class HfParquet(FileGroups):
    """The images of a split. Raises: DataError if a file is not Parquet, has other columns, or has no image or no label in a row."""

    def __init__(self, found: FoundFiles, image_column: str | None = None, label_column: str | None = None) -> None:
        first = _parquet(found, found.names[0])
        schema, features = first.schema_arrow, _features(first.schema_arrow)
        place = found.store.place(found.names[0])
        self.found, self.schema = found, schema
        self.image_column = image_column or _only(schema, features, "Image", _is_image, place)
        self.label_column = label_column or _only(schema, features, "ClassLabel", _is_label, place)
        for column in (self.image_column, self.label_column):
            if column not in schema.names:
                raise DataError(f"{place}: found no column {column}, expected one of {', '.join(schema.names)}")
        with ThreadPoolExecutor(NUM_READERS) as pool:
            parts = list(pool.map(self._labels_and_sizes, found.names))
        labels_N = torch.from_numpy(np.concatenate([labels for labels, _ in parts]))
        names = features.get(self.label_column, {}).get("names")
        classes = [str(label) for label in range(int(labels_N.max()) + 1)] if names is None else list(map(str, names))
        if labels_N.min() < 0 or labels_N.max() >= len(classes):
            raise DataError(
                f"{found.store.place()}: found labels from {labels_N.min()} to {labels_N.max()}, expected 0 to {len(classes) - 1}"
            )
        super().__init__(found.store, found.names, [sizes for _, sizes in parts], labels_N, classes)

    def opened(self, file: int) -> OpenParquet:
        """See FileGroups."""
        source = self.found.open(self.files[file])
        return OpenParquet(source, _parquet(self.found, self.files[file], source).metadata, self.is_remote)

    def read_groups(self, opened: OpenParquet, file: int, groups: Sequence[int]) -> Sequence[Group]:
        """See FileGroups."""
        column = opened.read(groups, self.image_leaf)
        if pa.types.is_struct(column.type):
            column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
        if column.null_count:
            raise DataError(
                f"{self.store.place(self.files[file])}, row groups {list(groups)}: found a row without the image's bytes"
            )
        return opened.split(column, groups)

    def keys(self) -> list[str]:
        """Return a name for each image: its path in the file, if it has one, else the file's name and the row."""
        is_struct = pa.types.is_struct(self.schema.field(self.image_column).type)
        keys: list[str] = []
        for name in self.files:
            opened = _parquet(self.found, name)
            paths: list[str | None] = [None] * opened.metadata.num_rows
            if is_struct:
                column = opened.read(columns=[f"{self.image_column}.path"]).column(0).combine_chunks()
                paths = pa.chunked_array([column]).combine_chunks().field("path").to_pylist()
            keys += [path or f"{name}#{row}" for row, path in enumerate(paths)]
        return keys

    @property
    def image_leaf(self) -> str:
        """Return the column of the images' bytes."""
        is_struct = pa.types.is_struct(self.schema.field(self.image_column).type)
        return f"{self.image_column}.bytes" if is_struct else self.image_column

    def _labels_and_sizes(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the labels of a file's rows, and the number of rows in each of its row groups."""
        opened, place = _parquet(self.found, name), self.found.store.place(name)
        if not opened.schema_arrow.equals(self.schema):
            raise DataError(f"{place}: found other columns than in {self.found.names[0]}, expected the same")
        labels = opened.read(columns=[self.label_column]).column(0)
        if labels.null_count:
            raise DataError(f"{place}: found {labels.null_count} rows without a label")
        groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP_BYTES:
            raise DataError(
                f"{place}: found row groups of {largest / 2**20:.0f} MiB, expected at most {MAX_GROUP_BYTES // 2**20}, since they "
                "are read as a whole and a worker keeps about 70; pack the images: python -m orchestrator.data pack --format hf_parquet"
            )
        return labels.to_numpy().astype(np.int64), np.array([group.num_rows for group in groups], dtype=np.int64)


def load_split(data: DataConfig, split: str) -> HfParquet:
    """Return the images of data.train or data.test."""
    return HfParquet(FoundFiles.of(data, split, SUFFIX), data.image_column, data.label_column)


def _parquet(found: FoundFiles, name: str, source: Any = None) -> pq.ParquetFile:
    """Open a file, of which `source` may be open already."""
    try:
        return pq.ParquetFile(source or found.open(name), pre_buffer=not found.store.is_local)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{found.store.place(name)} is not a Parquet file, or is truncated ({error})") from error


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return what Hugging Face's metadata says of each column; nothing if there is none."""
    try:
        features: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    is_mapping = isinstance(features, dict)
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)} if is_mapping else {}


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _only(schema: pa.Schema, features: dict[str, Any], feature: str, fits: Any, place: str) -> str:
    """Return the column that has the feature, or the only one of a type that fits."""
    columns = [name for name in schema.names if features.get(name, {}).get("_type") == feature]
    columns = columns or [field.name for field in schema if fits(field.type)]
    if len(columns) != 1:
        kind = "image" if feature == "Image" else "label"
        raise DataError(
            f"{place}: found {', '.join(columns) or 'no column'} as the {kind}s, expected one column; set data.{kind}_column to one of "
            f"{', '.join(schema.names)}"
        )
    return columns[0]


def _is_label(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))
