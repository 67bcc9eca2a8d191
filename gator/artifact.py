"""A pruned network on disk: a folder with architecture.json and weights.safetensors. No pickle."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gator.architecture import Architecture
from gator.errors import ArchitectureError, ArtifactError
from gator.files import write_atomic
from gator.pruning import prune
from gator.tracing import trace

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "weights.safetensors"
DIGEST_KEY = "gator.architecture"
"""In the weights' metadata: Architecture.digest of what they belong to."""


def save_pruned(pruned: nn.Module, architecture: Architecture, folder: str | os.PathLike[str]) -> None:
    """Write a pruned network as `folder`/architecture.json and `folder`/weights.safetensors, each atomically."""
    # Copies, because safetensors refuses names that share memory, as tied parameters do.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in pruned.state_dict().items()
    }
    write_atomic(Path(folder) / WEIGHTS_FILE, save(tensors, metadata={DIGEST_KEY: architecture.digest}))
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
    inputs = [torch.zeros(shape) for shape in architecture.input_shapes]
    graph = trace(model, inputs, architecture.selection.include, architecture.selection.exclude)
    try:
        pruned = prune(model, graph, architecture)
    except ArchitectureError as error:
        raise ArtifactError(f"{folder}: build() makes another network than the one that was pruned: {error}") from error
    tensors = _read_weights(folder, architecture)
    # Into a state dict that knows the versions of its modules, which safetensors does not keep: MNASNet asks for them.
    state = pruned.state_dict()
    state.clear()
    state.update(tensors)
    try:
        pruned.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{folder}: weights and architecture do not belong together: {reason}") from error
    return pruned.eval()


def _read_weights(folder: Path, architecture: Architecture) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get(DIGEST_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); expected the file that save_pruned() wrote") from error
    if digest != architecture.digest:
        raise ArtifactError(
            f"{folder}: the weights belong to the architecture {digest or 'of nobody'}, {ARCHITECTURE_FILE} is "
            f"{architecture.digest}; put back the file that was saved with the other"
        )
    return tensors
