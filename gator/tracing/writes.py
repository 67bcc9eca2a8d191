"""Ops in place on parts of values, which the exported graph shows and its dataflow does not, written as ops on whole values.

After `y[:, :8].add_(s)` later readers of y, and of other parts of it, see the sum. Here it becomes the concatenation of the sum with
the rest of y, which takes the place of y from there on.
"""

import operator
from collections.abc import Callable, Collection, Container
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from gator.graph.numbers import SizeOf, plain, with_formula
from gator.tracing.calls.record import STACK
from gator.tracing.reads import changed

aten = torch.ops.aten
_RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default),
)
_SWAPS = (aten.transpose.int, aten.swapaxes.default)
_ALIASES = (aten.alias.default, aten.detach.default)
_DROPOUTS = (
    *(aten.dropout.default, aten.feature_dropout.default),
    *(aten.alpha_dropout.default, aten.feature_alpha_dropout.default),
)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_PICKS = (aten.slice.Tensor, aten.narrow.default, aten.select.int)
_VIEWS = (*_RESHAPES, *_SWAPS, *_ALIASES, *_PICKS, aten.permute.default)


def is_in_place(op: Any) -> bool:
    """Whether an op writes over one of its arguments."""
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def out_of_place(op: Any) -> Callable[..., Any]:
    """Return the op that writes its result to a new tensor."""
    if not is_in_place(op):
        return op
    packet = getattr(aten, op._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, op._overloadname)


class Writes:
    """The ops in place of an exported graph, which is changed so that its dataflow is all that happens."""

    def __init__(self, graph: Graph, tensors: Container[str], aliases: Collection[Node]) -> None:
        """tensors: names of the nodes that are parameters and buffers. aliases: of what modules get, and need not return in training."""
        self.graph = graph
        nodes = list(graph.nodes)
        self.order = {node: place for place, node in enumerate(nodes)}
        self.last_use = {node: max((self.order[user] for user in node.users), default=-1) for node in nodes}
        self.source = {node: source for node in nodes if (source := _source(node)) is not None}
        """A value -> the one that it shares memory with."""
        self.in_one_mode = {
            node: node.all_input_nodes[0]
            for node in nodes
            if node in aliases or (node.target in _DROPOUTS and not node.args[2])
        }
        """The same for values that share it in eval mode, and may not in training mode."""
        for node in self.in_one_mode:
            self.source.pop(node, None)
        self.history: dict[Node, list[tuple[int, Node]]] = {}
        """A value -> what takes its place, each with the place of the op since which it does."""
        self.unfollowed: dict[Node, Node] = {}
        """A value -> the op that writes over a part of it in a way that is not followed."""
        self.in_place = {node for node in nodes if is_in_place(node.target)}
        """Ops that wrote over their argument when exported, and return it."""
        fixed: set[Node] = set()
        """Values that are computed from parameters alone: whatever is written there, nothing masks it."""
        for node in nodes:
            node.args, node.kwargs = map_arg((node.args, node.kwargs), self.now)
            if node.name in tensors or (node.op == "call_function" and fixed.issuperset(node.all_input_nodes)):
                fixed.add(node)
            elif node in self.in_place:
                self._follow(node)

    def now(self, node: Node) -> Node:
        """Return what holds a node's value at the end of what has been followed."""
        return self.at(node, len(self.order))

    def at(self, node: Node, place: int) -> Node:
        """Return what holds a node's value once the op at a place of the exported graph has run."""
        return next((new for since, new in reversed(self.history.get(node, [])) if since <= place), node)

    def _follow(self, write: Node) -> None:
        """Let later readers of what an op writes over, and of all that shares memory with it, read the result."""
        place, base = self.order[write], self._base(write)
        in_one_mode = self._family_in_one_mode(base, place)
        if any(self.last_use[node] > place for node in in_one_mode):
            self.unfollowed.update(dict.fromkeys([base, *in_one_mode], write))
            return
        family = [node for node in self.order if self.order[node] < place and self._base(node) is base]
        later = [node for node in family if self.last_use[node] > place]
        if not later or base.op != "call_function":
            return
        chain = [self.source[write]]
        while chain[-1] in self.source:
            chain.append(self.source[chain[-1]])
        if not (all(map(_is_invertible, chain[:-1])) and _make_plain(write)):
            self.unfollowed.update(dict.fromkeys(family, write))
            return
        value, self.cursor = write, write
        for node in chain:
            self.history.setdefault(node, []).append((place, value))
            value = self._with_part(node, value) if node in self.source else value
        for node in later:
            self._renew(node, place)

    def _family_in_one_mode(self, base: Node, place: int) -> list[Node]:
        """Return the values before a place that share memory with a base in eval mode alone."""
        if not self.in_one_mode:
            return []
        first = self._first(base)
        before = [node for node in self.order if self.order[node] < place and self._base(node) is not base]
        return [node for node in before if self._first(node) is first]

    def _first(self, node: Node) -> Node:
        """Return the value that a node shares memory with in eval mode, all the way back."""
        while (source := self.source.get(node) or self.in_one_mode.get(node)) is not None:
            node = source
        return node

    def _base(self, node: Node) -> Node:
        while node in self.source:
            node = self.source[node]
        return node

    def _renew(self, node: Node, place: int) -> Node:
        """Return a view of what has been written over, taken once more."""
        if node in self.history and self.history[node][-1][0] == place:
            return self.history[node][-1][1]
        source = self._renew(self.source[node], place)
        if node.target is operator.getitem:
            dim, begin, end = _taken(node)
            new = self._call(node, aten.slice.Tensor, source, dim, begin, end)
        elif node in self.in_place:
            new = source
        else:
            new = self._call(node, node.target, source, *node.args[1:])
        self.history.setdefault(node, []).append((place, new))
        return new

    def _with_part(self, view: Node, part: Node) -> Node:
        """Return what the source of a view is once `part` has taken the place of the view."""
        source, target = self.source[view], view.target
        shape = source.meta["val"].shape
        if view in self.in_place or target in _ALIASES:
            return part
        if target in _RESHAPES:
            sizes = [with_formula(size, SizeOf(source, dim, size)) for dim, size in enumerate(shape)]
            return self._call(view, aten.reshape.default, part, sizes)
        if target in _SWAPS:
            return self._call(view, target, part, *view.args[1:])
        if target is aten.permute.default:
            dims = [dim % len(shape) for dim in view.args[1]]  # type: ignore[union-attr, operator]
            return self._call(view, target, part, [dims.index(dim) for dim in range(len(dims))])
        dim, begin, end = _taken(view)
        part = self._call(view, aten.unsqueeze.default, part, dim) if target is aten.select.int else part
        bounds = [(0, begin), (begin, end), (end, shape[dim])]
        parts = [
            part if bound == bounds[1] else self._call(view, aten.slice.Tensor, self.now(source), dim, *bound)
            for bound in bounds
            if bound[0] < bound[1]
        ]
        return part if len(parts) == 1 else self._call(view, aten.cat.default, parts, dim)

    def _call(self, view: Node, target: Any, *args: Any) -> Node:
        """Insert a call, as if made by the code that took the view."""
        with self.graph.inserting_after(self.cursor):
            self.cursor = node = self.graph.call_function(target, args)
        values = changed(map_arg(args, lambda arg: arg.meta["val"]), plain)
        node.meta = {"val": target(*values), STACK: view.meta.get(STACK)}
        return node


def _source(node: Node) -> Node | None:
    """Return the value that a node shares memory with; None if it has memory of its own."""
    if node.target is operator.getitem:
        split: Any = node.args[0]
        return split.args[0] if split.target in _SPLITS else None
    is_view = node.target in (*_VIEWS, aten.expand.default) or is_in_place(node.target)
    return node.args[0] if is_view and isinstance(node.args[0], Node) else None


def _is_invertible(view: Node) -> bool:
    """Whether a value can be put together from a part of it, the view, and the rest."""
    is_strided = view.target is aten.slice.Tensor and len(view.args) > 4 and view.args[4] != 1
    return view.target is not aten.expand.default and not is_strided


def _make_plain(write: Node) -> bool:
    """Make an op in place one that returns a new value; return whether there is such an op."""
    if write.target is aten.copy_.default:
        part, value = write.all_input_nodes
        if value.meta["val"].dtype != part.meta["val"].dtype:
            return False
        write.target, write.args = aten.expand_as.default, (value, part)
        return True
    try:
        write.target = out_of_place(write.target)
    except AttributeError:
        return False
    return True


def _taken(view: Node) -> tuple[int, int, int]:
    """Return the dimension that a slice, a select or a part of a split divides, and where its part begins and ends."""
    args: list[Any] = list(view.args)
    if view.target is operator.getitem:
        split, index = args
        dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        sizes = [part.shape[dim] for part in split.meta["val"]]
        return dim % split.meta["val"][0].dim(), sum(sizes[:index]), sum(sizes[: index + 1])
    source, dim, begin, end = (args + [0, None, None][len(args) - 1 :])[:4]
    shape = source.meta["val"].shape
    size = shape[dim]
    if view.target is aten.select.int:
        return dim % len(shape), begin % size, begin % size + 1
    if view.target is aten.narrow.default:
        return dim % len(shape), begin % size, begin % size + end
    begin, end, _ = slice(plain(begin), plain(end)).indices(size)
    return dim % len(shape), begin, end
