"""Small trees of real JPEGs, and their shards, packed without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.parquet.format import Manifest
from orchestrator.datasets.parquet.packing import Packed, ShardTask, pack
from orchestrator.datasets.parquet.sources import ClassFolders, Source

CLASSES = ("n01", "n02", "n03")


def make_tree(folder: Path, *, per_class: int = 20) -> Path:
    """Write per_class noisy JPEGs of several sizes for each of three classes, whose mean brightness tells the class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            shape = (24 + number % 9, 32 - number % 5, 3)
            pixels = 40 + 70 * label + rng.integers(0, 40, shape)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{name}_{number}.JPEG")
    return folder


def packed(source: Path | Source, target: Path | str, **options: Any) -> Manifest:
    """Pack into shards of 16 images in row groups of 4, in this process."""
    values: dict[str, Any] = {"on_error": "refuse", "images_per_shard": 16, "rows_per_group": 4, "run": map}
    return pack(ClassFolders(str(source)) if isinstance(source, Path) else source, str(target), **values | options)


def counting(calls: list[str]) -> Callable[..., Any]:
    """Return a way to run the tasks that notes the shards it writes."""

    def run(function: Callable[[ShardTask], Packed], tasks: list[ShardTask]) -> Any:
        for task in tasks:
            calls.append(task.name)
            yield function(task)

    return run


def break_off(tree: Path, target: Path | str) -> None:
    """Pack the first and the third shard, and no more."""

    class Lost(Exception):
        pass

    def run(function: Any, tasks: list[ShardTask]) -> Any:
        yield function(tasks[0])
        yield function(tasks[2])
        raise Lost

    with pytest.raises(Lost):
        packed(tree, target, run=run)


def config(folder: Path | str, **fields: Any) -> DataConfig:
    """Return the config of the splits below a folder."""
    values = {
        "name": "parquet",
        "image_size": 16,
        "global_batch_size": 4,
        "validation_share": 0.2,
        "train": f"{folder}/train",
    }
    return DataConfig.model_validate({**values, "test": f"{folder}/val", **fields})
