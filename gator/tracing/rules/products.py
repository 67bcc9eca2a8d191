"""Rules for products of two computed values, as in attention."""

import torch
from torch import Tensor
from torch.fx import Node

from gator.tracing.labels import STATIC, along, spread, varying_dims
from gator.tracing.rules.table import rule
from gator.tracing.walk import Labels, Walk, Zeros

aten = torch.ops.aten


@rule(aten.matmul.default, aten.bmm.default, zeros=Zeros.BROKEN)
def matrix_product(walk: Walk, node: Node) -> Labels:
    """Follow a product of two matrices, or of batches of them."""
    one, other = (node.all_input_nodes * 2)[:2]  # a value times itself is there once
    num_dims, num_other = len(walk.shape(one)), len(walk.shape(other))
    if min(num_dims, num_other) < 2:
        return _lock(walk, node, "multiplies by a vector")
    batch = "abcdefgh"[: max(num_dims, num_other) - 2]
    letters = batch[len(batch) - num_dims + 2 :] + "xz", batch[len(batch) - num_other + 2 :] + "zy", batch + "xy"
    return walk.spread_out(node, _contraction(walk, node, letters, (one, other)))


@rule(aten.einsum.default, zeros=Zeros.BROKEN)
def einsum(walk: Walk, node: Node) -> Labels:
    """Follow an Einstein sum of two values."""
    equation, operands = node.args[:2]
    inputs, _, out = str(equation).replace(" ", "").partition("->")
    letters = (*inputs.split(","), out)
    if len(operands) != 2 or "." in inputs or not out or any(len(set(word)) < len(word) for word in letters):  # type: ignore[arg-type]
        return _lock(walk, node, f"({equation}) is not a plain product of two values")
    return walk.spread_out(node, _contraction(walk, node, letters, tuple(operands)))  # type: ignore[arg-type]


@rule(aten.scaled_dot_product_attention.default, zeros=Zeros.BROKEN)
def attention(walk: Walk, node: Node) -> Labels:
    """Follow attention, pruned by whole heads of the queries, keys and values."""
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


def _lock(walk: Walk, node: Node, what: str) -> Tensor | None:
    """Lock all labels that flow into a node; its value then carries no channels."""
    for source in node.all_input_nodes:
        walk.lock(walk.labels(source), f"{walk.describe(node)} {what}")
    return None


def _tied_features(walk: Walk, node: Node) -> Tensor | None:
    labels = walk.labels(node)
    return labels if labels is None else walk.tie_along(labels, {labels.dim() - 1})


def _contraction(
    walk: Walk, node: Node, letters: tuple[str, str, str], operands: tuple[Node | Tensor | None, Node | Tensor | None]
) -> Tensor | None:
    """Return the labels of a product of two values, summed over the letters that the result does not have.

    operands: nodes, or the labels of a value without a node. A sum over the channels of a head ties them; channels that are
    summed and not in the result must be zero when closed.
    """
    sizes = _sizes(walk, letters, operands)
    order = "".join(sizes)
    one, other = (_over_letters(walk, operand, word, sizes) for operand, word in zip(operands, letters, strict=False))
    weights = [
        place for place, operand in enumerate(operands) if isinstance(operand, Node) and walk.is_of_parameters(operand)
    ]
    if len(weights) == 1 and operands[1 - weights[0]] is not None:
        return _times_parameter(walk, node, letters, operands, weights[0])
    if one is None or other is None:
        return _times_unlabelled(walk, node, letters, one, other, order)
    summed = {order.index(letter) for letter in order if letter not in letters[2]}
    channels = set(varying_dims(one)) | set(varying_dims(other))
    reason = f"{walk.describe(node)} multiplies it by values that cannot be pruned"
    if channels & summed:
        walk.book.tie(one, other, reason)
        if channels <= summed:
            walk.reads.extend(operand for operand in operands if isinstance(operand, Node))
            return None
        one, other = walk.tie_along(one, summed), walk.tie_along(other, summed)
    only_one = any(order[dim] not in letters[1] for dim in varying_dims(one))
    only_other = any(order[dim] not in letters[0] for dim in varying_dims(other))
    if only_one and only_other:
        shared = {dim for dim in range(len(order)) if order[dim] in letters[0] and order[dim] in letters[1]}
        if not shared & set(varying_dims(one)) & set(varying_dims(other)):
            walk.lock(other, f"{walk.describe(node)} multiplies channels by other channels")
            return _times_unlabelled(walk, node, letters, one, None, order)
        one = walk.tie_along(one, set(varying_dims(one)) - shared)  # whole heads
        other, only_other = walk.tie_along(other, set(varying_dims(other)) - shared), False
    walk.book.tie(one, other, reason)
    joint = other if only_other else one
    return _result(joint, order, letters[2])


def _times_parameter(
    walk: Walk,
    node: Node,
    letters: tuple[str, str, str],
    operands: tuple[Node | Tensor | None, Node | Tensor | None],
    place: int,
) -> Tensor | None:
    """Return the labels of a value times a parameter, or what is computed from parameters alone, as of a linear layer.

    The parameter is read along the letter that is summed, and writes channels along a letter of its own. What it shares with the
    value besides belongs to positions, or must stay.
    """
    weight, value, word, own = operands[place], operands[1 - place], letters[1 - place], letters[place]
    assert isinstance(weight, Node)
    sizes = _sizes(walk, letters, operands)
    order = "".join(sizes)
    labels = _over_letters(walk, value, word, sizes)
    varying = {order[dim] for dim in varying_dims(labels)} if labels is not None else set[str]()
    summed, written = set(word) & set(own) - set(letters[2]), set(own) & set(letters[2]) - set(word)
    if len(own) > 2 or not varying <= summed:
        written = set()  # a second kind of channels next to others cannot be followed
    if len(summed) != 1 or len(varying) > 1 or len(written) > 1 or varying & set(own) - summed:
        return _times_unlabelled(walk, node, letters, labels, None, order)
    if varying <= summed:
        (letter,) = summed
        if labels is not None and varying:
            line = along(labels, order.index(letter))
            assert line is not None, "one letter varies"
            walk.weight(weight, own.index(letter), line, "in")
            if isinstance(value, Node):
                walk.reads.append(value)
        labels = None
    for letter in written:
        line = walk.weight(weight, own.index(letter), walk.fresh(sizes[letter]), "out")
        labels = spread(line, order.index(letter), list(sizes.values())) if bool((line != STATIC).any()) else None
    return labels if labels is None else _result(labels, order, letters[2])


def _sizes(walk: Walk, letters: tuple[str, str, str], operands: tuple[Node | Tensor | None, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for operand, word in zip(operands, letters, strict=False):
        shape = walk.shape(operand) if isinstance(operand, Node) else () if operand is None else operand.shape
        for letter, size in zip(word, shape, strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def _over_letters(walk: Walk, operand: Node | Tensor | None, word: str, sizes: dict[str, int]) -> Tensor | None:
    """Return an operand's labels with a dimension for each letter, of stride 0 for missing letters."""
    labels = walk.labels(operand) if isinstance(operand, Node) else operand
    if labels is None:
        return None
    labels = labels.permute([word.index(letter) for letter in sizes if letter in word])
    for dim, letter in enumerate(sizes):
        labels = labels if letter in word else labels.unsqueeze(dim)
    return labels.expand(list(sizes.values()))


def _times_unlabelled(
    walk: Walk, node: Node, letters: tuple[str, str, str], one: Tensor | None, other: Tensor | None, order: str
) -> Tensor | None:
    labels = one if other is None else other
    if labels is None:
        return None
    words_of_other = letters[1] if other is None else letters[0]
    if any(order[dim] in words_of_other for dim in varying_dims(labels)):
        return _lock(walk, node, "multiplies it by values that cannot be pruned")
    return _result(labels, order, letters[2])


def _result(labels: Tensor, order: str, out: str) -> Tensor:
    """Return labels over all letters as those of the result."""
    for dim in reversed(range(len(order))):
        labels = labels if order[dim] in out else labels.select(dim, 0)
    kept = [letter for letter in order if letter in out]
    return labels.permute([kept.index(letter) for letter in out])
