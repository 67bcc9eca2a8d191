"""Data sets that are read where they are, in the format that others wrote them in."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.image_folder import check_same_classes
from orchestrator.datasets.stored import hf_parquet, webdataset
from orchestrator.datasets.stored.file_groups import FileGroups
from orchestrator.datasets.stored.grouped import GroupedImages, split_off
from orchestrator.errors import DataError

MOST_ALIKE = 0.5
"""Share of the groups whose images may all be of one class."""


@dataclass(frozen=True)
class Format:
    """A format, as splits.py knows a data set of encoded images."""

    name: str
    read: Callable[[DataConfig, str], FileGroups]
    """Returns the images of data.train or data.test."""

    def load(self, data: DataConfig, seed: int) -> tuple[GroupedImages, GroupedImages, GroupedImages]:
        """Return the images for training, for validation (held out of them), and for testing; the last two are never augmented.

        Raises: DataError if files are missing or damaged, the splits have different classes, or the images are sorted by class.
        """
        train, test = self.read(data, "train"), self.read(data, "test")
        if len(test.classes) < len(train.classes) and all(name.isdigit() for name in test.classes):
            test.classes = train.classes  # known by their numbers only, of which the last ones do not occur
        check_same_classes(train.classes, test.classes)
        self._check_is_shuffled(train, data)
        kept, held = split_off(train, data, seed, f"pack the images: {_pack(self.name)}")
        return kept, held, GroupedImages(test, np.arange(len(test)), data, augment=False)

    def class_names(self, data: DataConfig) -> list[str]:
        """Return the classes of data.train. Raises: DataError."""
        return self.read(data, "train").classes

    def num_images(self, data: DataConfig, enough: int | None) -> int | None:
        """Return the number of images in data.train. Raises: DataError."""
        return len(self.read(data, "train"))

    def _check_is_shuffled(self, train: FileGroups, data: DataConfig) -> None:
        """Raise DataError if most groups hold images of one class, since batches would hold few classes."""
        labels, first = train.labels_N.numpy(), train.first_image_G
        is_mixed = np.maximum.reduceat(labels, first) != np.minimum.reduceat(labels, first)
        if len(train.classes) > 1 and train.largest_group > 1 and 1 - is_mixed.mean() > MOST_ALIKE:
            raise DataError(
                f"{data.train}: the images are sorted by class: {(~is_mixed).sum()} of {len(first)} groups of images that are read "
                f"together hold one class each, so batches would hold few classes; shuffle them by packing: {_pack(self.name)}"
            )


def _pack(name: str) -> str:
    return f"python -m orchestrator.data pack --format {name} SRC DST"


FORMATS = {
    "hf_parquet": Format("hf_parquet", hf_parquet.load_split),
    "webdataset": Format("webdataset", webdataset.load_split),
}
"""Name of a data set -> its format."""
