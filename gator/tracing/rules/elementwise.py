"""Rules for element-wise ops: activations, sums, products; and concatenation."""

import torch
from torch.fx import Node

from gator.tracing.labels import STATIC, collapse, narrowed, varying_dims
from gator.tracing.rules.table import rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(
    *(aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.leaky_relu.default),
    *(aten.gelu.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default),
    *(aten.leaky_relu_.default, aten.elu.default, aten.elu_.default, aten.celu.default, aten.celu_.default),
    *(aten.selu.default, aten.selu_.default, aten.mish.default, aten.mish_.default, aten.tanh.default),
    *(aten.tanh_.default, aten.dropout.default, aten.dropout_.default, aten.neg.default),
    zeros=Zeros.KEPT,
)
def unary(walk: Walk, node: Node) -> Labels:
    """Follow a function of one value that maps 0 to 0; a clipped one may not."""
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        args = walk.arguments(node)
        if not args["min_val"] <= 0 <= args["max_val"]:
            walk.breaks_zeros.add(node)
    return walk.labels(node.args[0])


@rule(aten.prelu.default, zeros=Zeros.KEPT)
def prelu(walk: Walk, node: Node) -> Labels:
    """Follow a PReLU, whose slope is one number or one per channel."""
    args = walk.arguments(node)
    if walk.shape(args["weight"]).numel() > 1:
        walk.bind(args["weight"], 0, walk.channels(args["self"], 1, node))
    return walk.labels(args["self"])


@rule(
    *(aten.sigmoid.default, aten.sigmoid_.default, aten.exp.default),
    *(aten.hardsigmoid.default, aten.hardsigmoid_.default, aten.clamp_.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    zeros=Zeros.BROKEN,
)
def unary_breaking_zero(walk: Walk, node: Node) -> Labels:
    """Follow a function of one value that does not map 0 to 0."""
    return walk.labels(node.args[0])


@rule(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, zeros=Zeros.KEPT)
def same_value(walk: Walk, node: Node) -> Labels:
    """Follow an op that changes the place of a value in memory, not the value."""
    return walk.labels(node.args[0])


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, zeros=Zeros.KEPT)
def addition(walk: Walk, node: Node) -> Labels:
    """Follow a sum, which ties its operands together. A number or a parameter is added to closed channels too."""
    if any(walk.labels(arg) is None if isinstance(arg, Node) else arg != 0 for arg in node.args[:2]):
        walk.breaks_zeros.add(node)
    return walk.together(node)


@rule(aten.mul.Tensor, aten.mul_.Tensor, zeros=Zeros.ONE_INPUT)
def product(walk: Walk, node: Node) -> Labels:
    """Follow a product, such as squeeze-and-excitation."""
    return walk.together(node)


@rule(aten.div.Tensor, aten.masked_fill.Scalar, zeros=Zeros.FIRST_INPUT)
def quotient(walk: Walk, node: Node) -> Labels:
    """Follow a quotient, or a value in which a number replaces some entries."""
    if node.target is aten.masked_fill.Scalar and node.args[2] != 0:
        walk.breaks_zeros.add(node)
    return walk.together(node)


@rule(aten.expand_as.default, zeros=Zeros.FIRST_INPUT)
def expansion(walk: Walk, node: Node) -> Labels:
    """Follow a value expanded to the shape of another one."""
    return walk.spread_out(node, walk.labels(node.args[0]))


@rule(aten.softmax.int, zeros=Zeros.BROKEN)
def softmax(walk: Walk, node: Node) -> Labels:
    """Follow a softmax over positions; over channels it locks them."""
    labels, dim = walk.labels(node.args[0]), node.args[1]
    if labels is None or dim % labels.dim() not in varying_dims(labels):  # type: ignore[operator]
        return labels
    walk.lock(labels, f"{walk.describe(node)} normalises over channels")
    return None


@rule(aten.cat.default, zeros=Zeros.KEPT)
def concatenation(walk: Walk, node: Node) -> Labels:
    """Follow a concatenation. Of channels: a part without labels must stay. Of positions: all parts have the same channels."""
    args = walk.arguments(node)
    dim = args["dim"] % len(walk.shape(node))
    parts = [walk.labels(part) for part in args["tensors"]]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    if any(dim in varying_dims(part) for part in known):
        pairs = zip(args["tensors"], parts, strict=True)
        static = torch.tensor(STATIC)
        every = narrowed(*(static.expand(walk.shape(n)) if p is None else p for n, p in pairs))
        return collapse(torch.cat(every, dim).expand(walk.shape(node)))
    joint = known[0].narrow(dim, 0, 1)
    for operand, part in zip(args["tensors"], parts, strict=True):
        if part is None:
            walk.breaks_zeros.add(node)
        walk.meet(joint, operand, node)
    return joint.expand(walk.shape(node))
