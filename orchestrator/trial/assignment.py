"""What the workers of one Ray Train run are to do. The file imports no torch: it also serves processes that only wait."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from orchestrator.config.trial import TrialConfig
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import StoragePaths, TrialPaths
from orchestrator.storage.run_dir import read_trial_config

BEST_BY = "score"
"""What the best checkpoint is the best by, among the metrics that a worker hands to Ray Train: Checkpoint.score."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A trial, or the base network, for its workers; their config is the folder's config.json."""

    name: str
    """The trial's id, or "base" for the base network."""
    folder: Path
    """Where rank 0 writes; holds config.json before the workers start."""
    base_weights: Path | None
    """The state dict that a trial starts from; None for the training of the base network itself."""
    is_elastic: bool = False
    """Whether it may resume with another number of workers than trained its last checkpoint."""
    is_again: bool = False
    """Whether workers ran before: if they do not see the folder, its storage is unreachable for the moment."""
    keeps_cut: bool = False
    """Whether the network as pruned, before its fine-tuning, and its gates are kept for later trials to start from."""
    resume_from: str | None = None
    """The place of a checkpoint to resume from as long as Ray Train has recorded none."""
    storage: StoragePaths | None = None
    """The storage if it is an object store: the workers' files then travel through it (see exchange.py), and the paths are the head's."""
    latency_curve: Path | None = None
    """File of the Curve that latencies are estimated from; None where the network's device is timed."""

    @classmethod
    def of(cls, config: TrialConfig, **fields: Any) -> Self:
        """Write config.json into the folder, and return the assignment with these fields."""
        assignment = cls(**fields)
        write_atomic(TrialPaths(assignment.folder).config, config.to_json())
        return assignment

    @property
    def config(self) -> TrialConfig:
        """What config.json holds."""
        return read_trial_config(TrialPaths(self.folder))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plain: dict[str, Any] = TypeAdapter(Assignment).dump_python(self, mode="json")
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> "Assignment":
        """Read what to_dict returned."""
        return TypeAdapter(Assignment).validate_python(plain)
