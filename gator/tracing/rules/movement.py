"""Rules for ops that move data: views, permutations, slices, shifts, indexing, concatenation."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from gator.errors import TraceError
from gator.tracing.labels import STATIC, collapse, narrowed, resized, varying_dims
from gator.tracing.program import sample_args
from gator.tracing.rules.table import named, rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten
MAXIMA = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


@rule(
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.expand.default),
    *(aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.chunk.default, aten.split.Tensor),
    *(aten.split_with_sizes.default, aten.unbind.int, aten.swapaxes.default),
    *named("t numpy_T mT swapdims flip repeat tile ravel broadcast_to fliplr flipud unfold rot90"),
    *(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, aten.squeeze.default),
    *(aten.squeeze.dims, aten.repeat_interleave.self_int, aten.tensor_split.sections, aten.tensor_split.indices),
    zeros=Zeros.KEPT,
)
def movement(walk: Walk, node: Node) -> Labels:
    """Follow an op that moves data by doing the same to the labels. An empty value carries no channels."""
    labels = walk.labels(node.args[0])
    moved = labels if labels is None else move(node, labels)
    if labels is not None and varying_dims(labels) and node.target in (aten.select.int, aten.unbind.int):
        for part in moved if isinstance(moved, list) else [moved]:
            if part is not None and not varying_dims(part):
                walk.lock(part, f"{walk.describe(node)} takes this channel by its number")
    if isinstance(moved, list):
        return [part if part is not None and part.numel() else None for part in moved]
    return moved if moved is not None and moved.numel() else None


def move(node: Node, labels: Tensor) -> Labels:
    """Return the result of a node's op on labels, for SAMPLES samples."""
    op = aten.reshape.default if node.target is aten.view.default else node.target  # expanded labels cannot be viewed
    moved = op(labels.detach(), *sample_args(node.args[1:]), **sample_args(node.kwargs))  # type: ignore[operator]
    return [collapse(part) for part in moved] if isinstance(moved, (list, tuple)) else collapse(moved)


@rule(aten.view_as.default, aten.reshape_as.default, zeros=Zeros.FIRST_INPUT)
def likeness(walk: Walk, node: Node) -> Labels:
    """Follow a value reshaped as another one, whose channels must then be the same ones."""
    value, other = node.args
    labels = walk.labels(value)
    if labels is None:
        return None
    moved = collapse(labels.reshape(walk.shape(node)))
    walk.meet(moved, other, node)  # type: ignore[arg-type]
    return moved


@rule(aten.roll.default, aten.pad.default, aten.constant_pad_nd.default, zeros=Zeros.KEPT)
def shift(walk: Walk, node: Node) -> Labels:
    """Follow a cyclic shift or padding of positions. Zeros added to channels must stay; what moves channels locks them."""
    args = walk.arguments(node)
    labels = walk.labels(args["self"])
    if labels is None:
        return None
    if node.target is aten.roll.default:
        dims, is_more = {dim % labels.dim() for dim in args["dims"]}, False
    else:
        dims = {labels.dim() - 1 - number // 2 for number, size in enumerate(args["pad"]) if size != 0}
        is_constant = args.get("mode", "constant") == "constant"
        is_more = is_constant and min(args["pad"]) >= 0
        if is_constant and args["value"] and not _is_ignored(node, args["value"]):
            walk.breaks_zeros.add(node)
    if not dims & set(varying_dims(labels)):
        return resized(labels, walk.shape(node))
    if is_more:
        return collapse(functional.pad(labels, args["pad"], value=STATIC))
    walk.lock(labels, f"{walk.describe(node)} moves channels")
    return None


def _is_ignored(node: Node, value: float) -> bool:
    """Whether all that reads a padded value takes maxima, which the padding never is, so that zeros come out as zeros."""
    return value == -math.inf and all(user.target in MAXIMA for user in node.users)


@rule(*named("cat concat concatenate hstack"), zeros=Zeros.KEPT)
def concatenation(walk: Walk, node: Node) -> Labels:
    """Follow a concatenation. Of channels: a part without labels must stay. Of positions: all parts have the same channels."""
    args = walk.arguments(node)
    dim = args.get("dim", 1) % len(walk.shape(node))
    operands = [operand for operand in args["tensors"] if walk.shape(operand).numel()]
    parts = [walk.labels(operand) for operand in operands]
    if any(part is not None and dim in varying_dims(part) for part in parts):
        static = torch.tensor(STATIC)
        pairs = zip(operands, parts, strict=True)
        every = narrowed(*(static.expand(walk.shape(n)) if p is None else p for n, p in pairs))
        return collapse(torch.cat(every, dim).expand(walk.shape(node)))
    joint = _alike(walk, node, operands, dim)
    return joint if joint is None else joint.expand(walk.shape(node))


@rule(aten.stack.default, zeros=Zeros.KEPT)
def stacking(walk: Walk, node: Node) -> Labels:
    """Follow values put next to each other along a new dimension: all have the same channels."""
    args = walk.arguments(node)
    dim = args["dim"] % len(walk.shape(node))
    joint = _alike(walk, node, args["tensors"], None)
    return joint if joint is None else joint.unsqueeze(dim).expand(walk.shape(node))


def _alike(walk: Walk, node: Node, operands: Sequence[Node], dim: int | None) -> Tensor | None:
    """Tie values that are put next to each other along a dimension of positions; return the labels that all have, of size 1 there."""
    known = [part for part in map(walk.labels, operands) if part is not None]
    if not known:
        return None
    joint = max(known, key=lambda part: len(varying_dims(part)))
    joint = joint if dim is None else joint.narrow(dim, 0, 1)
    for operand in operands:
        if walk.labels(operand) is None:
            walk.breaks_zeros.add(node)
        walk.meet(joint, operand, node)
    return joint


@rule(aten.index.Tensor, zeros=Zeros.KEPT)
def gather(walk: Walk, node: Node) -> Labels:
    """Follow indexing by a tensor along positions, as of a table of relative positions; along channels it locks them."""
    source, indices = node.args
    if any(walk.labels(index) is not None for index in indices if index is not None):  # type: ignore[union-attr]
        walk.lock_inputs(node, "picks entries by the values of channels")
        return None
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
