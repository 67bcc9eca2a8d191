"""Synthetic images that a small network learns in an epoch: a coloured square per class, in noise. For tests and dry runs."""

import torch
from torch import Tensor

from orchestrator.config.trial import DataConfig

NUM_CLASSES = 4
NUM_TRAIN, NUM_TEST = 512, 128


def load(data: DataConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) for training and for testing, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    count, size = NUM_TRAIN + NUM_TEST, data.image_size
    labels = torch.arange(count) % NUM_CLASSES
    images = torch.randn(count, 3, size, size, generator=generator)
    half = size // 2
    for label in range(NUM_CLASSES):
        top, left = half * (label // 2), half * (label % 2)
        images[labels == label, :, top : top + half, left : left + half] += 1.0
    return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])
