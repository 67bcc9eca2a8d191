"""Networks by name, their weights, and the files they are deployed as. Imports: config, storage, gator."""

from orchestrator.models.networks import build
from orchestrator.models.saved import load_trial

__all__ = ["build", "load_trial"]
