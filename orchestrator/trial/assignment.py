"""What the driver of a Train run tells its workers.

In a module of its own: a trial's driver only waits for its workers, and should not import what they compute with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.trial import TrialConfig

BEST_BY = "score"
"""What the best checkpoint is the best by, among the metrics that a worker hands to Ray Train: Checkpoint.score."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the workers of one Train run are to do; goes through a plain dict to reach them."""

    name: str
    """The trial's id, or "base" for the base network."""
    config: TrialConfig
    folder: Path
    """Where rank 0 writes; holds config.json before the workers start."""
    base_weights: Path | None
    """The state dict that a trial starts from; None for the training of the base network itself."""
    is_elastic: bool = False
    """Whether it may go on with another number of workers than its last checkpoint was trained by."""
    is_again: bool = False
    """Whether workers worked at it before, so that a folder that they do not see is one that is away."""
    keeps_cut: bool = False
    """Whether the network as pruned, before its fine-tuning, and its gates are kept for later trials to start from."""
    latency_curve: Path | None = None
    """File with the measure.Curve that latencies are estimated from; None where the network's device is timed."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain strings."""
        return {
            "name": self.name,
            "config": self.config.model_dump_json(),
            "folder": str(self.folder),
            "is_elastic": self.is_elastic,
            "is_again": self.is_again,
            "keeps_cut": self.keeps_cut,
            "base_weights": None if self.base_weights is None else str(self.base_weights),
            "latency_curve": None if self.latency_curve is None else str(self.latency_curve),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Assignment":
        """Read what to_dict returned."""
        return cls(
            name=plain["name"],
            config=TrialConfig.model_validate_json(plain["config"]),
            folder=Path(plain["folder"]),
            is_elastic=plain["is_elastic"],
            is_again=plain["is_again"],
            keeps_cut=plain["keeps_cut"],
            base_weights=None if plain["base_weights"] is None else Path(plain["base_weights"]),
            latency_curve=None if plain["latency_curve"] is None else Path(plain["latency_curve"]),
        )
