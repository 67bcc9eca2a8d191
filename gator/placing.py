"""Where the gates stand: after the last op that can turn zero into something else, once on each path.

A convolution or linear layer sums over the channels it reads, so a closed channel must reach it as exactly zero. From each
reader we walk back over the ops that keep zeros (ReLU, pooling, additions) to the ones that do not (batch normalisation, a
convolution), and gate the output of the module that holds them.
"""

from collections.abc import Container
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from gator.graph import Block, ChannelGroup, GateSite
from gator.labels import STATIC, along, varying_dims
from gator.rules import RULES, Zeros, zeros_of

if TYPE_CHECKING:
    from gator.tracing import Walk


class Unplaceable(Exception):
    """No module's output can be masked where zero is lost; the labels must be locked. Caught in trace()."""

    def __init__(self, labels: Tensor, reason: str) -> None:
        super().__init__(reason)
        self.labels, self.reason = labels, reason


def place_gates(walk: "Walk", groups: tuple[ChannelGroup, ...], blocks: tuple[Block, ...]) -> tuple[GateSite, ...]:
    """Return the gate sites of a network, in the order of its forward pass.

    Raises: Unplaceable with labels that no module's output can mask.
    """
    placer = _Placer(walk, channel_of_label(walk, groups))
    for node in walk.nodes:
        if node.op == "call_function" and node.target in RULES and RULES[node.target].zeros is Zeros.READ:
            for source in node.all_input_nodes:
                placer.close(source)
    by_name = {node.name: node for node in walk.nodes}
    for block in blocks:
        placer.silence(silencer(walk, by_name[block.output]), block.name)
    order = {node: position for position, node in enumerate(walk.nodes)}
    return tuple(placer.sites[node] for node in sorted(placer.sites, key=order.__getitem__))


def stack_keys(node: Node) -> list[str]:
    """Return the keys of the module calls that a node was traced in, outermost first."""
    return list(node.meta.get("nn_module_stack") or {})


def is_module_output(node: Node) -> bool:
    """Whether a node is what its innermost module returns: nothing inside that module call uses it."""
    keys = stack_keys(node)
    return len(keys) > 1 and not any(keys[-1] in stack_keys(user) for user in node.users)


def silencer(walk: "Walk", node: Node) -> Node:
    """Return the node whose zero makes `node` zero: back over single-input ops that keep zeros."""
    while node.target in RULES and zeros_of(walk, node) is Zeros.KEPT and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def channel_of_label(walk: "Walk", groups: tuple[ChannelGroup, ...]) -> Tensor:
    """Return (num_labels,) the index of each label's channel in the concatenation of the groups; -1 for none."""
    roots = walk.book.roots()
    channel_of_root = torch.full((walk.book.num_labels,), -1)
    begin = 0
    for group in groups:
        dim = group.dims[0]
        labels = walk.book.entries[dim.tensor, dim.dim].labels[dim.index[:, 0]]
        channel_of_root[roots[labels]] = begin + torch.arange(group.num_channels)
        begin += group.num_channels
    return channel_of_root[roots]


class _Placer:
    def __init__(self, walk: "Walk", channel_of_label: Tensor) -> None:
        self.walk = walk
        self.channel_of_label = channel_of_label
        self.closed: set[Node] = set()
        self.sites: dict[Node, GateSite] = {}

    def close(self, node: Node) -> None:
        """See to it that closed channels are exactly zero in a node's value."""
        if node in self.closed or not self._has_channels(node):
            return
        self.closed.add(node)
        zeros = zeros_of(self.walk, node)
        carriers = [source for source in node.all_input_nodes if self._has_channels(source)]
        if zeros is Zeros.KEPT:
            for source in carriers:
                self.close(source)
        elif zeros is Zeros.ONE_INPUT:
            self.close(next((source for source in carriers if source in self.closed), carriers[0]))
        else:
            self._gate(node, block=None)

    def silence(self, node: Node, block: str) -> None:
        """Let a node's whole value be zero when a block is removed."""
        self._gate(node, block)

    def _has_channels(self, node: Node) -> bool:
        parts = self.walk.values.get(node)
        for labels in parts if isinstance(parts, list) else [parts]:
            if labels is not None and bool((self._channels(labels) >= 0).any()):
                return True
        return False

    def _channels(self, labels: Tensor) -> Tensor:
        for dim in range(labels.dim()):
            if labels.stride(dim) == 0:
                labels = labels.narrow(dim, 0, 1)
        return self.channel_of_label[labels.clamp(min=0)].where(labels != STATIC, -1)

    def _gate(self, node: Node, block: str | None) -> None:
        labels = self.walk.labels(node)
        assert labels is not None, f"{node} carries no channels"
        dims = varying_dims(labels)
        line = along(labels, dims[0]) if len(dims) == 1 else None
        if line is None or not self._can_mask(node, labels):
            raise Unplaceable(
                labels, f"{self.walk.describe(node)} makes closed channels non-zero where no module returns them"
            )
        module = list(node.meta["nn_module_stack"].values())[-1][0]
        self.sites[node] = GateSite(module, dims[0], self._channels(line), block)

    def _can_mask(self, node: Node, labels: Tensor) -> bool:
        """Whether masking the output of node's module masks this value, and nothing else under another meaning."""
        if not is_module_output(node):
            return False
        module = list(node.meta["nn_module_stack"].values())[-1][0]
        for other in self.walk.nodes:
            stack = other.meta.get("nn_module_stack")
            if stack and other is not node and list(stack.values())[-1][0] == module and is_module_output(other):
                theirs = self.walk.labels(other)
                if theirs is None or not torch.equal(self._channels(theirs), self._channels(labels)):
                    return False
        return True


def can_silence(walk: "Walk", node: Node, branch: Container[Node]) -> bool:
    """Whether a branch ending in `node` can be silenced at the output of one of its modules."""
    end = silencer(walk, node)
    return end in branch and is_module_output(end)
