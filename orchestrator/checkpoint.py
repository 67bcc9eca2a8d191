"""Where a trial stands, as a folder: state.json says how far it came, tensors.pt holds what the next epoch depends on.

No pickle: tensors.pt is read with weights_only=True, everything else is JSON.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator.errors import ClusterError, TrialError
from orchestrator.loop import Stage

VERSION = 3
_STATE = "state.json"
_TENSORS = "tensors.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trial after a whole number of epochs."""

    stage: Stage | Literal["done"]
    """The stage it stands in; "done" when there is nothing left to do."""
    epochs_done: int
    """Whole epochs of that stage."""
    world_size: int
    """Workers that trained it."""
    architecture: dict[str, Any] | None = None
    """Architecture.to_json() of the network as pruned now, the tensors' in fine-tuning; None in pre-training."""
    built: dict[str, Any] | None = None
    """Architecture.to_json() of the tensors' network while gates are trained; None in the other stages."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was last reported."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """Training.state_dict() of the stage."""

    def save(self, folder: Path) -> None:
        """Write the two files into an existing folder."""
        state = {"version": VERSION, **{key: value for key, value in vars(self).items() if key != "tensors"}}
        torch.save(self.tensors, folder / _TENSORS)
        (folder / _STATE).write_text(json.dumps(state))

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Checkpoint":
        """Read a folder that `save` wrote; tensors arrive on the device.

        Raises: TrialError if another version wrote it.
        """
        state = json.loads((folder / _STATE).read_text())
        version = state.pop("version")
        if version != VERSION:
            raise TrialError(
                f"{folder} is a checkpoint of version {version}, expected {VERSION}; take another name for the search"
            )
        tensors = torch.load(folder / _TENSORS, map_location=device, weights_only=True)
        return cls(**state, tensors=tensors)


def check_world_size(train_folder: Path, world_size: int) -> None:
    """Raise ClusterError if a trial under way, one with a checkpoint in Ray Train's folder, has another number of workers.

    Before anything starts, so that no trial fails of it and all can go on once the number is put back.
    """
    for file in sorted(train_folder.glob(f"*/checkpoint_*/{_STATE}")):
        state = json.loads(file.read_text())
        if state["stage"] != "done" and state.get("world_size", world_size) != world_size:
            raise ClusterError(
                f"{file.parent.parent.name} stands in epoch {state['epochs_done']} of stage {state['stage']!r}, trained by "
                f"{state['world_size']} workers, but the cluster now gives {world_size}; set workers_per_trial back to "
                f"{state['world_size']}, or start the search under another name: --set name=..."
            )
