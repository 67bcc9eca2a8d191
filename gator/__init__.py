"""Gator: channel and block pruning by learned gates (arXiv 2205.15404).

graph = gator.trace(model, example_inputs)        what can be removed
gated = gator.GatedModel(model, graph)            train it with a gator.GateLoss: channels close
small = gator.prune(model, graph, gated.architecture())
"""

from gator.alignment import aligned, hardware_step
from gator.architecture import Architecture
from gator.artifact import load_pruned, save_pruned
from gator.batchnorm import reestimate_batchnorm
from gator.costs import AttentionCost, CostModel, MacsCost, MemoryCost, MixedCost, ParamsCost
from gator.errors import ArchitectureError, ArtifactError, GateError, GatorError, LatencyError, PruneError, TraceError
from gator.gated import GatedModel
from gator.gates import GateConfig
from gator.graph import Block, ChannelDim, ChannelGraph, ChannelGroup, LockedGroup
from gator.latency import LatencyMeasurement, time_forward
from gator.latency_cost import LatencyCost
from gator.latency_table import LatencyTable
from gator.loss import GateLoss
from gator.pruning import prune
from gator.recut import recut
from gator.tracing import trace

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
    "aligned",
    "hardware_step",
    "load_pruned",
    "prune",
    "recut",
    "reestimate_batchnorm",
    "save_pruned",
    "time_forward",
    "trace",
]
