"""Rules for pooling, interpolation and reductions: sums over positions, not over channels."""

import torch
from torch.fx import Node

from gator.tracing.labels import spread, varying_dims
from gator.tracing.rules.table import rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
    aten.upsample_trilinear3d.vec,
    zeros=Zeros.KEPT,
)
def pooling(walk: Walk, node: Node) -> Labels:
    """Follow pooling or interpolation of the positions of each channel. Padding of a maximum is -inf, so zeros stay zeros."""
    return spread(walk.channels(node.args[0], 1, node), 1, walk.shape(node))


@rule(aten.pixel_shuffle.default, zeros=Zeros.KEPT)
def pixel_shuffle(walk: Walk, node: Node) -> Labels:
    """Follow channels that become positions: those of one output channel are tied together."""
    read = walk.channels(node.args[0], 1, node)
    return spread(walk.tie_columns(read.view(walk.shape(node)[1], -1)), 1, walk.shape(node))


@rule(aten.pixel_unshuffle.default, zeros=Zeros.KEPT)
def pixel_unshuffle(walk: Walk, node: Node) -> Labels:
    """Follow positions that become channels."""
    read = walk.channels(node.args[0], 1, node)
    return spread(read.repeat_interleave(walk.shape(node)[1] // len(read)), 1, walk.shape(node))


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, zeros=Zeros.KEPT)
def reduction(walk: Walk, node: Node) -> Labels:
    """Follow a mean, sum or norm over positions, or over the features of a head; over channels it locks them."""
    args = walk.arguments(node)
    labels = walk.labels(args["self"])
    if labels is None:
        return None
    dims = sorted(dim % labels.dim() for dim in args["dim"] or range(labels.dim()))
    over_channels = set(dims) & set(varying_dims(labels))
    if over_channels and over_channels == set(varying_dims(labels)):
        walk.lock(labels, f"{walk.describe(node)} sums over channels")
        return None
    labels = walk.tie_along(labels, over_channels)
    for dim in reversed(dims):
        labels = labels.narrow(dim, 0, 1) if args["keepdim"] else labels.select(dim, 0)
    return labels
