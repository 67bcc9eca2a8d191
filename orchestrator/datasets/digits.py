"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real images that are installed with a package."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from orchestrator.config import DataConfig
from orchestrator.datasets.images import prepare

NUM_CLASSES = 10
VAL_SHARE = 0.2
MEAN, STD = 4.884 / 16, 6.017 / 16  # of the 1,797 images, whose pixels are 0 to 16


def load(data: DataConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) to train on, 1,437, and to validate with, 360: always the same, in equal shares of each digit."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16
    labels = torch.from_numpy(bunch.target).long()
    train, val = train_test_split(range(len(labels)), test_size=VAL_SHARE, stratify=bunch.target, random_state=0)
    ready = prepare(images, data.image_size, MEAN, STD)
    return (ready[train], labels[train]), (ready[val], labels[val])
