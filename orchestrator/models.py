"""Networks by name: torchvision's classifiers, CIFAR ResNets, and any function that returns a network."""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import gator
from gator.weights import load_weights
from orchestrator.config import ModelConfig, TrialConfig
from orchestrator.errors import ConfigError, DataError, OrchestratorError, did_you_mean
from orchestrator.paths import RunPaths

CIFAR_NAME = re.compile(r"resnet(\d+)_cifar")
NUM_NAMES_SHOWN = 4


def build(model: ModelConfig) -> nn.Module:
    """Return the network, with random weights or those that model.weights names.

    Raises: ConfigError if the name, an argument or the weights do not fit; DataError if the weights cannot be read.
    """
    network = _construct(model)
    if model.weights is not None and _is_torchvisions(model.weights):
        _load(network, _published_weights(model), f"torchvision's file for {model.name}")
    elif model.weights is not None:
        _load(network, _read_weights(Path(model.weights)), model.weights)
    return network


def example_images(input_shape: tuple[int, ...], batch_size: int) -> Tensor:
    """Return random images, (batch_size, 3, H, W), without touching the global generator."""
    return torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))


def trace_shapes(model: ModelConfig, image_size: int, num_images: int) -> gator.ChannelGraph:
    """Return the graph of the unpruned network, built without memory for weights, but for a function of the user's.

    Raises: ConfigError if it cannot be built, or be traced at this image size.
    """
    random = model.model_copy(update={"weights": None})
    is_own = ":" in model.name  # what it does on the meta device, nobody knows
    network = build(random) if is_own else skeleton(lambda: build(random))
    images = _blank_images(num_images, image_size, "cpu" if is_own else "meta")
    try:
        return gator.trace(network, images)
    except gator.GatorError as error:
        raise ConfigError(f"{model.name} at an image size of {image_size}: {error}") from error


def _blank_images(num: int, image_size: int, device: str) -> Tensor:
    """Return black images, (num, 3, image_size, image_size). Raises: ConfigError for a size that no tensor has."""
    with _failing_as(f"data.image_size: found {image_size} pixels a side, of which no image can be made"):
        return torch.zeros(num, 3, image_size, image_size, device=device)


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Say what cannot be done and why: a network, and what builds it, is anybody's code and raises from any family."""
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{what}: {type(error).__name__}{': ' if reason else ''}{reason}") from error


def build_traced(model: ModelConfig, input_shape: tuple[int, ...]) -> tuple[nn.Module, gator.ChannelGraph]:
    """Build the unpruned network, its weights still random, and trace it as every process does: architectures fit."""
    network = build(model.model_copy(update={"weights": None}))
    return network, gator.trace(network, example_images(input_shape, 2))


def check(model: ModelConfig) -> None:
    """Raise ConfigError or DataError where build() would, as far as one can tell without memory or a download."""
    if ":" in model.name:
        _imported(model.name)  # only looked up: what a function of the user's does on the meta device, nobody knows
    else:
        skeleton(lambda: _construct(model))
    if model.weights is not None and _is_torchvisions(model.weights):
        _check_published(model)
    elif model.weights is not None:
        _check_file(Path(model.weights))


def skeleton(build_network: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that a function builds, on the meta device: all shapes, and no memory for weights."""
    with _EmptyOnMeta():
        return build_network().to("meta")


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what torch.empty, zeros and ones make, the weights and statistics, on the meta device.

    torch.device("meta") does it to every tensor, also those with which torchvision's RegNet computes its widths.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_weight = func in (torch.empty, torch.zeros, torch.ones)
        if is_weight and kwargs.get("device") is None:  # layers pass device=None on
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def count_macs(model: ModelConfig, image_size: int) -> int:
    """Return the multiply-adds that the unpruned network takes for an image of so many pixels a side.

    Raises: ConfigError if it takes no images of this size.
    """
    random = model.model_copy(update={"weights": None})
    # What a function of the user's does on the meta device, nobody knows.
    is_own = ":" in model.name
    network = (build(random) if is_own else skeleton(lambda: build(random))).eval()
    images = _blank_images(1, image_size, "cpu" if is_own else "meta")
    with (
        _failing_as(f"data.image_size: {model.name} takes no images of {image_size} pixels a side"),
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
    ):
        network(images)
    return counter.get_total_flops() // 2


def load_trial(run_dir: str | os.PathLike[str], trial_id: str) -> nn.Module:
    """Return the pruned network of a finished trial, with its recorded weights, in eval mode on the CPU.

    Raises: DataError if the run directory has no such trial, it has not finished, or its files are damaged; RunDirError if the
    trial's id, its folder or a file of it leads elsewhere.
    """
    run = RunPaths(Path(run_dir))
    paths = run.trial(trial_id)
    paths.refuse_links()
    if not paths.weights.is_file():
        finished = [name for name in run.trial_ids() if run.trial(name).weights.is_file()]
        raise DataError(
            f"{paths.root} holds no {paths.weights.name}, expected the folder of a finished trial"
            f"{did_you_mean(trial_id, finished) or '; the run directory has none'}"
        )
    try:
        model = TrialConfig.model_validate_json(paths.config.read_bytes()).model
        return gator.load_pruned(paths.root, build=lambda: build(model.model_copy(update={"weights": None})))
    except (OSError, ValidationError, gator.GatorError) as error:
        raise DataError(
            f"{paths.root} holds a network that cannot be loaded: {error}; put back a copy of the folder"
        ) from error


def load_base(network: nn.Module, weights: Path) -> None:
    """Put the weights of the base network into it. Raises: DataError if they are damaged, or another network's."""
    try:
        found, _ = load_weights(weights)
    except gator.ArtifactError as error:
        raise DataError(f"base network: {error}; the same command makes it again") from error
    if problems := _misfit(network, found):
        raise DataError(
            f"base network: {weights} holds another network, {problems}; delete it, and the same command makes it again"
        )
    _put(network, found)


def _construct(model: ModelConfig) -> nn.Module:
    builder = _builder(model)
    if "num_classes" in model.kwargs:
        raise ConfigError("model.kwargs: found num_classes, expected it as model.num_classes only")
    arguments = {"num_classes": model.num_classes, **model.kwargs}
    with _failing_as(f"model.kwargs: {model.name} cannot be built with {arguments}"):
        inspect.signature(builder).bind(**arguments)
        network = builder(**arguments)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.name: {model.name} returned a {type(network).__name__}, expected a torch.nn.Module")
    return network


def _builder(model: ModelConfig) -> Callable[..., nn.Module]:
    if ":" in model.name:
        return _imported(model.name)
    if match := CIFAR_NAME.fullmatch(model.name):
        depth = int(match[1])
        if depth < 8 or depth % 6 != 2:
            raise ConfigError(
                f"model.name: found {model.name}, expected a depth of 6 n + 2: resnet20_cifar, resnet56_cifar"
            )
        return lambda **kwargs: CifarResNet(**{"blocks_per_stage": (depth - 2) // 6} | kwargs)
    torchvision_models = _torchvision_models()
    names = torchvision_models.list_models(module=torchvision_models)
    if model.name not in names:
        raise ConfigError(
            f"model.name: found {model.name!r}, expected a torchvision classifier, resnet<6n+2>_cifar or "
            f"package.module:function{did_you_mean(model.name, [*names, 'resnet20_cifar', 'resnet56_cifar'])}"
        )
    return lambda **kwargs: torchvision_models.get_model(model.name, weights=None, **kwargs)


def _torchvision_models() -> Any:
    """Return torchvision.models. It brings torch's compiler: 1.5 s and 160 MB, for which a CIFAR ResNet has no use."""
    return importlib.import_module("torchvision.models")


def _imported(name: str) -> Callable[..., nn.Module]:
    module, _, function = name.partition(":")
    with _failing_as(f"model.name: {name!r} cannot be imported as package.module:function"):
        found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise ConfigError(f"model.name: {name!r} is a {type(found).__name__}, expected a function")
    return found


def _is_torchvisions(weights: str) -> bool:
    """Return whether this is a name of torchvision's, all of which are in capitals, and not a file's."""
    return re.fullmatch(r"[A-Z][A-Z0-9_]*", weights) is not None


def _check_published(model: ModelConfig) -> Any:
    """Return torchvision's entry of the weights, nothing of it downloaded. Raises: ConfigError unless it fits the model."""
    assert model.weights is not None
    if ":" in model.name or CIFAR_NAME.fullmatch(model.name):
        raise ConfigError(
            f"model.weights: {model.weights} is for torchvision's models, {model.name} has none; give a .safetensors file, or "
            "none and pretraining epochs"
        )
    known = _torchvision_models().get_model_weights(model.name).__members__
    if model.weights not in known:
        raise ConfigError(
            f"model.weights: torchvision has no {model.weights} for {model.name}{did_you_mean(model.weights, list(known))}"
        )
    weights = known[model.weights]
    num_classes = len(weights.meta["categories"])
    if num_classes != model.num_classes:
        raise ConfigError(
            f"model.num_classes: found {model.num_classes}, expected {num_classes} as the {model.weights} weights of "
            f"{model.name} have; or give weights of your own as a .safetensors file"
        )
    return weights


def _published_weights(model: ModelConfig) -> Mapping[str, Tensor]:
    weights = _check_published(model)
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the file's hash is another
        raise DataError(
            f"model.weights: {weights.url} cannot be fetched ({error}); put that file into "
            f"{torch.hub.get_dir()}/checkpoints, or give a .safetensors file"
        ) from error


def _check_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(f"model.weights: found {str(path)!r}, expected DEFAULT, none or a .safetensors file")
    if not path.is_file():
        raise DataError(f"model.weights: there is no file {path} (from {Path.cwd()})")


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    _check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"model.weights: {path} cannot be read as safetensors ({error})") from error


def _load(network: nn.Module, found: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; every name and shape must fit."""
    if problems := _misfit(network, found):
        raise ConfigError(f"model.weights: {source} holds another network, {problems}")
    _put(network, found)


def _misfit(network: nn.Module, found: Mapping[str, Tensor]) -> str:
    """Return in which names and shapes a state dict is not the network's; empty if it is."""
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


def _put(network: nn.Module, found: Mapping[str, Tensor]) -> None:
    state = network.state_dict()  # it knows the versions of its modules, which no file keeps: MNASNet asks for them
    state.update(found)
    network.load_state_dict(state)


def _few(names: list[str]) -> str:
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (", ..." if len(names) > NUM_NAMES_SHOWN else "")


class CifarResNet(nn.Module):
    """ResNet for small images: three stages of basic blocks of width, 2 width and 4 width channels.

    Shortcuts that change the size are 1x1 convolutions (option B of He et al., arXiv 1512.03385). With 9 blocks a stage and width
    16 it is ResNet-56: 125.75 M multiply-adds at 32 px and 30 channel groups.
    """

    def __init__(self, num_classes: int, blocks_per_stage: int, width: int = 16) -> None:
        super().__init__()
        for name, value in {"blocks_per_stage": blocks_per_stage, "width": width}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks_per_stage, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks_per_stage, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 3, H, W)."""
        x = relu(self.bn1(self.conv1(x_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, channels, H / stride, W / stride)."""
        branch = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(branch + self.downsample(x))


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))
