"""Pretrained weights, from torchvision or a file: finding and reading them, and checking that they fit the network."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.config.trial import ModelConfig
from orchestrator.errors import ConfigError, DataError, did_you_mean
from orchestrator.models.registry import CIFAR_NAME, torchvision_models

NUM_NAMES_SHOWN = 4


def is_torchvisions(weights: str) -> bool:
    """Return whether this is one of torchvision's names, which are all in capitals, and not a file name."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", weights) is not None


def check_published(model: ModelConfig) -> Any:
    """Return torchvision's entry of the weights, without downloading them. Raises: ConfigError unless it fits the model."""
    assert model.weights is not None
    if ":" in model.name or CIFAR_NAME.fullmatch(model.name):
        raise ConfigError(
            f"model.weights: {model.weights} is for torchvision's models, {model.name} has none; give a .safetensors file, or "
            "none and pretraining epochs"
        )
    known = torchvision_models().get_model_weights(model.name).__members__
    if model.weights not in known:
        raise ConfigError(
            f"model.weights: torchvision has no {model.weights} for {model.name}{did_you_mean(model.weights, list(known))}"
        )
    weights = known[model.weights]
    num_classes = len(weights.meta["categories"])
    if num_classes != model.num_classes:
        raise ConfigError(
            f"model.num_classes: found {model.num_classes}, expected {num_classes}, as for the {model.weights} weights of "
            f"{model.name}; or give your own weights as a .safetensors file"
        )
    return weights


def published_weights(model: ModelConfig) -> Mapping[str, Tensor]:
    """Download torchvision's weights, or read them from torch.hub's folder. Raises: ConfigError, DataError."""
    weights = check_published(model)
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the file's hash differs
        raise DataError(
            f"model.weights: {weights.url} cannot be downloaded ({error}); put that file into "
            f"{torch.hub.get_dir()}/checkpoints, or give a .safetensors file"
        ) from error


def check_file(path: Path) -> None:
    """Raise ConfigError unless the name is one of a safetensors file, DataError if there is no such file."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"model.weights: found {str(path)!r}, expected DEFAULT, none or a .safetensors file")
    if not path.is_file():
        raise DataError(f"model.weights: {path} not found (from {Path.cwd()})")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read a state dict. Raises: ConfigError and DataError as check_file, DataError for a damaged file."""
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"model.weights: {path} cannot be read as safetensors ({error})") from error


def load_weights(network: nn.Module, found: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; every name and shape must fit."""
    if problems := misfit(network, found):
        raise ConfigError(f"model.weights: {source} holds another network, {problems}")
    put_weights(network, found)


def misfit(network: nn.Module, found: Mapping[str, Tensor]) -> str:
    """Return the names and shapes in which a state dict differs from the network's; empty if it fits."""
    expected = network.state_dict()
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    return "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names)


def put_weights(network: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Load tensors by their names in the state dict; what is not among them stays."""
    state = network.state_dict()  # has the versions of its modules, which files lack and MNASNet needs
    state.update(found)
    network.load_state_dict(state)


def _few(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (", ..." if len(names) > NUM_NAMES_SHOWN else "")
