"""Rules for ops that move data: views, permutations, slices, shifts, indexing."""

import operator

import torch
from torch import Tensor
from torch.fx import Node

from gator.errors import TraceError
from gator.tracing.labels import collapse, resized, varying_dims
from gator.tracing.program import sample_args
from gator.tracing.rules.table import rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.expand.default),
    *(aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.chunk.default, aten.split.Tensor),
    *(aten.split_with_sizes.default, aten.unbind.int, aten.swapaxes.default),
    zeros=Zeros.KEPT,
)
def movement(walk: Walk, node: Node) -> Labels:
    """Follow an op that moves data by doing the same to the labels."""
    labels = walk.labels(node.args[0])
    return labels if labels is None else move(node, labels)


def move(node: Node, labels: Tensor) -> Labels:
    """Return the result of a node's op on labels, for SAMPLES samples."""
    op = aten.reshape.default if node.target is aten.view.default else node.target  # expanded labels cannot be viewed
    moved = op(labels, *sample_args(node.args[1:]), **sample_args(node.kwargs))  # type: ignore[operator]
    return [collapse(part) for part in moved] if isinstance(moved, (list, tuple)) else collapse(moved)


@rule(aten.roll.default, aten.pad.default, zeros=Zeros.KEPT)
def shift(walk: Walk, node: Node) -> Labels:
    """Follow a cyclic shift or padding of positions; of channels it locks them."""
    args = walk.arguments(node)
    labels = walk.labels(args["self"])
    if labels is None:
        return None
    if node.target is aten.roll.default:
        dims = {dim % labels.dim() for dim in args["dims"]}
    else:
        dims = {labels.dim() - 1 - number // 2 for number, size in enumerate(args["pad"]) if size != 0}
        if args["mode"] == "constant" and args["value"]:
            walk.breaks_zeros.add(node)
    if dims & set(varying_dims(labels)):
        walk.lock(labels, f"{walk.describe(node)} moves channels")
        return None
    return resized(labels, walk.shape(node))


@rule(aten.index.Tensor, zeros=Zeros.KEPT)
def gather(walk: Walk, node: Node) -> Labels:
    """Follow indexing by a tensor along positions, as of a table of relative positions; along channels it locks them."""
    source, indices = node.args
    labels = walk.labels(source)
    if labels is None:
        return None
    indexed = [dim for dim, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    first, last = indexed[0], indexed[-1]
    if len(indexed) != last - first + 1 or set(indexed) & set(varying_dims(labels)):
        walk.lock(labels, f"{walk.describe(node)} picks channels by values")
        return None
    num_new = len(walk.shape(node)) - labels.dim() + len(indexed)
    labels = labels.narrow(first, 0, 1).flatten(first, last) if last > first else labels.narrow(first, 0, 1)
    for _ in range(num_new - 1):
        labels = labels.unsqueeze(first)
    return resized(labels if num_new else labels.squeeze(first), walk.shape(node))


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, zeros=Zeros.BROKEN)
def new_value(walk: Walk, node: Node) -> Labels:
    """Return no labels: the op reads only the device and the dtype of its input."""
    return None


@rule(operator.getitem, zeros=Zeros.KEPT)
def item(walk: Walk, node: Node) -> Labels:
    """Follow one output of an op with several."""
    source, index = node.args
    parts = walk.values.get(source)  # type: ignore[arg-type]
    if not isinstance(parts, list):
        return None
    if index >= len(parts):  # type: ignore[operator]
        raise TraceError(
            f"{walk.describe(source)} splits the batch into a fixed number of parts; forward() must take any number of samples"  # type: ignore[arg-type]
        )
    return parts[index]  # type: ignore[index]
