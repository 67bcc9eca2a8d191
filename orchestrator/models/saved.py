"""Reads and writes the networks of a run: pruned networks of finished trials, and base networks."""

import os
from pathlib import Path

from torch import nn

import gator
from gator.pruning.weights import load_weights, save_weights
from orchestrator.errors import DataError, RunDirError, did_you_mean
from orchestrator.models.networks import build_untrained
from orchestrator.models.weights import misfit, put_weights
from orchestrator.storage.fetching import fetched
from orchestrator.storage.paths import BasePaths, RunPaths
from orchestrator.storage.run_dir import read_trial_config


def load_trial(run_dir: str | os.PathLike[str], trial_id: str) -> nn.Module:
    """Return the pruned network of a finished trial, with its recorded weights, in eval mode on the CPU.

    run_dir: a path, or an address such as s3://bucket/runs/digits.
    Raises: DataError if the run directory has no such trial, it has not finished, or its files are damaged; RunDirError if the
    trial's id leads out of the run directory, or its folder or a file in it is a link.
    """
    RunPaths(Path()).trial(trial_id)  # refuses ids that lead elsewhere
    with fetched(os.fspath(run_dir), f"trials/{trial_id}/*") as folder:
        return _load_trial(RunPaths(folder), trial_id)


def _load_trial(run: RunPaths, trial_id: str) -> nn.Module:
    paths = run.trial(trial_id)
    paths.refuse_links()
    if not paths.weights.is_file():
        finished = [name for name in run.trial_ids() if run.trial(name).weights.is_file()]
        raise DataError(
            f"{paths.root} holds no {paths.weights.name}, expected the folder of a finished trial"
            f"{did_you_mean(trial_id, finished) or '; the run directory has none'}"
        )
    try:
        model = read_trial_config(paths).model
        return gator.load_pruned(paths.root, build=lambda: build_untrained(model))
    except (OSError, RunDirError, gator.GatorError) as error:
        raise DataError(
            f"{paths.root} holds a network that cannot be loaded: {error}; restore the folder from a copy"
        ) from error


def load_base(network: nn.Module, weights: Path) -> None:
    """Load the weights of the base network into it. Raises: DataError if they are damaged, or those of another network."""
    try:
        found, _ = load_weights(weights)
    except gator.ArtifactError as error:
        raise DataError(f"base network: {error}; rerun the same command to create it again") from error
    if problems := misfit(network, found):
        raise DataError(
            f"base network: {weights} holds another network, {problems}; delete it, then rerun the same command to create it again"
        )
    put_weights(network, found)


def save_base(network: nn.Module, paths: BasePaths) -> None:
    """Write the state dict of a base network."""
    save_weights(paths.weights, network.state_dict())
