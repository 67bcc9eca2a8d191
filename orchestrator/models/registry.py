"""Maps the names of networks to the functions that build them: torchvision, CIFAR ResNets, package.module:function."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from orchestrator.config.trial import ModelConfig
from orchestrator.errors import ConfigError, OrchestratorError, did_you_mean, in_one_line
from orchestrator.models.cifar_resnet import CifarResNet

CIFAR_NAME = re.compile(r"resnet(\d+)_cifar")
CIFAR_NAMES = [f"resnet{depth}_cifar" for depth in (8, 14, 20, 32, 44, 56, 110)]
"""Those of papers, to guess a misspelled one."""


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn any exception of a network, or of the function that builds it, into a ConfigError that says what failed."""
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {in_one_line(error)}") from error


def skeleton(build_network: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that a function builds on the meta device: with all shapes, and without memory for weights."""
    with _EmptyOnMeta():
        return build_network().to("meta")


class _EmptyOnMeta(TorchFunctionMode):
    """Creates the tensors of torch.empty, zeros and ones, that is weights and statistics, on the meta device.

    torch.device("meta") would affect every tensor, including those with which torchvision's RegNet computes its widths.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_weight = func in (torch.empty, torch.zeros, torch.ones)
        if is_weight and kwargs.get("device") is None:  # layers pass device=None on
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def construct(model: ModelConfig) -> nn.Module:
    """Return the network that a config names, with random weights. Raises: ConfigError if it cannot be built."""
    builder = _builder(model)
    if "num_classes" in model.kwargs:
        raise ConfigError("model.kwargs: found num_classes; set model.num_classes instead")
    arguments = {"num_classes": model.num_classes, **model.kwargs}
    with failing_as(f"model.kwargs: {model.name} cannot be built with {arguments}"):
        inspect.signature(builder).bind(**arguments)
        network = builder(**arguments)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.name: {model.name} returned a {type(network).__name__}, expected a torch.nn.Module")
    return network


def _builder(model: ModelConfig) -> Callable[..., nn.Module]:
    if ":" in model.name:
        return imported(model.name)
    if match := CIFAR_NAME.fullmatch(model.name):
        depth = int(match[1])
        if depth < 8 or depth % 6 != 2:
            raise ConfigError(
                f"model.name: found {model.name}, expected a depth of 6 n + 2: resnet20_cifar, resnet56_cifar"
            )
        return lambda **kwargs: CifarResNet(**{"blocks_per_stage": (depth - 2) // 6} | kwargs)
    zoo = torchvision_models()
    names = zoo.list_models(module=zoo)
    if model.name not in names:
        raise ConfigError(
            f"model.name: found {model.name!r}, expected a torchvision classifier, resnet<6n+2>_cifar or "
            f"package.module:function{did_you_mean(model.name, [*names, *CIFAR_NAMES])}"
        )
    return lambda **kwargs: zoo.get_model(model.name, weights=None, **kwargs)


def torchvision_models() -> Any:
    """Import torchvision.models late: it loads torch's compiler (1.5 s and 160 MB), which a CIFAR ResNet does not need."""
    return importlib.import_module("torchvision.models")


def imported(name: str) -> Callable[..., nn.Module]:
    """Return the function of "package.module:function". Raises: ConfigError if it cannot be imported or called."""
    module, _, function = name.partition(":")
    with failing_as(f"model.name: {name!r} cannot be imported as package.module:function"):
        found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ConfigError(f"model.name: {name!r} is a {type(found).__name__}, expected a function")
    return found
