"""Weights on disk: a plain safetensors file with a checksum of its tensors. No pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gator.errors import ArtifactError
from gator.files import write_atomic

VERSION = 2
LABEL = "gator"
"""The one entry of the file's metadata, JSON: version, sha256, owner. One, because safetensors keeps several in no order."""


def save_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], owner: str | None = None) -> None:
    """Write the tensors atomically. owner: what they belong to, such as Architecture.digest.

    Raises: ArtifactError for a value that is not a tensor.
    """
    if others := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ArtifactError(
            f"{Path(path)}: {others[0]!r} is not a tensor, expected tensors only; what a module's get_extra_state() returns cannot be saved"
        )
    # Copies, because safetensors refuses names that share memory, as tied parameters do.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    label = {"version": VERSION, "sha256": _digest(copies), "owner": owner}
    write_atomic(path, save(copies, metadata={LABEL: json.dumps(label, sort_keys=True)}))


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors that save_weights() wrote, on the CPU, and their owner.

    Raises: ArtifactError if the file is absent, was not written by save_weights(), or has changed since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            label = json.loads((file.metadata() or {}).get(LABEL, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        version, sha256, owner = (label.get(key) for key in ("version", "sha256", "owner"))
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{Path(path)}: cannot be read as weights: absent or damaged ({error})") from error
    if version != VERSION:
        raise ArtifactError(
            f"{Path(path)}: its weights have version {version or 'none'}, this program reads version {VERSION}"
        )
    if sha256 != _digest(tensors):
        raise ArtifactError(
            f"{Path(path)}: damaged, its tensors are not those that were written (their SHA-256 differs)"
        )
    return tensors, owner


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
