"""Packs images into Parquet shards, for the command `data pack`.

The shard of an image depends on the names of the images only. The plan is written first. Each shard is a task of its own, which
writes a record when the shard is complete, so that interrupted packing can be resumed. The manifest is written last; then the
plan and the records are removed.
"""

import hashlib
import io
import json
import logging
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import ValidationError

from orchestrator.config.base import Config
from orchestrator.datasets.parquet.format import (
    CLASSES,
    INDEX,
    INDEX_SCHEMA,
    MANIFEST,
    SCHEMA,
    Manifest,
    ShardRecord,
    Skipped,
    columns,
    open_shard,
    read_manifest,
    record_of,
    record_of_file,
)
from orchestrator.datasets.parquet.sources import Place, Source
from orchestrator.datasets.stored.folder import StoredFolder
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)
WORK = ".pack"
"""Folder of the plan and the records of complete shards, which are removed once the manifest is written, and of the lock."""
PLAN = f"{WORK}/plan.json"
LOCK = f"{WORK}/lock"
NUM_READERS = 8
"""Number of threads that compare shards with their records."""
SHUFFLE_SEED = 0
NUM_SHOWN = 20
"""Number of unreadable images that an error lists; the log lists all."""
WRITER_OPTIONS = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}
OnError = Literal["skip", "refuse"]


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write."""

    name: str
    source: Source
    """What the images are read from, on whatever node."""
    target: str
    """Address of the folder of shards."""
    images: tuple[tuple[str, int], ...]
    """Key and label of each image, in the order of the rows."""
    places: tuple[Place, ...]
    """Where the source has each of them."""
    rows_per_group: int
    fingerprint: str
    """Fingerprint of the images that go into it."""
    on_error: OnError


class PackingPlan(Config):
    """What is being packed into a folder: packing resumes if the plan is the same, also after damaged images were repaired."""

    source: str
    """The address of the images."""
    fingerprint: str
    """Fingerprint of the names of the images and their layout in shards."""


class Packed(Config):
    """The result of packing a shard."""

    name: str
    """The shard's file name."""
    fingerprint: str
    """Fingerprint of the images that the shard was to hold."""
    shard: ShardRecord | None
    """None if nothing was written: because no image can be decoded, or one cannot and on_error is refuse."""
    skipped: tuple[Skipped, ...]
    """Images that cannot be decoded."""


RunTasks = Callable[[Callable[[ShardTask], Packed], Sequence[ShardTask]], Iterable[Packed]]
"""Runs the function on every task and yields the results as they finish, in any order."""


def pack(
    source: Source, target: str, *, on_error: OnError, images_per_shard: int, rows_per_group: int, run: RunTasks
) -> Manifest:
    """Pack the images of a source, and return the manifest; shards from an earlier call are kept.

    Raises: DataError if a class has no image, if the target is inside it or holds other files, if another
    process packs into it, or if images cannot be decoded and on_error is refuse; then the shards without such images are kept.
    """
    store = StoredFolder(target)
    _check_lies_outside(store, source.store)
    classes = source.classes
    tasks = _shard_tasks(source, target, on_error, images_per_shard, rows_per_group)
    fingerprint = _digest(classes, [task.fingerprint for task in tasks])
    plan = PackingPlan(
        source=source.store.place(), fingerprint=_digest([(task.images, task.rows_per_group) for task in tasks])
    )
    _earlier(store, tasks, plan, fingerprint)  # check before anything is written there
    with store.locked(LOCK):
        earlier = _earlier(store, tasks, plan, fingerprint)  # again, now under the lock
        working_files = [PLAN, *map(_record_name, tasks)]
        store.remove_leftovers([CLASSES, INDEX, MANIFEST, *(task.name for task in tasks), *working_files])
        if earlier is None:
            store.write(PLAN, plan.to_json().encode())
        results = _results(store, tasks, earlier, run)
        skipped = tuple(image for result in results for image in result.skipped)
        _tell(source, classes, tasks, skipped)
        if skipped and on_error == "refuse":
            raise _refused(source, skipped)
        shards = tuple(result.shard for result in results if result.shard is not None)
        if not shards:
            raise DataError(
                f"{source.store.place()}: none of the {len(skipped)} images can be decoded, expected at least one"
            )
        manifest = _finish(store, classes, shards, skipped, rows_per_group, fingerprint)
        store.remove(working_files)
        return manifest


def pack_shard(task: ShardTask) -> Packed:
    """Decode every image of a shard to check it, write the shard and its record, and return the record."""
    folder = task.source.store.folder
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"node {socket.gethostname()} does not see {folder}; the images must be in a folder that every node mounts, or in an "
            "object store"
        )
    sink, num_images = pa.BufferOutputStream(), 0
    skipped: list[Skipped] = []
    with pq.ParquetWriter(sink, SCHEMA, **WRITER_OPTIONS) as writer:
        rows: list[dict[str, Any]] = []
        for row in _rows(task, skipped):
            rows.append(row)
            num_images += 1
            if len(rows) == task.rows_per_group:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=task.rows_per_group)
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=task.rows_per_group)
    shard = None
    if num_images and not (skipped and task.on_error == "refuse"):
        content = sink.getvalue()
        store = StoredFolder(task.target)
        store.write(task.name, content)
        shard = ShardRecord(name=task.name, num_images=num_images, **record_of(content).model_dump())
    result = Packed(name=task.name, fingerprint=task.fingerprint, shard=shard, skipped=tuple(skipped))
    if shard is not None:
        store.write(_record_name(task), result.to_json().encode())
    return result


def _check_lies_outside(store: StoredFolder, source: StoredFolder) -> None:
    """Raise DataError if the target is the folder of images, or is inside it and so would count as a class."""
    if (store.place() + "/").startswith(source.place() + "/") or (
        store.folder is not None
        and source.folder is not None
        and store.folder.resolve().is_relative_to(source.folder.resolve())
    ):
        raise DataError(f"{store.place()} is inside the folder of images {source.place()}; name a folder outside of it")


def _shard_tasks(
    source: Source, target: str, on_error: OnError, images_per_shard: int, rows_per_group: int
) -> list[ShardTask]:
    """Return a task for each shard: all images, shuffled and split into parts of images_per_shard."""
    images = source.images()
    random.Random(SHUFFLE_SEED).shuffle(images)
    parts = [images[first : first + images_per_shard] for first in range(0, len(images), images_per_shard)]
    return [
        ShardTask(
            name=f"shard-{number:05d}.parquet",
            source=source,
            target=target,
            images=tuple((image.key, image.label) for image in part),
            places=tuple(image.place for image in part),
            rows_per_group=rows_per_group,
            fingerprint=_digest([(image.key, image.label, image.size) for image in part], rows_per_group),
            on_error=on_error,
        )
        for number, part in enumerate(parts)
    ]


def _results(store: StoredFolder, tasks: Sequence[ShardTask], earlier: Manifest | None, run: RunTasks) -> list[Packed]:
    """Pack the shards that are missing or damaged, and return the results of all."""
    with ThreadPoolExecutor(NUM_READERS) as pool:  # reading and SHA-256 release the interpreter's lock
        records = list(pool.map(lambda task: _recorded(store, task, earlier), tasks))
    packed = {record.name: record for record in records if record is not None}
    missing = [task for task in tasks if task.name not in packed]
    logger.info("%d of %d shards exist already", len(packed), len(tasks))
    if missing:  # otherwise Ray is not started
        packed |= {result.name: result for result in run(pack_shard, missing)}
    return [packed[task.name] for task in tasks]


def _tell(source: Source, classes: Sequence[str], tasks: Sequence[ShardTask], skipped: Sequence[Skipped]) -> None:
    """Log the images that cannot be decoded, and the classes without any image that can."""
    labels = dict(image for task in tasks for image in task.images)
    left = Counter(labels.values()) - Counter(labels[image.key] for image in skipped)
    for image in skipped:
        logger.warning("%s cannot be decoded (%s)", source.store.place(image.key), image.error)
    for label in sorted(set(labels.values()) - left.keys()):
        logger.warning("class %s: none of its images can be decoded, so no network can learn it", classes[label])


def _rows(task: ShardTask, skipped: list[Skipped]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard, and add images that cannot be decoded to skipped."""
    read = task.source.reader(task.places)
    for position, (key, label) in enumerate(task.images):
        try:
            content = read(position)
            width, height = _checked_size(content)
        except (
            DataError,
            OSError,
            SyntaxError,
            TypeError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # TypeError: from TIFF files
            skipped.append(Skipped(key=key, error=str(error)))
            continue
        yield {"image": content, "label": label, "key": key, "width": width, "height": height}


def _checked_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image after decoding it completely.

    A JPEG is decoded at an eighth of its size, which reads all of its bits but saves most of the arithmetic.
    """
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
        image.draft("RGB", (1, 1))
        image.load()
        return size


def _earlier(store: StoredFolder, tasks: Sequence[ShardTask], plan: PackingPlan, fingerprint: str) -> Manifest | None:
    """Return the existing manifest, if any.

    Raises: DataError if it, or the plan of an interrupted packing, is for other images, or if neither exists but files would be
    overwritten.
    """
    if store.sizes([MANIFEST]) != [None]:
        manifest = read_manifest(store)
        if manifest.fingerprint != fingerprint:
            raise _foreign(store, MANIFEST, "the folder holds shards of other images, or packed with other options")
        return manifest
    if store.sizes([PLAN]) != [None]:
        if store.read(PLAN) != plan.to_json().encode():
            raise _foreign(store, PLAN, "packing of other images, or with other options, was interrupted here")
        return None
    names = [CLASSES, INDEX, *(task.name for task in tasks)]
    for name, size in zip(names, store.sizes(names), strict=True):
        if size is not None:
            raise _foreign(store, name, "it would be overwritten, and `data pack` has no record of writing it")
    return None


def _foreign(store: StoredFolder, name: str, what: str) -> DataError:
    return DataError(f"{store.place(name)}: {what}; nothing was changed; name another folder, or empty this one")


def _recorded(store: StoredFolder, task: ShardTask, earlier: Manifest | None) -> Packed | None:
    """Return the record of a shard from an earlier call, if the shard is still intact."""
    record = _read_record(store, task) if earlier is None else _record_in(earlier, task)
    if record is None or record.shard is None or record.fingerprint != task.fingerprint:
        return None
    if store.sizes([task.name]) != [record.shard.bytes]:
        return None
    if record_of_file(store, task.name).sha256 != record.shard.sha256:
        logger.warning("%s is damaged and will be packed again", store.place(task.name))
        return None
    return record


def _read_record(store: StoredFolder, task: ShardTask) -> Packed | None:
    if store.sizes([_record_name(task)]) == [None]:
        return None
    try:
        return Packed.model_validate_json(store.read(_record_name(task)))
    except ValidationError:  # written by another version of this program
        return None


def _record_in(manifest: Manifest, task: ShardTask) -> Packed:
    """Return the record of a shard according to the manifest of a finished packing."""
    shard = next((shard for shard in manifest.shards if shard.name == task.name), None)
    keys = {key for key, _ in task.images}
    skipped = tuple(image for image in manifest.skipped if image.key in keys)
    return Packed(name=task.name, fingerprint=task.fingerprint, shard=shard, skipped=skipped)


def _refused(source: Source, skipped: Sequence[Skipped]) -> DataError:
    shown = "\n".join(f"  {source.store.place(image.key)}: {image.error}" for image in skipped[:NUM_SHOWN])
    more = f"\n  and {len(skipped) - NUM_SHOWN} more, which the log lists" if len(skipped) > NUM_SHOWN else ""
    return DataError(
        f"{len(skipped)} images cannot be decoded; repair them, or leave them out with --on-error skip. The other shards "
        f"are kept; rerun the same command to resume:\n{shown}{more}"
    )


def _finish(
    store: StoredFolder,
    classes: list[str],
    shards: tuple[ShardRecord, ...],
    skipped: tuple[Skipped, ...],
    rows_per_group: int,
    fingerprint: str,
) -> Manifest:
    """Write classes.json, index.parquet and, last, the manifest."""
    labels = {name: label for label, name in enumerate(classes)}
    contents = {CLASSES: (json.dumps(labels, indent=2) + "\n").encode(), INDEX: _index(store, shards, rows_per_group)}
    for name, content in contents.items():
        store.write(name, content)
    manifest = Manifest(
        fingerprint=fingerprint,
        num_images=sum(shard.num_images for shard in shards),
        num_classes=len(classes),
        rows_per_group=rows_per_group,
        columns=columns(),
        files={name: record_of(content) for name, content in contents.items()},
        shards=shards,
        skipped=skipped,
    )
    store.write(MANIFEST, manifest.to_json().encode())
    return manifest


def _index(store: StoredFolder, shards: Iterable[ShardRecord], rows_per_group: int) -> pa.Buffer:
    """Return index.parquet: every column of the shards except the images."""
    tables = [
        open_shard(store.open(shard.name), store.place(shard.name), shard, rows_per_group).read(INDEX_SCHEMA.names)
        for shard in shards
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables).cast(INDEX_SCHEMA), sink)
    return sink.getvalue()


def _record_name(task: ShardTask) -> str:
    return f"{WORK}/{task.name.removesuffix('.parquet')}.json"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
