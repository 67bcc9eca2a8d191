"""Rules for pooling, interpolation and reductions: sums over positions, not over channels."""

import re

import torch
from torch import Tensor
from torch.fx import Node

from gator.tracing.labels import spread, varying_dims
from gator.tracing.program import with_samples
from gator.tracing.rules.table import named, rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *named("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    *named("max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"),
    *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
    aten.upsample_trilinear3d.vec,
    zeros=Zeros.KEPT,
)
def pooling(walk: Walk, node: Node) -> Labels:
    """Follow pooling or interpolation of the positions of each channel. Padding of a maximum is -inf, so zeros stay zeros.

    An input without samples has its channels first, so that the second dimension is pooled too.
    """
    num_pooled = int(re.findall(r"(\d)d", str(node.target))[0])
    if len(walk.shape(node.args[0])) < num_pooled + 2:
        walk.lock_inputs(node, "pools along the channels")
        return None
    line, value = walk.channels(node.args[0], 1, node), node.meta["val"]
    if isinstance(value, Tensor):
        return spread(line, 1, walk.shape(node))
    return [spread(line, 1, map(with_samples, part.shape)) for part in value]  # the indices of the maxima too


@rule(*named("max_unpool2d max_unpool3d"), zeros=Zeros.FIRST_INPUT)
def unpooling(walk: Walk, node: Node) -> Labels:
    """Follow values that are put back to where the maxima were."""
    walk.meet(spread(walk.channels(node.args[0], 1, node), 1, walk.shape(node.args[0])), node.args[1], node)  # type: ignore[arg-type]
    return spread(walk.channels(node.args[0], 1, node), 1, walk.shape(node))


@rule(aten.grid_sampler.default, zeros=Zeros.FIRST_INPUT)
def grid_sampling(walk: Walk, node: Node) -> Labels:
    """Follow a value that is read at other positions."""
    walk.lock(walk.labels(node.args[1]), f"{walk.describe(node)} reads them as positions")
    return spread(walk.channels(node.args[0], 1, node), 1, walk.shape(node))


@rule(aten.im2col.default, zeros=Zeros.KEPT)
def unfolding(walk: Walk, node: Node) -> Labels:
    """Follow windows of positions that become channels: those of one channel are next to each other."""
    read = walk.channels(node.args[0], 1, node)
    return spread(read.repeat_interleave(walk.shape(node)[1] // len(read)), 1, walk.shape(node))


@rule(aten.col2im.default, zeros=Zeros.KEPT)
def folding(walk: Walk, node: Node) -> Labels:
    """Follow windows that are added up at their positions."""
    read = walk.channels(node.args[0], 1, node)
    return spread(walk.tie_columns(read.view(walk.shape(node)[1], -1)), 1, walk.shape(node))


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


_ADDS_UP = (aten.sum.dim_IntList, aten.sum.default, aten.linalg_vector_norm.default)
_OVER_OPEN = (aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim)


@rule(
    *(aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.mean.default, aten.sum.default),
    *(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.prod.dim_int, aten.median.dim),
    *(
        aten.var.dim,
        aten.std.dim,
        aten.var.correction,
        aten.std.correction,
        aten.var_mean.dim,
        aten.var_mean.correction,
    ),
    zeros=Zeros.KEPT,
)
def reduction(walk: Walk, node: Node) -> Labels:
    """Follow a reduction of positions, or of the features of a head. Of channels it can be a sum, or a mean or extreme of open ones."""
    args = walk.arguments(node)
    labels = walk.labels(args["self"])
    if labels is None:
        return None
    given = args.get("dim")
    dims = sorted(dim % labels.dim() for dim in ([given] if isinstance(given, int) else given or range(labels.dim())))
    over_channels = set(dims) & set(varying_dims(labels))
    factors = walk.program.batch_factors(args["self"])
    if any(factors[dim] for dim in dims):
        walk.lock(labels, f"{walk.describe(node)} mixes samples, which have masks of their own")
        return None
    if over_channels and over_channels == set(varying_dims(labels)):
        _over_channels(walk, node, labels)
        return None
    labels = walk.tie_along(labels, over_channels)
    for dim in reversed(dims):
        labels = labels.narrow(dim, 0, 1) if args.get("keepdim") else labels.select(dim, 0)
    return [labels] * len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else labels


def _over_channels(walk: Walk, node: Node, labels: Tensor) -> None:
    """Note how a reduction of all channels reads them; its value has none."""
    value = node.all_input_nodes[0]
    if value in walk.plain:
        walk.lock(labels, f"{walk.describe(node)} is computed from all entries of a parameter, those that are cut too")
    elif node.target in _ADDS_UP:
        walk.reads.append(value)
    elif node.target in _OVER_OPEN:
        walk.normalisations.append(node)
    else:
        walk.lock(labels, f"{walk.describe(node)} depends on all channels, those that are closed too")


@rule(aten.cumsum.default, zeros=Zeros.KEPT)
def running_sum(walk: Walk, node: Node) -> Labels:
    """Follow sums up to each position; up to each channel they lock the channels."""
    labels = walk.labels(node.args[0])
    if labels is None or node.args[1] % labels.dim() not in varying_dims(labels):  # type: ignore[operator]
        return labels
    walk.lock(labels, f"{walk.describe(node)} adds up along the channels")
    return None
