"""Networks by name: torchvision's classifiers, CIFAR ResNets, and any function that returns a network."""

import logging
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gator
from orchestrator.config.trial import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models.registry import construct, failing_as, imported, skeleton
from orchestrator.models.weights import (
    check_file,
    check_published,
    is_torchvisions,
    load_weights,
    published_weights,
    read_weights,
)

logger = logging.getLogger(__name__)


def build(model: ModelConfig) -> nn.Module:
    """Return the network, with random weights or those that model.weights names.

    Raises: ConfigError if the name, an argument or the weights do not fit; DataError if the weights cannot be read.
    """
    network = construct(model)
    if model.weights is not None and is_torchvisions(model.weights):
        load_weights(network, published_weights(model), f"torchvision's file for {model.name}")
    elif model.weights is not None:
        model.with_digest()  # refuses another file than the one whose SHA-256 the config has
        load_weights(network, read_weights(Path(model.weights)), model.weights)
    return network


def build_untrained(model: ModelConfig) -> nn.Module:
    """Return the network with random weights, whatever model.weights names."""
    return build(model.model_copy(update={"weights": None}))


def example_images(input_shape: tuple[int, ...], batch_size: int) -> Tensor:
    """Return random images, (batch_size, 3, H, W), without touching the global generator."""
    return torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))


def trace_shapes(model: ModelConfig, image_size: int, num_images: int) -> gator.ChannelGraph:
    """Return the graph of the unpruned network, built without memory for weights, except for a user's own function.

    Raises: ConfigError if it cannot be built, or be traced at this image size.
    """
    network, device = _without_weights(model)
    images = _blank_images(num_images, image_size, device)
    try:
        return gator.trace(network, images)
    except gator.GatorError as error:
        raise ConfigError(f"{model.name} at an image size of {image_size}: {error}") from error


def _without_weights(model: ModelConfig) -> tuple[nn.Module, str]:
    """Return the network and its device: meta, except for a user's own function, which may not work there."""
    if ":" in model.name:
        return build_untrained(model), "cpu"
    return skeleton(lambda: build_untrained(model)), "meta"


def _blank_images(num: int, image_size: int, device: str) -> Tensor:
    """Return black images, (num, 3, image_size, image_size). Raises: ConfigError for a size too large for a tensor."""
    with failing_as(f"data.image_size: found {image_size} pixels per side, for which no image can be created"):
        return torch.zeros(num, 3, image_size, image_size, device=device)


def verify(model: ModelConfig, image_size: int) -> None:
    """Check, once a process, that gator prunes this network exactly: gator.verify() on random weights.

    Takes about 16 forward passes of two images in float64. A network that is too large for the memory is left out, with a warning.
    Raises: ConfigError if it would be pruned wrongly, cannot be built, or cannot be traced at this image size.
    """
    _verify(model.model_dump_json(), image_size)


@cache
def _verify(model_json: str, image_size: int) -> None:
    model = ModelConfig.model_validate_json(model_json)
    network = build_untrained(model)
    num_bytes = 4 * 8 * sum(parameter.numel() for parameter in network.parameters())
    if num_bytes > psutil.virtual_memory().available / 2:
        logger.warning(
            "%s is not verified before it is pruned, which takes %.0f GB of memory", model.name, num_bytes / 1e9
        )
        return
    try:
        gator.trace(network, example_images((3, image_size, image_size), 2), verify=True)
    except gator.GatorError as error:
        raise ConfigError(f"{model.name} at an image size of {image_size}: {error}") from error


def build_traced(model: ModelConfig, input_shape: tuple[int, ...]) -> tuple[nn.Module, gator.ChannelGraph]:
    """Build the unpruned network with random weights and trace it, in the same way in every process, so that architectures fit."""
    network = build_untrained(model)
    return network, gator.trace(network, example_images(input_shape, 2))


def check(model: ModelConfig) -> None:
    """Raise ConfigError or DataError where build() would, as far as this can be checked without memory or a download."""
    if ":" in model.name:
        imported(model.name)  # only looked up: a user's function may not work on the meta device
    else:
        skeleton(lambda: construct(model))
    if model.weights is not None and is_torchvisions(model.weights):
        check_published(model)
    elif model.weights is not None:
        check_file(Path(model.weights))


def num_parameter_tensors(model: ModelConfig) -> int:
    """Return how many parameter tensors the unpruned network has."""
    return sum(1 for _ in _without_weights(model)[0].parameters())


def count_macs(model: ModelConfig, image_size: int) -> int:
    """Return the MACs of the unpruned network for an image of image_size pixels per side.

    Raises: ConfigError if it takes no images of this size.
    """
    network, device = _without_weights(model)
    network.eval()
    images = _blank_images(1, image_size, device)
    with (
        failing_as(f"data.image_size: {model.name} takes no images of {image_size} pixels per side"),
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
    ):
        network(images)
    return counter.get_total_flops() // 2
