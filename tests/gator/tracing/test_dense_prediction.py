"""Segmentation networks are cut whole; of a detector, which branches on values, the backbone is cut and put back."""

import pytest
import torch
from torchvision.models import detection, segmentation

import gator
from tests.gator.law import assert_law, random_keep
from tests.gator.zoo import randomised

SEGMENTATION = {
    "lraspp_mobilenet_v3_large": {},
    "deeplabv3_mobilenet_v3_large": {"aux_loss": True},
    "fcn_resnet50": {"aux_loss": True},
}
DETECTORS = {
    "fasterrcnn_resnet50_fpn": 64,
    "retinanet_resnet50_fpn": 64,
    "fcos_resnet50_fpn": 64,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}


@pytest.mark.slow
@pytest.mark.parametrize("include", [None, "backbone"])
@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_networks(name: str, include: str | None) -> None:
    build = getattr(segmentation, name)
    model = randomised(build(weights=None, weights_backbone=None, num_classes=5, **SEGMENTATION[name]))
    inputs = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(model, inputs, include=include)
    assert graph.groups
    assert include is None or all(group.name.startswith("backbone") for group in graph.groups)
    assert_law(model, graph, inputs, random_keep(graph, seed=0, empty=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_runs_on_its_pruned_backbone(name: str) -> None:
    size = DETECTORS[name]
    detector = randomised(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5))
    inputs = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(detector.backbone, inputs)
    detector.backbone, _ = assert_law(detector.backbone, graph, inputs, random_keep(graph, seed=0, empty=0.2))
    with torch.no_grad():
        boxes = detector(list(torch.rand(2, 3, size, size, dtype=torch.float64)))
    assert [set(image) for image in boxes] == [{"boxes", "labels", "scores"}] * 2
