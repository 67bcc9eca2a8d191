"""A pruned network on disk: a folder with architecture.json and weights.safetensors. No pickle."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from gator.architecture import Architecture
from gator.errors import ArchitectureError, ArtifactError
from gator.files import write_atomic
from gator.pruning import prune
from gator.tracing import trace

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"


def save_pruned(pruned: nn.Module, architecture: Architecture, folder: str | os.PathLike[str]) -> None:
    """Write a pruned network as `folder`/architecture.json and `folder`/weights.safetensors, each atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in pruned.state_dict().items()}
    write_atomic(Path(folder) / WEIGHTS_FILE, save(tensors, metadata={"fingerprint": architecture.fingerprint}))
    architecture.save(Path(folder) / ARCHITECTURE_FILE)


def load_pruned(folder: str | os.PathLike[str], build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network of save_pruned(), in eval mode on the CPU: build, trace, prune, load strictly.

    build: makes the unpruned network that was pruned, for instance torchvision.models.resnet50 or a lambda.

    Raises: ArchitectureError if architecture.json cannot be read; ArtifactError if build() makes another network than the one
    that was pruned, or the weights are missing, damaged or of another architecture.
    """
    folder = Path(folder)
    architecture = Architecture.load(folder / ARCHITECTURE_FILE)
    model = build()
    graph = trace(model, [torch.zeros(shape) for shape in architecture.input_shapes])
    try:
        pruned = prune(model, graph, architecture)
    except ArchitectureError as error:
        raise ArtifactError(f"{folder}: build() makes another network than the one that was pruned: {error}") from error
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder / WEIGHTS_FILE}: cannot be read ({error}); expected the file that save_pruned() wrote"
        ) from error
    state = (
        pruned.state_dict()
    )  # for the versions of its modules, which safetensors does not keep: MNASNet asks for them
    state.clear()
    state.update(tensors)
    try:
        pruned.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder}: weights and architecture do not belong together: {reason}") from error
    return pruned.eval()
