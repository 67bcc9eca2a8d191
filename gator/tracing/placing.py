"""Placing the gates: after the last op that can turn zero into something else, once on each path.

A convolution or linear layer sums over the channels it reads, so a closed channel must reach it as exactly zero. The placer
walks from each reader back over ops that keep zeros (ReLU, pooling, additions) to ops that do not (batch normalisation, a
convolution, attention). It gates the output of the module that contains them, or the value inside its forward pass if no module
returns it; if that value cannot be masked, the next one on the way to the reader. Layer normalisation takes its statistics over
the open channels, so every one over channels is gated.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from gator.graph.graph import Block, ChannelGroup, GateSite
from gator.graph.plans import Ref, compact
from gator.tracing.calls.record import is_hook
from gator.tracing.forwards import Forwards
from gator.tracing.labels import STATIC, along, collapse, equal, varying_dims
from gator.tracing.program import call_keys, module_path
from gator.tracing.rules import RULES
from gator.tracing.walk import Walk, Zeros

aten = torch.ops.aten


class Unplaceable(Exception):
    """No value can be masked after zeros are lost, so the labels must be locked. Caught in GatePlacer."""

    def __init__(self, labels: Tensor, reason: str) -> None:
        super().__init__(reason)
        self.labels, self.reason = labels, reason


class Channels:
    """Maps labels to channels of groups."""

    def __init__(self, walk: Walk, groups: tuple[ChannelGroup, ...]) -> None:
        roots = walk.book.roots()
        channel_of_root = torch.full((walk.book.num_labels,), -1)
        begin = 0
        for group in groups:
            dim = group.dims[0]
            labels = walk.book.entries[dim.tensor, dim.dim].labels[dim.index[:, 0]]
            channel_of_root[roots[labels]] = begin + torch.arange(group.num_channels)
            begin += group.num_channels
        self.of_label = channel_of_root[roots]
        """(num_labels,) int64: index into the concatenation of all groups' channels; -1 for what stays."""
        self._of_label_or_static = torch.cat([self.of_label, torch.tensor([-1])])  # index -1 is STATIC

    def of(self, labels: Tensor) -> Tensor:
        """Return, in the shape of labels, indices into the concatenation of all groups' channels; -1 for what stays."""
        return self.distinct(labels).expand(labels.shape)

    def are_in(self, labels: Tensor) -> bool:
        """Whether any of these labels is that of a channel."""
        return bool((self.distinct(labels) >= 0).any())

    def distinct(self, labels: Tensor) -> Tensor:
        """Return of() with size 1 along every dimension on which labels do not differ."""
        assert STATIC == -1
        return self._of_label_or_static[compact(labels)]


class GatePlacer:
    """Finds the gate sites of a network."""

    def __init__(self, walk: Walk, channels: Channels, forwards: Forwards) -> None:
        self.walk, self.channels, self.forwards = walk, channels, forwards
        self.over_open = set(walk.normalisations)
        """Ops that must not see closed channels."""
        self.closed: set[Node] = set()
        self.sites: dict[Node, GateSite] = {}
        self.obstacles: list[tuple[Tensor, str]] = []
        """Labels that cannot be masked where they must be, with the reason. No channel is in two of them."""
        self._unmaskable: set[int] = set()
        """The channels of these labels."""

    def place(self, blocks: Sequence[Block]) -> tuple[GateSite, ...]:
        """Return the gate sites in the order of the forward pass; they hold if there are no obstacles."""
        for node in self.walk.normalisations:
            if self._has_channels(self._masked(node)):
                self._try(self._gate, node)
        for node in self.walk.reads:
            self._try(self._close, node)
        for node, divisors in self.walk.divisions.items():
            if self.sites.keys() & set(divisors) and node not in self.over_open:
                self.over_open.add(node)
                self.sites.pop(node, None)
                self._try(self._gate, node)
        for block in blocks:
            end = self.silencer(self.walk.program.by_name[block.output])
            assert end is not None, "a branch that cannot be silenced is not a block"
            self._gate(end, block.name)
        return tuple(self.sites[node] for node in sorted(self.sites))

    def _try(self, mask: Callable[[Node], None], node: Node) -> None:
        """Mask a node's value; else note its labels, unless it waits for others of its channels to be locked first."""
        try:
            mask(node)
        except Unplaceable as place:
            channels = set(self.channels.distinct(place.labels).flatten().tolist()) - {-1}
            if not channels & self._unmaskable:
                self.obstacles.append((place.labels, place.reason))
                self._unmaskable |= channels

    def silencer(self, node: Node) -> Node | None:
        """Return the earliest value that can be masked and whose zero makes `node` zero; None if there is none."""
        found = None
        while True:
            found = node if self._can_gate(node, ends_block=True) else found
            values = [source for source in node.all_input_nodes if source.name not in self.walk.tensors]
            keeps_zeros = node.target in RULES and self._zeros(node) in (Zeros.KEPT, Zeros.ONE_INPUT)
            if not keeps_zeros or len(values) != 1 or values[0].op != "call_function":
                return found
            node = values[0]

    def _close(self, node: Node) -> None:
        """Make closed channels exactly zero in a node's value."""
        if node in self.closed or node in self.sites or not self._has_channels(node):
            return
        zeros = self._zeros(node)
        carriers = [source for source in node.all_input_nodes if self._has_channels(source)]
        if zeros is Zeros.ONE_INPUT:
            carriers = [next((source for source in carriers if source in self.closed), *carriers[:1])]
        is_second_input = zeros is Zeros.FIRST_INPUT and node.all_input_nodes[:1] != carriers[:1]
        if zeros is Zeros.BROKEN or not carriers or is_second_input:
            self._gate(node)
        else:
            self._close_sources(node, carriers[:1] if zeros is Zeros.FIRST_INPUT else carriers)
        self.closed.add(node)

    def _close_sources(self, node: Node, sources: list[Node]) -> None:
        """Close the inputs of a node that keeps zeros; if they cannot be masked, the node itself."""
        try:
            for source in sources:
                self._close(source)
        except Unplaceable:
            if not self._can_gate(node):
                raise
            self._gate(node)

    def _masked(self, node: Node) -> Node:
        """Return the value whose channels a gate at a node closes: the node itself, or what it takes the mean of."""
        has_lost = node in self.over_open and self.walk.values.get(node) is None
        return node.all_input_nodes[0] if has_lost else node

    def _zeros(self, node: Node) -> Zeros:
        return Zeros.BROKEN if node in self.walk.breaks_zeros else RULES[node.target].zeros

    def _has_channels(self, node: Node) -> bool:
        """Whether a value holds prunable channels. Those of a value computed from parameters alone are never masked."""
        return node not in self.walk.plain and any(map(self.channels.are_in, self._parts(node)))

    def _parts(self, node: Node) -> list[Tensor]:
        """Return the labels of a node's value, or of its several values; none if it carries no channels."""
        parts = self.walk.values.get(node)
        return [labels for labels in (parts if isinstance(parts, list) else [parts]) if labels is not None]

    def _can_gate(self, node: Node, ends_block: bool = False) -> bool:
        try:
            self._site(node, "" if ends_block else None)
        except Unplaceable:
            return False
        return True

    def _gate(self, node: Node, block: str | None = None) -> None:
        """Mask a node's value, the whole value when a block is removed."""
        if block is not None or node not in self.sites:
            self.sites[node] = self._site(node, block)

    def _site(self, node: Node, block: str | None) -> GateSite:
        value, where = self._masked(node), self.walk.describe(node)
        labels = self.walk.values.get(value)
        if not isinstance(labels, Tensor):
            parts = [compact(part).flatten() for part in self._parts(node)]
            raise Unplaceable(
                torch.cat([torch.empty(0, dtype=torch.int64), *parts]),
                f"{where} makes several values, or none with channels",
            )
        if not value.meta["val"].dtype.is_floating_point:
            raise Unplaceable(labels, f"{where} makes closed channels non-zero in a value of whole numbers")
        channels = collapse(self.channels.of(labels))
        batch_dim, in_a_row = self.walk.program.batch_dim(value), self.walk.program.in_a_row.get(value)
        # They vary along none where the value is one channel, such as attention of one head, or a block ends and all stay.
        dims = varying_dims(channels) or [self._own_dim(node, value)]
        line = along(channels, dims[0])
        if line is None:
            raise Unplaceable(labels, f"{where} makes closed channels non-zero in several dimensions")
        has_channels = self._has_channels(value)
        if has_channels and (in_a_row is None or batch_dim == dims[0]):
            raise Unplaceable(
                labels, f"{where} makes closed channels non-zero in a value that samples share, unlike masks"
            )
        normalises = has_channels and node in self.over_open
        found = self._module_of_site(node, normalises, block is not None)
        if found is None:
            raise Unplaceable(labels, f"{where} makes closed channels non-zero where no module returns them")
        if batch_dim is None or in_a_row is None:
            return GateSite(*found, dims[0], line, None, 1, 1, block, normalises)
        num_rows = self.walk.program.batch_factors(value)[batch_dim] // in_a_row
        return GateSite(*found, dims[0], line, batch_dim, in_a_row, num_rows, block, normalises)

    def _own_dim(self, node: Node, value: Node) -> int:
        """Return the dimension that an op reduces or normalises; for other ops, one that is not the batch."""
        rank = value.meta["val"].dim()
        if node in self.over_open:
            args = self.walk.arguments(node)
            if "normalized_shape" in args:
                return rank - 1
            if (dim := args.get("dim")) is not None:
                return (dim[0] if isinstance(dim, list | tuple) else dim) % rank
        return 1 if self.walk.program.batch_dim(value) == 0 and rank > 1 else 0

    def _module_of_site(self, node: Node, normalises: bool, ends_block: bool) -> tuple[str, str | None] | None:
        """Return the module that masks a value, and the step of its forward pass; None if it masks what it returns.

        A value that a module returns can also be masked in the forward pass that calls the module. It must be where a block ends and
        several calls return it, of which each may end another block.
        """
        is_shared = ends_block and len(self.forwards.keys_of_path[module_path(node)]) > 1
        if not normalises and not is_shared and self._is_returned(node):
            return module_path(node), None
        inner = ""
        for key in reversed(call_keys(node)):
            call = self.walk.program.calls.get(key)
            if call is not None and not is_hook(inner) and self.forwards.can_mask(key, node.name):
                return call.path, node.name
            if normalises or (call is not None and call.output != Ref(node.name)):
                return None
            inner = key
        return None

    def _is_returned(self, node: Node) -> bool:
        """Whether a module returns the node, in each of its calls with the same channels at the same place."""
        call = self.walk.program.calls.get(self.forwards.own_key(node))
        if call is None or call.own_output != Ref(node.name):
            return False
        labels = self.walk.labels(node)
        assert labels is not None, f"{node} carries no channels"
        for key in self.forwards.keys_of_path[call.path]:
            other = self.walk.program.calls.get(key)
            if other is None or not isinstance(other.own_output, Ref):
                return False
            theirs = self.walk.labels(self.walk.program.by_name[other.own_output.name])
            if theirs is None or not equal(self.channels.of(theirs), self.channels.of(labels)):
                return False
        return True
