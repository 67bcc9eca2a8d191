"""Rules for element-wise ops: activations, sums, products, comparisons."""

import torch
from torch.fx import Node

from gator.tracing.labels import varying_dims
from gator.tracing.rules.movement import movement
from gator.tracing.rules.table import named, rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(
    *named("relu relu6 hardtanh leaky_relu gelu silu hardswish elu celu selu mish rrelu softshrink hardshrink"),
    *named("tanh sin tan atan asin sinh asinh erf expm1 log1p abs neg square sign round floor ceil trunc"),
    *named("dropout feature_dropout zero_ zeros_like"),
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
    *named("sigmoid exp hardsigmoid clamp clamp_min clamp_max softplus log_sigmoid cos cosh erfc threshold"),
    *named("logical_not bitwise_not isnan isinf isfinite ones_like full_like rand_like randn_like empty_like"),
    *named("alpha_dropout feature_alpha_dropout"),
    *(aten.rsub.Scalar, aten.pow.Scalar, aten.exp2.default, aten.fill.Scalar, aten.fill.Tensor, aten.remainder.Scalar),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar),
    zeros=Zeros.BROKEN,
)
def unary_breaking_zero(walk: Walk, node: Node) -> Labels:
    """Follow a function of one value that does not map 0 to 0, or that need not in training mode."""
    return walk.labels(next(arg for arg in node.args if isinstance(arg, Node)))


@rule(*named("sqrt rsqrt reciprocal log log2 log10"), aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, zeros=Zeros.KEPT)
def unary_singular_at_zero(walk: Walk, node: Node) -> Labels:
    """Follow a function that may have no finite value or slope at 0, where closed channels may be: it does not see them."""
    value, *exponent = node.args
    if not (exponent and exponent[0] in (1, 2, 3, 4)):
        walk.breaks_zeros.add(node)
        _divide(walk, node, value)
    return walk.together(node)


@rule(*named("clone contiguous alias detach type_as"), aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other,
      aten._to_copy.default, zeros=Zeros.KEPT)  # fmt: skip
def same_value(walk: Walk, node: Node) -> Labels:
    """Follow an op that changes the place or the type of a value, not the value."""
    return walk.labels(node.args[0])


@rule(
    *(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.add.Scalar, aten.sub.Scalar),
    *(aten.max.other, aten.min.other, *named("maximum minimum addcmul"), aten.lerp.Scalar, aten.lerp.Tensor),
    zeros=Zeros.KEPT,
)
def addition(walk: Walk, node: Node) -> Labels:
    """Follow a sum, which ties its operands together. A number or a parameter is added to closed channels too."""
    if any(walk.labels(arg) is None if isinstance(arg, Node) else arg != 0 for arg in node.args[:2]):
        walk.breaks_zeros.add(node)
    return walk.together(node)


@rule(aten.mul.Tensor, aten.mul.Scalar, zeros=Zeros.ONE_INPUT)
def product(walk: Walk, node: Node) -> Labels:
    """Follow a product, such as squeeze-and-excitation."""
    return walk.together(node)


@rule(
    *(aten.eq.Tensor, aten.ne.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor),
    *(aten.logical_and.default, aten.logical_or.default, aten.__and__.Tensor, aten.__or__.Tensor),
    *(aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.clamp.Tensor, aten.clamp_min.Tensor),
    zeros=Zeros.BROKEN,
)
def comparison(walk: Walk, node: Node) -> Labels:
    """Follow a combination of values that need not map zeros to zero."""
    return walk.together(node)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, zeros=Zeros.KEPT)
def choice(walk: Walk, node: Node) -> Labels:
    """Follow a choice between two values by a condition."""
    if any(walk.labels(arg) is None if isinstance(arg, Node) else arg != 0 for arg in node.args[1:]):
        walk.breaks_zeros.add(node)
    return walk.together(node)


@rule(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.masked_fill.Scalar, zeros=Zeros.FIRST_INPUT)
def quotient(walk: Walk, node: Node) -> Labels:
    """Follow a quotient, or a value in which a number replaces some entries. A divisor's closed channels may be zero."""
    if node.target is aten.masked_fill.Scalar and node.args[2] != 0:
        walk.breaks_zeros.add(node)
    elif node.target is not aten.masked_fill.Scalar:
        _divide(walk, node, node.args[1])
    return walk.together(node)


def _divide(walk: Walk, node: Node, value: object) -> None:
    """Note that a node divides by a value, which may be zero where channels are closed."""
    added = _added_to(walk, value)
    if added is None:
        walk.normalisations.append(node)
    elif added:
        walk.divisions[node] = added


def _added_to(walk: Walk, value: object) -> list[Node] | None:
    """Return a value and what it is moved from, back to where a number is added to it; [] if it has no channels.

    None if no number is, so that it is zero where channels are closed.
    """
    found: list[Node] = []
    while isinstance(value, Node) and walk.labels(value) is not None:
        found.append(value)
        if value in walk.breaks_zeros:
            return found
        if value.target in (aten.clamp_min.default, aten.clamp.default):
            return found if walk.arguments(value)["min"] else None
        is_moved = value.target in walk.rules and walk.rules[value.target].labels in (movement, same_value, expansion)
        if not is_moved and value.target is not aten.sqrt.default:
            return None
        value = value.args[0]
    return found


@rule(aten.expand_as.default, zeros=Zeros.FIRST_INPUT)
def expansion(walk: Walk, node: Node) -> Labels:
    """Follow a value expanded to the shape of another one, which both must keep."""
    return walk.together(node)


@rule(aten.glu.default, zeros=Zeros.KEPT)
def gated_linear_unit(walk: Walk, node: Node) -> Labels:
    """Follow one half of a value times the sigmoid of the other."""
    labels, dim = walk.labels(node.args[0]), walk.arguments(node)["dim"]
    if labels is None:
        return None
    value, gate = labels.chunk(2, dim)
    walk.book.tie(value, gate, f"{walk.describe(node)} multiplies it by a channel that cannot be pruned")
    return value


@rule(aten.softmax.int, aten.log_softmax.int, zeros=Zeros.BROKEN)
def softmax(walk: Walk, node: Node) -> Labels:
    """Follow a softmax over positions, the features of a head, or the open channels."""
    labels, dim = walk.labels(node.args[0]), walk.arguments(node)["dim"]
    if labels is None or dim % labels.dim() not in varying_dims(labels):
        return labels
    if len(varying_dims(labels)) > 1:
        return walk.tie_along(labels, {dim % labels.dim()})
    walk.normalisations.append(node)
    return labels
