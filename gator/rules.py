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

from gator.errors import TraceError
from gator.labels import STATIC, collapse, resized, spread, varying_dims
from gator.program import sample_args

if TYPE_CHECKING:
    from gator.tracing import Walk

aten = torch.ops.aten

Labels = Tensor | None | list[Tensor | None]


class Zeros(Enum):
    """What an op does with a channel that is zero in its inputs. Gates are placed by this."""

    KEPT = "zero when it is zero in all inputs"
    ONE_INPUT = "zero when it is zero in one input"
    FIRST_INPUT = "zero when it is zero in the first input"
    BROKEN = "not zero any more; each channel is treated by itself"


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


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    zeros=Zeros.BROKEN,
)
def convolution(walk: "Walk", node: Node) -> Labels:
    """Follow a convolution; a grouped one keeps whole groups, or the same channels in each, whichever is finer."""
    args = walk.arguments(node)
    weight, num_groups, num_out = args["weight"], args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    if num_groups < len(read):  # a depthwise convolution does not sum over channels
        walk.reads.append(args["input"])
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
    zeros=Zeros.BROKEN,
)
def transposed_convolution(walk: "Walk", node: Node) -> Labels:
    """Follow a transposed convolution, whose weight is (in, out / groups, kernel...)."""
    args = walk.arguments(node)
    weight, num_groups, num_out = args["weight"], args["groups"], walk.shape(node)[1]
    read = walk.channels(args["input"], 1, node)
    walk.reads.append(args["input"])
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


@rule(aten.linear.default, zeros=Zeros.BROKEN)
def linear(walk: "Walk", node: Node) -> Labels:
    """Follow a linear layer on the last dimension."""
    args = walk.arguments(node)
    num_out = walk.shape(node)[-1]
    walk.reads.append(args["input"])
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


@rule(aten.layer_norm.default, zeros=Zeros.BROKEN)
def layer_norm(walk: "Walk", node: Node) -> Labels:
    """Follow layer normalisation. Over channels it is gated by a mean and variance of the open ones only."""
    args = walk.arguments(node)
    labels, num_dims = walk.labels(args["input"]), len(args["normalized_shape"])
    if labels is None:
        return None
    normalised = {dim for dim in varying_dims(labels) if dim >= labels.dim() - num_dims}
    if not normalised:
        return labels
    if normalised != set(varying_dims(labels)):  # the features of a head, of which other dimensions hold several
        return walk.tie_along(labels, normalised)
    if num_dims > 1:
        walk.lock(labels, f"{walk.describe(node)} normalises over channels and positions together")
        return None
    read = walk.channels(args["input"], -1, node)
    for name in ("weight", "bias"):
        walk.bind(args[name], 0, read)
    walk.normalisations.append(node)
    return spread(read, -1, walk.shape(node))


# --- one value in, one value out at the same place ---------------------------------------------------------------------


@rule(
    *(aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.leaky_relu.default),
    *(aten.gelu.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default),
    *(aten.leaky_relu_.default, aten.elu.default, aten.elu_.default, aten.celu.default, aten.celu_.default),
    *(
        aten.selu.default,
        aten.selu_.default,
        aten.mish.default,
        aten.mish_.default,
        aten.tanh.default,
        aten.tanh_.default,
    ),
    *(aten.dropout.default, aten.dropout_.default, aten.neg.default),
    zeros=Zeros.KEPT,
)
def unary(walk: "Walk", node: Node) -> Labels:
    """Follow a function of one value that maps 0 to 0; a clipped one may not."""
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        args = walk.arguments(node)
        if not args["min_val"] <= 0 <= args["max_val"]:
            walk.breaks_zeros.add(node)
    return walk.labels(node.args[0])


@rule(aten.prelu.default, zeros=Zeros.KEPT)
def prelu(walk: "Walk", node: Node) -> Labels:
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
    """Follow a sum: what is added together lives and dies together. A number or a parameter is added to closed channels too."""
    if any(walk.labels(arg) is None if isinstance(arg, Node) else arg != 0 for arg in node.args[:2]):
        walk.breaks_zeros.add(node)
    return walk.together(node)


@rule(aten.mul.Tensor, aten.mul_.Tensor, zeros=Zeros.ONE_INPUT)
def product(walk: "Walk", node: Node) -> Labels:
    """Follow a product, squeeze-and-excitation for one."""
    return walk.together(node)


@rule(aten.div.Tensor, aten.masked_fill.Scalar, zeros=Zeros.FIRST_INPUT)
def quotient(walk: "Walk", node: Node) -> Labels:
    """Follow a quotient, or a value of which some entries are replaced by a number."""
    if node.target is aten.masked_fill.Scalar and node.args[2] != 0:
        walk.breaks_zeros.add(node)
    return walk.together(node)


@rule(aten.expand_as.default, zeros=Zeros.FIRST_INPUT)
def expansion(walk: "Walk", node: Node) -> Labels:
    """Follow a value expanded to the shape of another one."""
    labels = walk.labels(node.args[0])
    return labels if labels is None else labels.expand(walk.shape(node))


@rule(aten.softmax.int, zeros=Zeros.BROKEN)
def softmax(walk: "Walk", node: Node) -> Labels:
    """Follow a softmax over positions; over channels it locks them."""
    labels, dim = walk.labels(node.args[0]), node.args[1]
    if labels is None or dim % labels.dim() not in varying_dims(labels):  # type: ignore[operator]
        return labels
    walk.lock(labels, f"{walk.describe(node)} normalises over channels")
    return None


@rule(aten.cat.default, zeros=Zeros.KEPT)
def concatenation(walk: "Walk", node: Node) -> Labels:
    """Follow a concatenation. Of channels, what carries none is a segment that stays; of positions, all parts have the same channels."""
    args = walk.arguments(node)
    dim = args["dim"] % len(walk.shape(node))
    parts = [walk.labels(part) for part in args["tensors"]]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    if any(dim in varying_dims(part) for part in known):
        shapes = [walk.shape(part) for part in args["tensors"]]
        static = torch.tensor(STATIC)
        return collapse(
            torch.cat([static.expand(s) if p is None else p for p, s in zip(parts, shapes, strict=True)], dim)
        )
    joint = known[0].narrow(dim, 0, 1)
    for operand, part in zip(args["tensors"], parts, strict=True):
        if part is None:
            walk.breaks_zeros.add(node)
        walk.meet(joint, operand, node)
    return joint.expand(walk.shape(node))


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
    *(aten.unbind.int, aten.swapaxes.default),
    zeros=Zeros.KEPT,
)
def movement(walk: "Walk", node: Node) -> Labels:
    """Follow an op that moves data by doing the same to the labels."""
    labels = walk.labels(node.args[0])
    return labels if labels is None else move(node, labels)


def move(node: Node, labels: Tensor) -> Labels:
    """Return what the op of a node makes of labels, for SAMPLES samples."""
    op = aten.reshape.default if node.target is aten.view.default else node.target  # expanded labels cannot be viewed
    moved = op(labels, *sample_args(node.args[1:]), **sample_args(node.kwargs))  # type: ignore[operator]
    return [collapse(part) for part in moved] if isinstance(moved, (list, tuple)) else collapse(moved)


@rule(aten.roll.default, aten.pad.default, zeros=Zeros.KEPT)
def shift(walk: "Walk", node: Node) -> Labels:
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
def gather(walk: "Walk", node: Node) -> Labels:
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
def new_value(walk: "Walk", node: Node) -> Labels:
    """Follow nothing: of its input only the device and the dtype are read."""
    return None


@rule(operator.getitem, zeros=Zeros.KEPT)
def item(walk: "Walk", node: Node) -> Labels:
    """Follow one output of an op that has several."""
    source, index = node.args
    parts = walk.values.get(source)  # type: ignore[arg-type]
    if not isinstance(parts, list):
        return None
    if index >= len(parts):  # type: ignore[operator]
        raise TraceError(
            f"{walk.describe(source)} cuts the batch into a fixed number of parts; forward() must take any number of samples"  # type: ignore[arg-type]
        )
    return parts[index]  # type: ignore[index]


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


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, zeros=Zeros.KEPT)
def reduction(walk: "Walk", node: Node) -> Labels:
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


# --- products of two values, attention's ------------------------------------------------------------------------------


@rule(aten.matmul.default, aten.bmm.default, zeros=Zeros.BROKEN)
def matrix_product(walk: "Walk", node: Node) -> Labels:
    """Follow a product of two matrices, or of batches of them."""
    one, other = node.all_input_nodes * (
        1 if len(node.all_input_nodes) == 2 else 2
    )  # a value by itself counts once there
    num_dims, num_other = len(walk.shape(one)), len(walk.shape(other))
    if min(num_dims, num_other) < 2:
        return _lock(walk, node, "multiplies by a vector")
    batch = "abcdefgh"[: max(num_dims, num_other) - 2]
    letters = batch[len(batch) - num_dims + 2 :] + "xz", batch[len(batch) - num_other + 2 :] + "zy", batch + "xy"
    return walk.spread_out(node, _contraction(walk, node, letters, (one, other)))


@rule(aten.einsum.default, zeros=Zeros.BROKEN)
def einsum(walk: "Walk", node: Node) -> Labels:
    """Follow an Einstein sum of two values."""
    equation, operands = node.args[:2]
    inputs, _, out = str(equation).replace(" ", "").partition("->")
    letters = (*inputs.split(","), out)
    if len(operands) != 2 or "." in inputs or not out or any(len(set(word)) < len(word) for word in letters):  # type: ignore[arg-type]
        return _lock(walk, node, f"({equation}) is no plain product of two values")
    return walk.spread_out(node, _contraction(walk, node, letters, tuple(operands)))  # type: ignore[arg-type]


@rule(aten.scaled_dot_product_attention.default, zeros=Zeros.BROKEN)
def attention(walk: "Walk", node: Node) -> Labels:
    """Follow attention: its units are whole heads, of the queries, keys and values alike."""
    args = walk.arguments(node)
    batch = "abcdefgh"[: len(walk.shape(node)) - 2]
    query, key, value = (args[name] for name in ("query", "key", "value"))
    if args["enable_gqa"] or any(len(walk.shape(source)) != len(walk.shape(node)) for source in (key, value)):
        return _lock(walk, node, "shares keys among heads")
    whole_heads = _tied_features(walk, query), _tied_features(walk, key)  # the scale depends on a head's width
    scores = _contraction(walk, node, (batch + "xd", batch + "yd", batch + "xy"), whole_heads)
    if args["attn_mask"] is not None and scores is not None:
        walk.meet(scores, args["attn_mask"], node)
    return walk.spread_out(node, _contraction(walk, node, (batch + "xy", batch + "ye", batch + "xe"), (scores, value)))


def _lock(walk: "Walk", node: Node, what: str) -> Tensor | None:
    """Lock all that flows into a node; what comes out carries no channels then."""
    for source in node.all_input_nodes:
        walk.lock(walk.labels(source), f"{walk.describe(node)} {what}")
    return None


def _tied_features(walk: "Walk", node: Node) -> Tensor | None:
    labels = walk.labels(node)
    return labels if labels is None else walk.tie_along(labels, {labels.dim() - 1})


def _contraction(
    walk: "Walk", node: Node, letters: tuple[str, str, str], operands: tuple[Node | Tensor | None, Node | Tensor | None]
) -> Tensor | None:
    """Return the labels of a product of two values, summed over the letters that the result has not.

    operands: nodes, or the labels of a value that is no node. What is summed over channels of a head ties them; what is summed
    over channels that the result knows nothing of must be zero when closed.
    """
    sizes = _sizes(walk, letters, operands)
    order = "".join(sizes)
    one, other = (_over_letters(walk, operand, word, sizes) for operand, word in zip(operands, letters, strict=False))
    if one is None or other is None:
        return _times_unlabelled(walk, node, letters, one, other, order)
    summed = {order.index(letter) for letter in order if letter not in letters[2]}
    channels = set(varying_dims(one)) | set(varying_dims(other))
    reason = f"{walk.describe(node)} multiplies it by values that cannot be cut"
    if channels & summed:
        walk.book.tie(one, other, reason)
        if channels <= summed:
            walk.reads.extend(operand for operand in operands if isinstance(operand, Node))
            walk.product(node, one, sizes)
            return None
        one, other = walk.tie_along(one, summed), walk.tie_along(other, summed)
    only_one = any(order[dim] not in letters[1] for dim in varying_dims(one))
    only_other = any(order[dim] not in letters[0] for dim in varying_dims(other))
    if only_one and only_other:
        return _lock(walk, node, "multiplies channels by other channels")
    walk.book.tie(one, other, reason)
    joint = other if only_other else one
    walk.product(node, joint, sizes)
    return _result(joint, order, letters[2])


def _sizes(walk: "Walk", letters: tuple[str, str, str], operands: tuple[Node | Tensor | None, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for operand, word in zip(operands, letters, strict=False):
        shape = walk.shape(operand) if isinstance(operand, Node) else () if operand is None else operand.shape
        for letter, size in zip(word, shape, strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def _over_letters(walk: "Walk", operand: Node | Tensor | None, word: str, sizes: dict[str, int]) -> Tensor | None:
    """Return an operand's labels with a dimension for each letter, of stride 0 for those that it has not."""
    labels = walk.labels(operand) if isinstance(operand, Node) else operand
    if labels is None:
        return None
    labels = labels.permute([word.index(letter) for letter in sizes if letter in word])
    for dim, letter in enumerate(sizes):
        labels = labels if letter in word else labels.unsqueeze(dim)
    return labels.expand(list(sizes.values()))


def _times_unlabelled(
    walk: "Walk", node: Node, letters: tuple[str, str, str], one: Tensor | None, other: Tensor | None, order: str
) -> Tensor | None:
    labels = one if other is None else other
    if labels is None:
        return None
    words_of_other = letters[1] if other is None else letters[0]
    if any(order[dim] in words_of_other for dim in varying_dims(labels)):
        return _lock(walk, node, "multiplies it by values that cannot be cut")
    return _result(labels, order, letters[2])


def _result(labels: Tensor, order: str, out: str) -> Tensor:
    """Return labels over all letters as those of the result."""
    for dim in reversed(range(len(order))):
        labels = labels if order[dim] in out else labels.select(dim, 0)
    kept = [letter for letter in order if letter in out]
    return labels.permute([kept.index(letter) for letter in out])
