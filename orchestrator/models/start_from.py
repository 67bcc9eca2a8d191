"""Trials that start from the network and the gates of an earlier one: gating.start_from."""

import torch
from torch import nn

import gator
from gator.gating.warm_start import continue_from
from gator.pruning.weights import load_weights, save_weights
from orchestrator.config.trial import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models import networks as models
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.run_dir import check

LOGITS = "logits"


def save_gates(gated: gator.GatedModel, paths: TrialPaths) -> None:
    """Write the gates' logits next to the trial's network, (C,) in the order of the graph's groups.

    Channels that a re-cut has removed have no logit any more; they get that of a closed gate.
    """
    logits_C = torch.full((gated.graph.num_channels,), -1.0)
    logits_C[gated.gates.origin_C.cpu()] = gated.gates.logits_C.detach().cpu().float()
    save_weights(paths.gates, {LOGITS: logits_C})


def save_cut(pruned: nn.Module, architecture: gator.Architecture, gated: gator.GatedModel, paths: TrialPaths) -> None:
    """Write the pruned network and its gates, for trials that start from them; the gates last, as a sign that all is written."""
    gator.save_pruned(pruned, architecture, paths.root)
    save_gates(gated, paths)


def start(gated: gator.GatedModel, network: nn.Module, model: ModelConfig, paths: TrialPaths) -> None:
    """Put a finished trial's network and gates into a fresh gated network. Raises: ConfigError if they do not fit."""
    check(str(paths.root))
    try:
        architecture = gator.Architecture.load(paths.architecture)
        architecture.check_fits(gated.graph)
        pruned = gator.load_pruned(paths.root, build=lambda: models.build_untrained(model))
        tensors, _ = load_weights(paths.gates)
        continue_from(gated, network, pruned, architecture, tensors[LOGITS].to(gated.gates.logits_C.device))
    except (gator.GatorError, KeyError) as error:
        raise ConfigError(
            f"gating.start_from: {paths.root} does not hold a trial of this network: {error}; give one of the same model and "
            "image size"
        ) from error
