"""What a training is done with on one rank."""

from dataclasses import dataclass

from orchestrator.config.trial import TrialConfig
from orchestrator.datasets.splits import DataSplits
from orchestrator.storage.paths import TrialPaths
from orchestrator.training.ranks import Ranks
from orchestrator.training.saver import Saver


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all stages share; the worker makes it."""

    config: TrialConfig
    paths: TrialPaths
    """Where rank 0 writes."""
    splits: DataSplits
    ranks: Ranks
    saver: Saver
    is_elastic: bool = False
    """Whether the number of ranks may change, so that their shares of a global batch may differ by an image."""
