"""A Parquet file whose images several threads read at once, by row groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor


@dataclass(frozen=True)
class OpenParquet:
    """What threads may share of an open file: the source it is read from, and the footer, of which each makes a reader of its own."""

    source: Any
    metadata: pq.FileMetaData
    is_remote: bool
    """Whether a request takes long, so that those of a call are sent together."""
    checks_pages: bool = False
    """Whether the checksums of pages are verified."""

    def read(self, groups: Sequence[int], column: str) -> pa.ChunkedArray:
        """Return a column of row groups. Raises: OSError or ArrowException."""
        reader = pq.ParquetFile(
            self.source,
            metadata=self.metadata,
            pre_buffer=self.is_remote,
            page_checksum_verification=self.checks_pages,
        )
        return reader.read_row_groups(list(groups), columns=[column], use_threads=False).column(0)

    def split(self, column: pa.ChunkedArray, groups: Sequence[int]) -> list[list[Tensor]]:
        """Return the image files of each of the row groups that were read, (bytes,) uint8 each."""
        found, first = [], 0
        for group in groups:
            size = self.metadata.row_group(group).num_rows
            part = column.slice(first, size)
            found.append(_image_bytes(part.chunk(0) if part.num_chunks == 1 else part.combine_chunks()))
            first += size
        return found


def _image_bytes(images: pa.Array) -> list[Tensor]:
    """Return the image files in a column of bytes, copied: Arrow reads several row groups into one buffer of up to twice their size."""
    offsets_type = np.int64 if pa.types.is_large_binary(images.type) else np.int32
    _, offsets, values = images.buffers()
    ends = np.frombuffer(offsets, offsets_type)[images.offset : images.offset + len(images) + 1]
    content = torch.from_numpy(np.frombuffer(values, np.uint8)[ends[0] : ends[-1]].copy())
    return list(content.split(np.diff(ends).tolist()))
