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


# --- layers: they sum over the channels they read and write channels of their own -------------------------------------


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, zeros=Zeros.READ)
def convolution(walk: "Walk", node: Node) -> Labels:
    """Follow a convolution; a grouped one keeps the same channels in each of its groups."""
    args = walk.arguments(node)
    num_groups, num_out = args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    if num_groups == 1:
        out = walk.weight(args["weight"], 0, walk.fresh(num_out), "out")
        walk.weight(args["weight"], 1, read, "in")
    else:
        out = _grouped_convolution(walk, args["weight"], read, num_groups, num_out)
    walk.bind(args["bias"], 0, out)
    walk.layer(node, args["weight"], num_out)
    return spread(out, 1, walk.shape(node))


def _grouped_convolution(walk: "Walk", weight: Node, read: Tensor, num_groups: int, num_out: int) -> Tensor:
    per_group = len(read) // num_groups
    if per_group == 1:  # depthwise: each channel writes its own outputs
        return walk.weight(weight, 0, read.repeat_interleave(num_out // num_groups), "out", "in")
    read = walk.tie_rows(read.view(num_groups, per_group))
    walk.weight(weight, 1, read, "in")
    out = walk.tie_rows(walk.fresh(num_out).view(num_groups, -1))
    return walk.weight(weight, 0, out.repeat(num_groups), "out")


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


@rule(aten.batch_norm.default, zeros=Zeros.BROKEN)
def batch_norm(walk: "Walk", node: Node) -> Labels:
    """Follow batch normalisation: parameters and statistics run along dimension 1."""
    args = walk.arguments(node)
    read = walk.channels(args["input"], 1, node)
    for name in ("weight", "bias", "running_mean", "running_var"):
        walk.bind(args[name], 0, read)
    return spread(read, 1, walk.shape(node))


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
    *(aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default),
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
    *(
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_max_pool2d.default,
    ),
    zeros=Zeros.KEPT,
)
def pooling(walk: "Walk", node: Node) -> Labels:
    """Follow pooling over the positions of each channel. Padding of a maximum is -inf, so zeros stay zeros."""
    return spread(walk.channels(node.args[0], 1, node), 1, walk.shape(node))


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
