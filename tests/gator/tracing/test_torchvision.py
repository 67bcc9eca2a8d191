"""The classifiers of torchvision: a member of each family is cut by half with a fifth of its blocks gone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import gator
from tests.gator.law import assert_law, random_keep
from tests.gator.zoo import randomised

slow = pytest.mark.slow

# Name -> the smallest input it takes; Inception's auxiliary classifier needs its full size.
FAMILIES = [
    pytest.param("resnet18", 32, {}),
    pytest.param("squeezenet1_1", 32, {}),
    *(
        pytest.param(name, size, kwargs, marks=slow)
        for name, size, kwargs in [
            ("alexnet", 63, {}),
            ("vgg11", 32, {}),
            ("vgg11_bn", 32, {}),
            ("resnet50", 32, {}),
            ("resnext50_32x4d", 32, {}),
            ("densenet121", 32, {}),
            ("googlenet", 32, {"init_weights": False}),
            ("inception_v3", 75, {"init_weights": False, "aux_logits": False}),
            ("inception_v3", 299, {"init_weights": False}),
            ("mobilenet_v2", 32, {}),
            ("mobilenet_v3_small", 32, {}),
            ("mnasnet0_5", 32, {}),
            ("efficientnet_b0", 32, {}),
            ("efficientnet_v2_s", 32, {}),
            ("regnet_x_400mf", 32, {}),
            ("regnet_y_400mf", 32, {}),
            ("shufflenet_v2_x0_5", 32, {}),
            ("convnext_tiny", 32, {}),
            ("swin_t", 64, {}),
            ("swin_v2_t", 64, {}),
        ]
    ),
]
over_families = pytest.mark.parametrize(("name", "size", "kwargs"), FAMILIES)


def build(name: str, size: int, kwargs: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """Return a network in float64 and an input for it."""
    inputs = torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return randomised(models.get_model(name, num_classes=10, **kwargs)), inputs


@over_families
def test_pruned_equals_masked(name: str, size: int, kwargs: dict[str, Any]) -> None:
    model, inputs = build(name, size, kwargs)
    graph = gator.trace(model, inputs)
    assert_law(model, graph, inputs, random_keep(graph, seed=1, empty=0.2))


@over_families
def test_nearly_all_macs_are_in_reach(name: str, size: int, kwargs: dict[str, Any]) -> None:
    model, inputs = build(name, size, kwargs)
    graph = gator.trace(model, inputs)
    cost = gator.MacsCost(graph)
    smallest = float(cost.of(torch.ones(len(graph.groups), dtype=torch.float64)))
    has_attention = name.startswith(("vit", "swin", "maxvit"))
    assert smallest < (0.15 if has_attention else 0.05) * cost.full
