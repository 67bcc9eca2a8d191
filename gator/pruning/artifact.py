"""A pruned network on disk: a folder with architecture.json and weights.safetensors. No pickle."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from gator.errors import ArchitectureError, ArtifactError, TraceError
from gator.graph.architecture import Architecture
from gator.pruning.prune import prune
from gator.pruning.weights import load_weights, save_weights
from gator.tracing.inputs import zero_inputs
from gator.tracing.trace import trace

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"


def save_pruned(pruned: nn.Module, architecture: Architecture, folder: str | os.PathLike[str]) -> None:
    """Write a pruned network as `folder`/architecture.json and `folder`/weights.safetensors, each atomically."""
    save_weights(Path(folder) / WEIGHTS_FILE, pruned.state_dict(), owner=architecture.digest)
    architecture.save(Path(folder) / ARCHITECTURE_FILE)


def load_pruned(folder: str | os.PathLike[str], build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network of save_pruned(), in eval mode and the saved dtypes: build, trace, prune, load strictly.

    build: returns the unpruned network, for instance torchvision.models.resnet50 or a lambda; the loaded network stays on its
    device.

    Raises: ArchitectureError if architecture.json cannot be read; ArtifactError if build() returns another network than the one
    that was pruned, or the weights are missing, damaged or of another architecture.
    """
    folder = Path(folder)
    architecture = Architecture.load(folder / ARCHITECTURE_FILE)
    tensors, owner = load_weights(folder / WEIGHTS_FILE)
    _check_owner(folder, owner, architecture)
    pruned = _rebuilt(folder, architecture, build)
    for name, tensor in pruned.state_dict(keep_vars=True).items():
        if name in tensors:  # load_state_dict() would round to the dtypes that build() happens to choose
            tensor.data = tensor.data.to(tensors[name].dtype)
    # Into a state dict with the versions of its modules, which safetensors does not store: MNASNet reads them.
    state = pruned.state_dict()
    state.clear()
    state.update(tensors)
    try:
        pruned.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder}: weights and architecture do not belong together: {reason}") from error
    return pruned.eval()


def _rebuilt(folder: Path, architecture: Architecture, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the pruned network with the weights of build()."""
    if isinstance(build, nn.Module):
        raise ArtifactError(
            f"{folder}: build is a {type(build).__name__}; expected a function that returns the network, such as lambda: resnet50()"
        )
    model = build()
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"{folder}: build() returns a {type(model).__name__}; expected the network that was pruned")
    if next(model.parameters(), torch.empty(0)).is_meta:
        raise ArtifactError(
            f"{folder}: build() returns a network on the meta device, which has no weights; use a real device"
        )
    try:
        inputs = zero_inputs(model, architecture.input_shapes, architecture.input_dtypes)
        graph = trace(model, inputs, architecture.selection.include, architecture.selection.exclude)
        return prune(model, graph, architecture)
    except (ArchitectureError, TraceError) as error:
        raise ArtifactError(
            f"{folder}: build() returns another network than the one that was pruned: {error}"
        ) from error


def _check_owner(folder: Path, owner: str | None, architecture: Architecture) -> None:
    """Raise ArtifactError unless the weights were saved with this architecture."""
    if owner != architecture.digest:
        raise ArtifactError(
            f"{folder}: the weights belong to the architecture {owner or 'unknown'}, {ARCHITECTURE_FILE} is "
            f"{architecture.digest}; restore the file that was saved with the other"
        )
