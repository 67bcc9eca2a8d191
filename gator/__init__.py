"""Gator: channel and block pruning by learned gates (arXiv 2205.15404).

graph = gator.trace(model, example_inputs)        the channel groups that can be pruned
gated = gator.GatedModel(model, graph)            train it with a gator.GateLoss: channels close
small = gator.prune(model, graph, gated.architecture())
"""

from gator.checking.traced import trace
from gator.checking.verify import verify
from gator.costs.base import CostModel
from gator.costs.counted import AttentionCost, MacsCost, MemoryCost, MixedCost, ParamsCost
from gator.errors import (
    ArchitectureError,
    ArtifactError,
    GateError,
    GatorError,
    LatencyError,
    PruneError,
    TraceError,
    VerificationError,
)
from gator.gating.alignment import aligned, hardware_step
from gator.gating.gated import GatedModel
from gator.gating.gates import GateConfig
from gator.gating.loss import GateLoss
from gator.gating.recut import recut
from gator.graph.architecture import Architecture
from gator.graph.graph import Block, ChannelDim, ChannelGraph, ChannelGroup, LockedGroup
from gator.latency.cost import LatencyCost
from gator.latency.forward import time_forward
from gator.latency.measurement import LatencyMeasurement
from gator.latency.table import LatencyTable
from gator.pruning.artifact import load_pruned, save_pruned
from gator.pruning.batchnorm import reestimate_batchnorm
from gator.pruning.prune import prune

__all__ = [
    "Architecture",
    "ArchitectureError",
    "ArtifactError",
    "AttentionCost",
    "Block",
    "ChannelDim",
    "ChannelGraph",
    "ChannelGroup",
    "CostModel",
    "GateConfig",
    "GateError",
    "GateLoss",
    "GatedModel",
    "GatorError",
    "LatencyCost",
    "LatencyError",
    "LatencyMeasurement",
    "LatencyTable",
    "LockedGroup",
    "MacsCost",
    "MemoryCost",
    "MixedCost",
    "ParamsCost",
    "PruneError",
    "TraceError",
    "VerificationError",
    "aligned",
    "hardware_step",
    "load_pruned",
    "prune",
    "recut",
    "reestimate_batchnorm",
    "save_pruned",
    "time_forward",
    "trace",
    "verify",
]
