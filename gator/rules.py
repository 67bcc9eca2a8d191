"""The table: ATen op -> how channels pass through it, and what becomes of a channel that is zero.

A rule is one short function from the walk and a node of torch.export's graph to the labels of the node's value. To add
an op, write such a function, put it in the table with @rule, and add a network with the op to tests/gator/zoo.py. An op
that is not in the table locks what flows into it; it is never taken for element-wise.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from gator.labels import STATIC, collapse, spread, varying_dims

if TYPE_CHECKING:
    from gator.tracing import Walk

aten = torch.ops.aten

Labels = Tensor | None | list[Tensor | None]


class Zeros(Enum):
    """What an op does with a channel that is zero in its inputs. Gates are placed by this."""

    KEPT = "zero when it is zero in all inputs"
    ONE_INPUT = "zero when it is zero in one input"
    BROKEN = "not zero any more; each channel is treated by itself"
    READ = "summed into other channels, so it must be zero"


@dataclass(frozen=True)
class Rule:
    """How labels pass through an op, and what becomes of zeros."""

    labels: Callable[["Walk", Node], Labels]
    zeros: Zeros


RULES: dict[Any, Rule] = {}


def rule(*ops: Any, zeros: Zeros) -> Callable[[Callable[["Walk", Node], Labels]], Callable[["Walk", Node], Labels]]:
    """Put a function into the table for these ops."""

    def register(function: Callable[["Walk", Node], Labels]) -> Callable[["Walk", Node], Labels]:
        RULES.update({op: Rule(function, zeros) for op in ops})
        return function

    return register


def zeros_of(walk: "Walk", node: Node) -> Zeros:
    """Return what an op does with a channel that is zero, in this place: the table's word, except where arguments decide.

    A sum with a number, a parameter or anything else that carries no channels is not zero where the channel is.
    """
    known = RULES[node.target]
    if known.labels is addition and any(_is_constant(walk, operand) for operand in node.args[:2]):
        return Zeros.BROKEN
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        args = walk.arguments(node)
        return known.zeros if args["min_val"] <= 0 <= args["max_val"] else Zeros.BROKEN
    return known.zeros


def _is_constant(walk: "Walk", operand: Any) -> bool:
    return walk.values.get(operand) is None if isinstance(operand, Node) else operand != 0


# --- layers: they sum over the channels they read and write channels of their own -------------------------------------


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    zeros=Zeros.READ,
)
def convolution(walk: "Walk", node: Node) -> Labels:
    """Follow a convolution; a grouped one keeps whole groups, or the same channels in each, whichever is finer."""
    args = walk.arguments(node)
    weight, num_groups, num_out = args["weight"], args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    if num_groups == 1:
        out = walk.weight(weight, 0, walk.fresh(num_out), "out")
        walk.weight(weight, 1, read, "in")
    elif cuts_whole_groups(len(read), num_groups):
        whole = walk.tie_columns(read.view(num_groups, -1))
        out = walk.weight(weight, 0, whole.repeat_interleave(num_out // num_groups), "out", "in")
    else:
        walk.weight(weight, 1, walk.tie_rows(read.view(num_groups, -1)), "in")
        out = walk.tie_rows(walk.fresh(num_out).view(num_groups, -1))
        out = walk.weight(weight, 0, out.repeat(num_groups), "out")
    walk.bind(args["bias"], 0, out)
    walk.layer(node, weight, num_out)
    return spread(out, 1, walk.shape(node))


def cuts_whole_groups(num_in: int, num_groups: int) -> bool:
    """Whether a grouped convolution is cut by whole groups, as a depthwise one is; else at the same places in each group."""
    return num_groups >= num_in // num_groups


@rule(
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    zeros=Zeros.READ,
)
def transposed_convolution(walk: "Walk", node: Node) -> Labels:
    """Follow a transposed convolution, whose weight is (in, out / groups, kernel...)."""
    args = walk.arguments(node)
    weight, num_groups, num_out = args["weight"], args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    positions = walk.shape(args["input"])[2:].numel()
    outputs = walk.shape(node)[2:].numel()
    if num_groups > 1 and cuts_whole_groups(len(read), num_groups):
        whole = walk.tie_columns(read.view(num_groups, -1))
        per_group = num_out // num_groups
        walk.weight(weight, 0, whole.repeat_interleave(len(read) // num_groups), "out", "in")
        out = whole.repeat_interleave(per_group)
        walk.layer(node, weight, num_out, positions, out_dim=0, outputs=outputs * num_out / len(read))
    else:
        walk.weight(weight, 0, walk.tie_rows(read.view(num_groups, -1)).repeat(num_groups), "in")
        out = walk.tie_rows(walk.fresh(num_out).view(num_groups, -1))
        out = walk.weight(weight, 1, out, "out").repeat(num_groups)
        walk.layer(node, weight, num_out, positions, out_dim=1, outputs=outputs * num_groups)
    walk.bind(args["bias"], 0, out)
    return spread(out, 1, walk.shape(node))


@rule(aten.linear.default, zeros=Zeros.READ)
def linear(walk: "Walk", node: Node) -> Labels:
    """Follow a linear layer on the last dimension."""
    args = walk.arguments(node)
    num_out = walk.shape(node)[-1]
    walk.weight(args["weight"], 1, walk.channels(args["input"], -1, node), "in")
    out = walk.weight(args["weight"], 0, walk.fresh(num_out), "out")
    walk.bind(args["bias"], 0, out)
    walk.layer(node, args["weight"], num_out)
    return spread(out, -1, walk.shape(node))


@rule(aten.batch_norm.default, aten.instance_norm.default, zeros=Zeros.BROKEN)
def batch_norm(walk: "Walk", node: Node) -> Labels:
    """Follow batch or instance normalisation: parameters and statistics run along dimension 1."""
    args = walk.arguments(node)
    read = walk.channels(args["input"], 1, node)
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.bind(args[name], 0, read)
    return spread(read, 1, walk.shape(node))


@rule(aten.group_norm.default, zeros=Zeros.BROKEN)
def group_norm(walk: "Walk", node: Node) -> Labels:
    """Follow group normalisation, cut by whole norm groups: the statistics of one do not depend on the others."""
    args = walk.arguments(node)
    read = walk.channels(args["input"], 1, node)
    if args["num_groups"] == 1:
        walk.lock(read, f"{walk.describe(node)} normalises over all channels together")
        return spread(read, 1, walk.shape(node))
    if args["weight"] is None:
        walk.lock(
            read, f"{walk.describe(node)} has no weights, and so no tensor that tells how many norm groups are left"
        )
        return spread(read, 1, walk.shape(node))
    whole = walk.tie_columns(read.view(args["num_groups"], -1)).repeat_interleave(len(read) // args["num_groups"])
    for name in ("weight", "bias"):
        walk.bind(args[name], 0, whole)
    return spread(whole, 1, walk.shape(node))


# --- one value in, one value out at the same place ---------------------------------------------------------------------


@rule(
    *(aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.leaky_relu.default),
    *(aten.gelu.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default),
    *(aten.dropout.default, aten.dropout_.default, aten.tanh.default, aten.neg.default),
    zeros=Zeros.KEPT,
)
def unary(walk: "Walk", node: Node) -> Labels:
    """Follow a function of one value that maps 0 to 0."""
    return walk.labels(node.args[0])


@rule(aten.prelu.default, zeros=Zeros.KEPT)
def prelu(walk: "Walk", node: Node) -> Labels:
    """Follow a PReLU, whose slope is one number or one per channel."""
    args = walk.arguments(node)
    if walk.shape(args["weight"]).numel() > 1:
        walk.bind(args["weight"], 0, walk.channels(args["self"], 1, node))
    return walk.labels(args["self"])


@rule(aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default, aten.exp.default, zeros=Zeros.BROKEN)
def unary_breaking_zero(walk: "Walk", node: Node) -> Labels:
    """Follow a function of one value that does not map 0 to 0."""
    return walk.labels(node.args[0])


@rule(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, zeros=Zeros.KEPT)
def same_value(walk: "Walk", node: Node) -> Labels:
    """Follow an op that changes where a value lies, not the value."""
    return walk.labels(node.args[0])


# --- several values at the same place ---------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, zeros=Zeros.KEPT)
def addition(walk: "Walk", node: Node) -> Labels:
    """Follow a sum: what is added together lives and dies together."""
    return walk.together(node)


@rule(aten.mul.Tensor, aten.mul_.Tensor, zeros=Zeros.ONE_INPUT)
def product(walk: "Walk", node: Node) -> Labels:
    """Follow a product, squeeze-and-excitation for one."""
    return walk.together(node)


@rule(aten.cat.default, zeros=Zeros.KEPT)
def concatenation(walk: "Walk", node: Node) -> Labels:
    """Follow a concatenation; what carries no channels becomes a static segment."""
    args = walk.arguments(node)
    parts = [walk.labels(part) for part in args["tensors"]]
    if all(part is None for part in parts):
        return None
    shapes = [walk.shape(part) for part in args["tensors"]]
    filled = [
        torch.tensor(STATIC).expand(shape) if part is None else part for part, shape in zip(parts, shapes, strict=True)
    ]
    return collapse(torch.cat(filled, args["dim"]))


# --- data that moves --------------------------------------------------------------------------------------------------


@rule(
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.expand.default),
    *(
        aten.slice.Tensor,
        aten.narrow.default,
        aten.select.int,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
    ),
    zeros=Zeros.KEPT,
)
def movement(walk: "Walk", node: Node) -> Labels:
    """Follow an op that moves data by doing the same to the labels."""
    labels = walk.labels(node.args[0])
    if labels is None:
        return None
    op = aten.reshape.default if node.target is aten.view.default else node.target  # expanded labels cannot be viewed
    moved = op(labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [collapse(part) for part in moved] if isinstance(moved, (list, tuple)) else collapse(moved)


@rule(operator.getitem, zeros=Zeros.KEPT)
def item(walk: "Walk", node: Node) -> Labels:
    """Follow one output of an op that has several."""
    source, index = node.args
    parts = walk.values.get(source)  # type: ignore[arg-type]
    return parts[index] if isinstance(parts, list) else None  # type: ignore[index]


# --- sums over positions, not over channels ---------------------------------------------------------------------------


@rule(
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(
        aten.upsample_linear1d.vec,
        aten.upsample_bilinear2d.vec,
        aten.upsample_bicubic2d.vec,
        aten.upsample_trilinear3d.vec,
    ),
    zeros=Zeros.KEPT,
)
def pooling(walk: "Walk", node: Node) -> Labels:
    """Follow pooling or interpolation of the positions of each channel. Padding of a maximum is -inf, so zeros stay zeros."""
    return spread(walk.channels(node.args[0], 1, node), 1, walk.shape(node))


@rule(aten.pixel_shuffle.default, zeros=Zeros.KEPT)
def pixel_shuffle(walk: "Walk", node: Node) -> Labels:
    """Follow channels that become positions: those that make up one channel live and die together."""
    read = walk.channels(node.args[0], 1, node)
    return spread(walk.tie_columns(read.view(walk.shape(node)[1], -1)), 1, walk.shape(node))


@rule(aten.pixel_unshuffle.default, zeros=Zeros.KEPT)
def pixel_unshuffle(walk: "Walk", node: Node) -> Labels:
    """Follow positions that become channels."""
    read = walk.channels(node.args[0], 1, node)
    return spread(read.repeat_interleave(walk.shape(node)[1] // len(read)), 1, walk.shape(node))


@rule(aten.mean.dim, aten.sum.dim_IntList, zeros=Zeros.KEPT)
def reduction(walk: "Walk", node: Node) -> Labels:
    """Follow a mean or sum over positions; over channels it locks them."""
    args = walk.arguments(node)
    labels = walk.labels(args["self"])
    dims = sorted(dim % labels.dim() for dim in args["dim"])  # type: ignore[union-attr]
    if set(dims) & set(varying_dims(labels)):  # type: ignore[arg-type]
        walk.lock(labels, f"{walk.describe(node)} sums over channels")
        return None
    for dim in reversed(dims):
        labels = labels.narrow(dim, 0, 1) if args["keepdim"] else labels.select(dim, 0)  # type: ignore[union-attr]
    return labels
