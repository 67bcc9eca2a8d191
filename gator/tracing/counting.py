"""Counting the products of a walk: the MACs of every op that torch's flop counter counts, as functions of the widths.

Widths are read from the labels of values, whichever rule gave them. An op without a formula runs under the counter on fake
tensors; none of its inputs may carry channels that can be pruned, and without a channel rule none does.

A product of matrices is written in letters, as an Einstein sum: "axz", "azy" -> "axy".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import flop_registry

from gator.costs.counter import counting
from gator.graph.graph import Block, LockedGroup, Product, Term
from gator.graph.ops import BINARY, FREE, NORMS, POINTWISE, POOLING, cuts_whole_groups
from gator.graph.plans import compact
from gator.tracing.labels import STATIC
from gator.tracing.program import module_path, one_sample
from gator.tracing.walk import Walk
from gator.tracing.widths import Widths

aten = torch.ops.aten
BATCH_LETTERS = "abcdefgh"
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
NEVER_COUNTED = {*FREE, *POINTWISE, *POOLING, *NORMS, *BINARY, "cat"}
"""Names of ATen's ops that multiply no matrices."""
Operand = tuple[Node, str]
"""A value and a letter for each of its dimensions."""


class Uncountable(Exception):
    """An op that multiplies matrices by widths that are not known. Caught in count_products()."""


def count_products(
    walk: Walk, widths: Widths, blocks: Sequence[Block]
) -> tuple[tuple[Product, ...], tuple[Product, ...], tuple[str, ...]]:
    """Return the uses of layers' weights, all other products, and what could not be counted, in the order of the forward pass."""
    block_of = {name: block.name for block in blocks for name in block.nodes}
    layers: list[Product] = []
    products: list[Product] = []
    uncounted: list[str] = []
    for node in walk.nodes:
        if node.op != "call_function":
            continue
        counted = layers if node.target in LAYERS else products
        formula = LAYERS.get(node.target) or PRODUCTS.get(node.target) or _unchanging
        try:
            for macs, outputs in formula(walk, widths, node):
                name = str(node.target).split(".")[1]
                counted.append(Product(module_path(node), name, macs, outputs, block_of.get(node.name)))
        except Uncountable:
            uncounted.append(walk.describe(node))
    return tuple(layers), tuple(products), tuple(uncounted)


Counted = Iterator[tuple[Term, Term]]
"""The MACs of products, and the values that come out of each layer."""
NOTHING = Term(0, ())


def unlabelled_layers(walk: Walk) -> Iterator[LockedGroup]:
    """Yield the layers whose channels no label follows, with the reason, each module once."""
    labelled = {entry.tensor for entry in walk.book.entries.values()}
    for module, node in {module_path(node): node for node in walk.nodes if node.target in LAYERS}.items():
        weights = [weight for weight in node.all_input_nodes[1:] if len(walk.shape(weight)) > 1]
        labels = walk.values.get(node)
        has_labels = isinstance(labels, Tensor) and bool((compact(labels) != STATIC).any())
        if has_labels or any(walk.tensors.get(weight.name) in labelled for weight in weights):
            continue
        size = _first_value(node).shape[1 if LAYERS[node.target] is _convolution else -1]
        reason = f"{walk.describe(node)} keeps its state whole"
        if LAYERS[node.target] is not _recurrent:
            reason = f"{walk.tensor_free_weight(weights[0])} is computed, not a parameter"
        yield LockedGroup(module or node.name, size, reason)


# --- layers -----------------------------------------------------------------------------------------------------------


def _convolution(walk: Walk, widths: Widths, node: Node) -> Counted:
    args = walk.arguments(node)
    source, kernel, num_groups = args["input"], walk.shape(args["weight"])[1:], args["groups"]
    num_in, num_out, is_transposed = walk.shape(source)[1], walk.shape(node)[1], node.target in TRANSPOSED
    row_in, row_out = widths.along(source, 1), widths.along(node, 1)
    positions = _numel(source) // num_in if is_transposed else _numel(node) // num_out
    if num_groups > 1 and cuts_whole_groups(num_in, num_groups):
        macs = Term(positions * kernel.numel(), (row_in if is_transposed else row_out,))
    else:
        macs = Term(positions * kernel[1:].numel(), (row_in / num_groups, row_out))
    yield macs, Term(_numel(node) // num_out, (row_out,))


def _linear(walk: Walk, widths: Widths, node: Node) -> Counted:
    row_out, positions = widths.along(node, -1), _numel(node) // walk.shape(node)[-1]
    yield Term(positions, (widths.along(node.args[0], -1), row_out)), Term(positions, (row_out,))


def _recurrent(walk: Walk, widths: Widths, node: Node) -> Counted:
    """Every matrix of a recurrent layer or cell multiplies once a step."""
    source, *others = node.all_input_nodes
    num_out = math.prod(map(one_sample, _first_value(node).shape))
    for weight in others:
        if weight.name in walk.tensors and len(walk.shape(weight)) == 2:
            steps = _numel(source) // walk.shape(source)[-1]
            yield Term(steps, (widths.along(weight, 0), widths.along(weight, 1))), Term(num_out, ())
            num_out = 0


# --- products of matrices ---------------------------------------------------------------------------------------------


def _matmul(walk: Walk, widths: Widths, node: Node) -> Counted:
    one, other = [arg for arg in node.args if isinstance(arg, Node)][-2:]  # of addmm and baddbmm the last two
    num_one, num_other = len(walk.shape(one)), len(walk.shape(other))
    if min(num_one, num_other) < 2:
        yield from _unchanging(walk, widths, node)
        return
    batch = BATCH_LETTERS[: max(num_one, num_other) - 2]
    words = batch[len(batch) - num_one + 2 :] + "xz", batch[len(batch) - num_other + 2 :] + "zy"
    yield _term(widths, [(one, words[0]), (other, words[1]), (node, batch + "xy")], batch + "xzy"), NOTHING


def _einsum(walk: Walk, widths: Widths, node: Node) -> Counted:
    args = walk.arguments(node)
    equation, operands = args["equation"].replace(" ", ""), args["tensors"]
    inputs, _, out = equation.partition("->")
    words = inputs.split(",")
    is_plain = all(len(set(word)) == len(word) for word in (*words, out)) and "." not in inputs and "->" in equation
    if len(operands) != 2 or not is_plain:
        yield from _unchanging(walk, widths, node)
        return
    parts = [*zip(operands, words, strict=True), (node, out)]
    one, other, _ = (dict(zip(word, _sizes(value), strict=True)) for value, word in parts)
    summed = [letter for letter in one if letter not in out and min(one[letter], other.get(letter, 1)) > 1]
    if summed:  # else einsum multiplies element by element; what only one value has is summed before
        yield _term(widths, parts, "".join(summed) + out, vanishes=frozenset(summed)), NOTHING


def _attention(walk: Walk, widths: Widths, node: Node) -> Counted:
    """Scores of queries and keys, and their sums of values."""
    args = walk.arguments(node)
    query, key, value = (args[name] for name in ("query", "key", "value"))
    batch = BATCH_LETTERS[: len(walk.shape(node)) - 2]
    operands = [(query, batch + "xd"), (key, batch + "yd"), (value, batch + "ye"), (node, batch + "xe")]
    if args["enable_gqa"] or any(len(walk.shape(source)) != len(word) for source, word in operands):
        yield from _unchanging(walk, widths, node)
        return
    for letters in (batch + "xyd", batch + "xye"):
        yield _term(widths, operands, letters), NOTHING


def _term(widths: Widths, operands: Sequence[Operand], letters: str, vanishes: frozenset[str] = frozenset()) -> Term:
    """Return the product of the sizes of the letters, as a function of the widths.

    operands: the values that are multiplied, and their product; what carries channels in any of them is cut in all.
    vanishes: letters over which an einsum sums; when they hold one entry, it multiplies element by element.
    """
    sizes: dict[str, int] = {}
    for value, word in operands:
        for letter, size in zip(word, _sizes(value), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    parts = [
        (frozenset(word[dim] for dim in dims) or frozenset([f"channel {int(channels[0])}"]), channels)
        for value, word in operands
        for dims, channels in widths.parts(value)
    ]
    taken: set[str] = set()
    rows: list[Tensor] = []
    is_zero_at_one = False
    for own, channels in sorted(parts, key=lambda part: -len(part[0])):
        if (
            own & (sizes.keys() - set(letters)) or own <= taken
        ):  # summed before the product, or known from another value
            continue
        if own & taken:
            raise Uncountable
        row = widths.row(channels, math.prod(sizes.get(letter, 1) for letter in own))
        is_first = bool(vanishes) and vanishes <= own
        is_zero_at_one |= is_first
        rows.insert(0 if is_first else len(rows), row)
        taken |= own
    return Term(math.prod(sizes[letter] for letter in set(letters) - taken), tuple(rows), is_zero_at_one)


# --- all other ops ----------------------------------------------------------------------------------------------------


def _unchanging(walk: Walk, widths: Widths, node: Node) -> Counted:
    """An op whose inputs carry no channels, counted as it runs on one sample."""
    if isinstance(node.target, HigherOrderOperator):
        raise Uncountable
    if not _is_counted(node):
        return
    try:
        with FakeTensorMode(), counting() as counter:
            node.target(*_one_sample(node.args), **_one_sample(node.kwargs))  # type: ignore[operator]
    except RuntimeError as error:
        raise Uncountable from error
    macs = counter.get_total_flops() // 2
    if macs and any(widths.parts(source) for source in node.all_input_nodes):
        raise Uncountable
    if macs:
        yield Term(macs, ()), NOTHING


def _is_counted(node: Node) -> bool:
    """Whether the counter may count an op: it has a formula there, or is made of other ops."""
    op = node.target
    if not isinstance(op, OpOverload) or op._schema.name.removeprefix("aten::") in NEVER_COUNTED:
        return False
    is_composite = op.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return bool(node.all_input_nodes) and (is_composite or op._overloadpacket in flop_registry)


def _one_sample(arguments: Any) -> Any:
    """Return exported arguments, nested as they are, for one sample; fake tensors for values."""

    def of(leaf: Any) -> Any:
        return map_aggregate(leaf.meta["val"], of) if isinstance(leaf, Node) else _fake(leaf)

    return map_aggregate(arguments, of)


def _fake(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return one_sample(leaf)
    return torch.empty([one_sample(size) for size in leaf.shape], dtype=leaf.dtype, device=leaf.device)


def _sizes(node: Node) -> list[int]:
    """Return the shape of a value for one sample."""
    return [one_sample(size) for size in node.meta["val"].shape]


def _first_value(node: Node) -> Tensor:
    value = node.meta["val"]
    return value[0] if isinstance(value, list | tuple) else value


def _numel(node: Node) -> int:
    return math.prod(_sizes(node))


Formula = Callable[[Walk, Widths, Node], Counted]
LAYERS: dict[Any, Formula] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, *TRANSPOSED), _convolution),
    aten.linear.default: _linear,
    **dict.fromkeys((aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent),
    **dict.fromkeys((aten.gru_cell.default, aten.lstm_cell.default), _recurrent),
    **dict.fromkeys((aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default), _recurrent),
}
"""Ops that apply a weight -> their formula."""
PRODUCTS: dict[Any, Formula] = {
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _matmul),
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
}
"""Ops that multiply any two values -> their formula."""
