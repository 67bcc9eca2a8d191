"""The sizes that forward passes state: which of them change when channels are pruned, and which channels must therefore stay.

A view, a split or a slice states sizes. When channels are pruned, its module's forward pass is regenerated with new sizes. That
needs values that stay rectangular. In a channel shuffle (view, transpose, view) they do not when each channel is chosen alone:
there the views in between are omitted and one index picks the channels.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from gator.graph.numbers import SizeOf, formula_of, sizes_in
from gator.graph.plans import Attribute, ForwardPlan, Gather, Layout, Ref, compact, refs_in
from gator.tracing.forwards import Forwards, Unwritable
from gator.tracing.labels import STATIC, along, collapse, spread, varying_dims
from gator.tracing.program import BATCH, call_keys, module_path
from gator.tracing.rules import RULES
from gator.tracing.rules.elementwise import same_value
from gator.tracing.rules.layers import convolution, group_norm, transposed_convolution
from gator.tracing.rules.movement import move, movement
from gator.tracing.walk import Walk

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default, aten.expand.default, aten.broadcast_to.default, aten.unflatten.int)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
FACTORIES = (
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
    *(aten.arange.default, aten.arange.start),
)
PICKS = (aten.slice.Tensor, aten.narrow.default, aten.select.int)
SPLITS = (
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.tensor_split.sections, aten.tensor_split.indices),
)
_GROUPED: dict[Any, tuple[type[nn.Module], str]] = {
    convolution: (_ConvNd, "groups"),
    transposed_convolution: (_ConvNd, "groups"),
    group_norm: (nn.GroupNorm, "num_groups"),
}
"""Rule -> the layer whose number of groups follows its weight, and the argument that states it."""


class StatedSizes:
    """The widths that a network's forward passes state. Needs a finished walk."""

    def __init__(self, walk: Walk, forwards: Forwards) -> None:
        self.walk, self.forwards = walk, forwards
        roots = walk.book.roots()
        static = torch.tensor([STATIC])
        locked = torch.cat([static, *walk.book.lock_reasons(roots).values()])
        unlocked = roots.masked_fill(torch.isin(roots, locked), STATIC)
        self._root_or_static = torch.cat([unlocked, static])  # index -1 is STATIC

    def obstacles(self) -> Iterator[tuple[Tensor, str]]:
        """Yield labels that must stay, because a forward states their width and cannot be regenerated, with the reason."""
        for key, values in self._stating.items():
            try:
                self.forwards.plan(key)
            except Unwritable as why:
                path = module_path(self._own_nodes[key][0])
                for labels in values:
                    yield labels, f"{path!r} states a size and cannot be regenerated: {why}"
        for node in self._labelled_nodes():
            where = self.walk.describe(node)
            if self._states_number_of_groups(node):
                yield self._labels(node), f"{module_path(node)!r} states a number of groups in {where}"
            if node.target is aten.slice.Tensor and len(node.args) > 4 and self._divides_cut_dim(node):
                yield self._labels(node), f"{where} takes every n-th channel"
            if self._is_ragged(node) and not all(self._is_gathered(user, node) for user in node.users):
                yield self._labels(node), f"{where} arranges channels in several dimensions"

    def obstacles_in_training(self) -> Iterator[tuple[Tensor, str]]:
        """Yield the same for modules that run in training mode only, which are never regenerated. Needs the training-mode walk."""
        for node in self._labelled_nodes():
            only_trains = module_path(node) not in self.forwards.keys_of_path
            if only_trains and (self._states_size(node) or self._states_number_of_groups(node)):
                yield self._labels(node), f"{self.walk.describe(node)} states a size and runs in training mode only"

    def modules(self) -> list[str]:
        """Return the modules whose forward pass states a size that may change when channels are pruned."""
        return list(dict.fromkeys(module_path(self._own_nodes[key][0]) for key in self._stating))

    def plan(self, path: str, channels_of: Callable[[Tensor], Tensor]) -> ForwardPlan:
        """Return the plan of a module with the layouts of the values that its forward moves or splits.

        channels_of: from labels to indices into the concatenation of all groups' channels.
        """
        plan = self.forwards.plan_of(path)
        layouts, gathers = {}, {}
        for step in plan.steps:
            node = self.walk.program.by_name.get(step.name)
            if node is None or step.function is None or not (moves(node) or states_size(node)):
                continue
            for value in (node, *node.all_input_nodes):
                labels = self.walk.values.get(value)
                if isinstance(labels, Tensor):
                    layouts[value.name] = Layout(collapse(channels_of(labels)))
            found = self._gather(node)
            if found is not None:
                gathers[node.name] = found
        for name in {size.value.name for size in _sizes_of(plan) if isinstance(size.value, Ref)} - layouts.keys():
            labels = self.walk.values.get(self.walk.program.by_name[name])
            if isinstance(labels, Tensor):
                layouts[name] = Layout(collapse(channels_of(labels)))
        stated = self._stating.get(self.forwards.keys_of_path[path][0], [])
        flowing = [Layout(channels_of(labels)).distinct() for labels in stated]
        return replace(plan, layouts=layouts, gathers=gathers, channels=torch.cat([plan.channels, *flowing]).unique())

    @cached_property
    def _own_nodes(self) -> dict[str, list[Node]]:
        """Return, by key of a call, the nodes of the module's own code."""
        own: dict[str, list[Node]] = {}
        for node in self.walk.nodes:
            if node.op == "call_function" and call_keys(node):
                own.setdefault(self.forwards.own_key(node), []).append(node)
        return own

    @cached_property
    def _stating(self) -> dict[str, list[Tensor]]:
        """Return, by key of a call whose forward states a size, the prunable labels of the values that it reads or makes.

        The size may have been computed from that of any such value.
        """
        stating = {}
        for key, nodes in self._own_nodes.items():
            values = self._values(key)
            found = list(self._widths_read(key, values))
            if any(self._states_size(node) for node in nodes):
                found += [labels for value in values if (labels := self._cut_labels(value)) is not None]
            if found:
                stating[key] = found
        return stating

    def _widths_read(self, key: str, values: list[Node]) -> Iterator[Tensor]:
        """Yield the prunable labels of values by whose size a module's own code decides, or computes a number for an op or a call."""
        program, call = self.walk.program, self.walk.program.calls.get(key)
        numbers = [(node.args, node.kwargs) for node in self._own_nodes[key]]
        numbers += [(inner.args, inner.kwargs) for inner in program.calls.values() if inner.parent == key]
        formulas = [*map(formula_of, tree_leaves(numbers)), *(one.formula for one in program.decisions.get(key, ()))]
        given = {
            size
            for leaf in tree_leaves((call.args, call.kwargs) if call else ())
            for size in sizes_in(formula_of(leaf))
        }
        own = {Ref(value.name) for value in values}
        for size in dict.fromkeys(size for formula in formulas for size in sizes_in(formula)):
            if isinstance(size.value, Attribute):
                entry = self.walk.book.entries.get((size.value.name, size.dim))
                labels = None if entry is None else entry.labels
            else:
                is_given = size in given and size.value not in own
                labels = None if is_given else self._cut_labels(program.by_name[size.value.name], size.dim)
            if labels is not None and bool((self._root_or_static[labels.unique()] != STATIC).any()):
                yield labels

    def _cut_labels(self, node: Node, dim: int | None = None) -> Tensor | None:
        """Return the labels of a value along one of whose dimensions, or this one, prunable channels differ; else None."""
        dims = self._cut_dims(node)
        return self.walk.labels(node) if dims and dim in (None, *dims) else None

    def _values(self, key: str) -> list[Node]:
        """Return the values that a module's own code reads and makes: arguments, results of its ops and of the modules it calls."""
        program, own = self.walk.program, self._own_nodes[key]
        calls = [call for call in program.calls.values() if call.parent == key or call.key == key]
        passed = [ref.name for call in calls for ref in refs_in((call.args, call.kwargs, call.output))]
        nodes = [*own, *(source for node in own for source in node.all_input_nodes)]
        nodes += [program.by_name[name] for name in passed if name in program.by_name]
        return list(dict.fromkeys(nodes))

    def _labelled_nodes(self) -> Iterator[Node]:
        for node in self.walk.nodes:
            sources = node.all_input_nodes[:1] if states_size(node) else []
            if node.op == "call_function" and any(self.walk.values.get(n) is not None for n in (node, *sources)):
                yield node

    def _labels(self, node: Node) -> Tensor:
        """Return the labels of the value that a node reads, which are more than its own if it takes a part; else its own."""
        for value in (*node.all_input_nodes[:1], node):
            labels = self.walk.values.get(value)
            if isinstance(labels, Tensor):
                return labels
        return self._labels(node.all_input_nodes[0])

    def _cut_dims(self, node: Node) -> list[int]:
        """Return the dimensions of a value along which prunable channels differ."""
        labels = self.walk.values.get(node)
        if not isinstance(labels, Tensor):
            return []
        rooted = collapse(self._root_or_static[compact(labels)])
        return varying_dims(rooted)

    def _states_size(self, node: Node) -> bool:
        """Whether a size or position in a node's arguments may have been computed from a number of channels."""
        if node.target in RESHAPES or node.target in FACTORIES:
            return states_number(node)
        if node.target is aten.squeeze.default:
            return bool(self._cut_dims(node.all_input_nodes[0]))
        if node.target in NORMS:
            module = self.forwards.model.get_submodule(module_path(node))
            is_fitted = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None
            return not is_fitted and bool(self._cut_dims(node.all_input_nodes[0]))
        return states_size(node) and self._divides_cut_dim(node)

    def _divides_cut_dim(self, node: Node) -> bool:
        source = node.all_input_nodes[0]
        return divided_dim(node) % len(self.walk.shape(source)) in self._cut_dims(source)

    def _states_number_of_groups(self, node: Node) -> bool:
        """Whether a node is a grouped convolution or group normalisation of prunable channels that no layer of its kind makes."""
        layer, argument = _GROUPED.get(RULES[node.target].labels, (None, ""))
        if layer is None or self.walk.arguments(node)[argument] == 1:
            return False
        is_fitted = isinstance(self.forwards.model.get_submodule(module_path(node)), layer)
        return not is_fitted and bool(self._cut_dims(node))

    def _is_ragged(self, node: Node) -> bool:
        if isinstance(self.walk.values.get(node), list):
            return self._is_ragged(node.all_input_nodes[0])
        return len(self._cut_dims(node)) > 1

    def _is_gathered(self, user: Node, node: Node) -> bool:
        is_near = moves(user) and call_keys(user) == call_keys(node)
        return is_near and (self._is_ragged(user) or self._gather(user) is not None)

    def _gather(self, node: Node) -> Gather | None:
        """Return how a node picks channels through values that are not rectangular; None if it does not do so along one dimension."""
        chain = [node]
        while moves(chain[0]) and self._is_ragged(chain[0].all_input_nodes[0]):
            chain.insert(0, chain[0].all_input_nodes[0])
        if len(chain) == 1 or not moves(chain[0]) or any(call_keys(op) != call_keys(node) for op in chain):
            return None
        source = chain[0].all_input_nodes[0]
        dims = self._cut_dims(source)
        if len(dims) != 1 or self._cut_dims(node) not in (dims, []):
            return None
        (dim,), shape = dims, self.walk.shape(source)
        places = along(_follow(chain, spread(torch.arange(shape[dim]), dim, shape)), dim)
        entries = torch.arange(shape.numel()).view(shape)
        if places is None or not torch.equal(_follow(chain, entries), entries.index_select(dim, places)):
            return None
        return Gather(source.name, dim, places)


def _sizes_of(plan: ForwardPlan) -> Iterator[SizeOf]:
    """Yield the sizes that a plan's numbers and decisions are computed from, and those of its inputs."""
    yield from plan.input_sizes
    for decision in plan.decisions:
        yield from sizes_in(decision.formula)
    for step in plan.steps:
        for leaf in tree_leaves((step.args, step.kwargs)):
            yield from sizes_in(formula_of(leaf))


def _follow(chain: list[Node], value: Tensor) -> Tensor:
    """Return a value after a chain of moving ops."""
    parts: Tensor | list[Tensor | None] | None = value
    for node in chain:
        if node.target is operator.getitem:
            assert isinstance(parts, list)
            parts = parts[node.args[1]]  # type: ignore[index]
        elif RULES[node.target].labels is movement:
            assert isinstance(parts, Tensor)
            parts = move(node, parts)
    assert isinstance(parts, Tensor)
    return parts


def moves(node: Node) -> bool:
    """Whether a node only moves data."""
    if node.target is operator.getitem:
        return moves(node.all_input_nodes[0])
    return node.target in RULES and RULES[node.target].labels in (movement, same_value)


def states_size(node: Node) -> bool:
    """Whether a size or a position is among a node's arguments."""
    return node.target in (*RESHAPES, *SPLITS, *PICKS, *NORMS, aten.squeeze.default)


def states_number(node: Node) -> bool:
    """Whether a node that reshapes or makes a value states more of its shape than -1 and the number of samples."""
    sizes = next((arg for arg in reversed(node.args) if isinstance(arg, (list, tuple))), node.args)
    return any(size not in (-1, BATCH) for size in sizes)


def divided_dim(node: Node) -> int:
    """Return the dimension that a split, slice or select divides."""
    position = 2 if node.target in SPLITS else 1
    default = node.kwargs.get("dim", 0)
    return node.args[position] if len(node.args) > position else default  # type: ignore[return-value]
