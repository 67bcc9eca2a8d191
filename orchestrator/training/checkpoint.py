"""A checkpoint, as a folder: state.json says how far the trial is, tensors.pt holds what the next epoch depends on.

No pickle: tensors.pt is read with weights_only=True, everything else is JSON. Digests detect an incomplete checkpoint.
torch is imported late: the processes that only look for checkpoints do without it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config.trial import Stage
from orchestrator.errors import DamagedCheckpointError, StorageError, TrialError
from orchestrator.storage.addresses import AddressedFolder
from orchestrator.storage.files import parse_json
from orchestrator.storage.paths import CHECKPOINTS

if TYPE_CHECKING:
    import torch

VERSION = 4
NOT_JUDGED = -1.0
"""A score below every share in percent. Of equal scores the later one is the better."""
_STATE = "state.json"
_TENSORS = "tensors.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trial at the end of an epoch, or in the middle of one: the loader in `tensors` knows the step."""

    stage: Stage | Literal["done"]
    """The stage that the trial is in; "done" when there is nothing left to do."""
    epochs_done: int
    """Whole epochs of that stage; one that is under way is not counted."""
    world_size: int
    """Workers that trained it."""
    architecture: dict[str, Any] | None = None
    """Architecture.to_json() of the network as last reported, the tensors' in fine-tuning; None before and in pre-training."""
    built: dict[str, Any] | None = None
    """Architecture.to_json() of the tensors' network while gates are trained; None in the other stages."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was last reported."""
    score: float = NOT_JUDGED
    """What the best checkpoint is the best by: top-1 on the held-out images, after an epoch with a network of fixed size.

    NOT_JUDGED under gates, where later epochs have smaller networks, within an epoch, and at the end.
    """
    tensors: dict[str, Any] = field(default_factory=dict)
    """Training.state_dict() of the stage."""

    def save(self, folder: Path) -> None:
        """Write the two files into an existing folder. Raises: OSError, with its errno, for a disk that is full."""
        import torch

        with (folder / _TENSORS).open("wb") as file:  # torch's own writer raises a RuntimeError for a full disk
            torch.save(self.tensors, file)
        state = {"version": VERSION, **{key: value for key, value in vars(self).items() if key != "tensors"}}
        state["tensors_sha256"] = _digest(folder / _TENSORS)
        (folder / _STATE).write_text(json.dumps({**state, "sha256": _state_digest(state)}))

    @classmethod
    def load(cls, folder: Path, device: "torch.device") -> "Checkpoint":
        """Read a folder that `save` wrote; tensors arrive on the device.

        Raises: TrialError if another version wrote it; DamagedCheckpointError if it is not whole.
        """
        import torch

        state = _read_state(AddressedFolder(str(folder)), _STATE)
        version, tensors_digest = state.pop("version"), state.pop("tensors_sha256", None)
        if version != VERSION:
            raise TrialError(
                f"{folder} is a checkpoint of version {version}, expected {VERSION}; choose another name for the search"
            )
        if not (folder / _TENSORS).is_file() or _digest(folder / _TENSORS) != tensors_digest:
            raise DamagedCheckpointError(f"{folder / _TENSORS} is missing, cut short or changed")
        tensors = torch.load(folder / _TENSORS, map_location=device, weights_only=True)
        return cls(**state, tensors=tensors)


def _read_state(folder: AddressedFolder, name: str) -> dict[str, Any]:
    """Return the content of a state.json; checks its digest where its version has one."""
    try:
        state = parse_json(folder.read(name).decode())
        if state["version"] == VERSION and state.pop("sha256") != _state_digest(state):
            raise ValueError("its digest is that of another state")
        return state
    except (StorageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder.place(name)} is missing, cut short or changed ({error})") from error


def readable_states(folder: AddressedFolder, train_run: str) -> Iterator[dict[str, Any]]:
    """Yield state.json of the checkpoints of a Train run in the folder, the last and the best; a killed worker may have left a part of one.

    Those of other versions are left out: their trials are refused when they start.
    """
    for name in folder.names(train_run):
        if fnmatchcase(name, CHECKPOINTS):
            with suppress(DamagedCheckpointError):
                state = _read_state(folder, f"{train_run}/{name}/{_STATE}")
                if state["version"] == VERSION:
                    yield state


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def is_whole(folder: AddressedFolder, name: str) -> bool:
    """Return whether a folder holds all of a checkpoint. Ray Train makes the folder before it copies the files into it."""
    digest = hashlib.sha256()
    try:
        expected = _read_state(folder, f"{name}/{_STATE}").get("tensors_sha256")
        for chunk in folder.chunks(f"{name}/{_TENSORS}"):
            digest.update(chunk)
    except (DamagedCheckpointError, StorageError):
        return False
    return expected == digest.hexdigest()
