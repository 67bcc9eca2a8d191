"""A network that asks for more memory than there is, when told to."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.cifar_resnet import CifarResNet

NO_MEMORY_WHILE = "NO_MEMORY_WHILE"
"""Environment variable that names a file: as long as it is there, every forward pass asks for MORE_THAN_THERE_IS."""
MORE_THAN_THERE_IS = 2**50


class HungryResNet(CifarResNet):
    """A CIFAR ResNet of depth 8."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W)."""
        if not torch.compiler.is_exporting() and Path(os.environ[NO_MEMORY_WHILE]).exists():
            torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)  # refused by the allocator itself
        return super().forward(x_NCHW)


def hungry_resnet8(num_classes: int, **kwargs: Any) -> HungryResNet:
    """Return the network with random weights."""
    return HungryResNet(num_classes, blocks_per_stage=1, **kwargs)
