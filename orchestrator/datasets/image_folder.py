"""Images on disk in ImageNet's layout: a folder for training and one for validation, in each a folder of images per class.

    data: {name: image_folder, train: /data/imagenet/train, val: /data/imagenet/val, image_size: 224, ...}

Classes are numbered by the sorted names of the folders. Images are decoded when they are asked for, by data.num_loader_workers
processes a worker; nothing is kept in memory.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms import v2

from orchestrator.config import DataConfig
from orchestrator.datasets.images import stratified
from orchestrator.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
CROPPED_SHARE = 0.875
"""What the centre crop keeps of the shorter side: 224 of 256 pixels."""


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Files and labels; an item is ((3, H, W) float32, () int64)."""

    def __init__(self, files: list[Path], labels_N: Tensor, transform: Callable[[Image], Tensor]) -> None:
        self.files = files
        self.labels = labels_N
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            image = pil_loader(str(self.files[index]))
        except OSError as error:  # Pillow's errors are its children
            raise DataError(f"{self.files[index]} cannot be decoded ({error}); repair or remove it") from error
        return self.transform(image), self.labels[index]


def load(data: DataConfig, seed: int) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
    """Return the images to train on, held out of those, and to validate with; the last two are never augmented.

    Raises: DataError if a folder is absent, has no class or an empty one, or the two have other classes.
    """
    train_classes, val_classes = class_names(_folder(data, "train")), class_names(_folder(data, "val"))
    if train_classes != val_classes:
        odd = sorted(set(train_classes) ^ set(val_classes))
        raise DataError(
            f"data.train and data.val: found different classes, expected the same; {', '.join(odd[:5])} is in one only"
        )
    files, labels = _list_files(_folder(data, "train"), train_classes)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[: data.num_train]
    held = stratified(labels[order], data.holdout)

    def subset(chosen: Tensor, augment: bool) -> ImageFiles:
        return ImageFiles(
            [files[index] for index in chosen.tolist()], labels[chosen], _transform(data.image_size, augment)
        )

    val = ImageFiles(*_list_files(_folder(data, "val"), val_classes), _transform(data.image_size, augment=False))
    return subset(order[~held], data.augment), subset(order[held], False), val


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted. Raises: DataError if the folder is absent or has none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder, expected one with a folder of images per class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise DataError(f"{folder}: found no class folders, expected ImageNet's layout: {folder}/CLASS/IMAGE.jpg")
    return names


def _folder(data: DataConfig, split: str) -> Path:
    folder = getattr(data, split)
    if folder is None:
        raise DataError(f"data.{split} is missing; data set image_folder needs the folders data.train and data.val")
    return Path(folder)


def _list_files(folder: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise DataError(f"{folder / name}: found no image, expected at least one ({', '.join(IMG_EXTENSIONS)})")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels)


def _transform(image_size: int, augment: bool) -> Callable[[Image], Tensor]:
    crop: list[torch.nn.Module] = [v2.Resize(round(image_size / CROPPED_SHARE)), v2.CenterCrop(image_size)]
    if augment:
        crop = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
    transform: Callable[[Image], Tensor] = v2.Compose(
        [*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    return transform
