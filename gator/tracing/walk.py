"""The walk: one pass over the exported graph that labels the channels of every value, by the rules of its ops."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from gator.tracing.labels import STATIC, LabelBook, along, spread, varying_dims
from gator.tracing.program import SAMPLES, Program, module_path, sample_args

Labels = Tensor | None | list[Tensor | None]


class Zeros(Enum):
    """Whether a channel that is zero in an op's inputs is zero in its output. Decides where gates are placed."""

    KEPT = "zero when it is zero in all inputs"
    ONE_INPUT = "zero when it is zero in one input"
    FIRST_INPUT = "zero when it is zero in the first input"
    BROKEN = "no longer zero; each channel is treated by itself"


@dataclass(frozen=True)
class Rule:
    """How labels pass through an op, and whether zeros stay zero."""

    labels: Callable[["Walk", Node], Labels]
    zeros: Zeros


class Walk:
    """One pass over the exported graph. Rules read it and add to it."""

    def __init__(self, program: Program, book: LabelBook, rules: Mapping[Any, Rule]) -> None:
        self.program, self.book, self.rules = program, book, rules
        self.nodes, self.tensors = program.nodes, program.tensors
        self.batch_size = SAMPLES
        self.values: dict[Node, Labels] = {}
        self.reads: list[Node] = []
        """Values whose channels are summed somewhere, so closed ones must be zero."""
        self.breaks_zeros: set[Node] = set()
        """Nodes whose closed channels are not zero, although their op keeps zeros."""
        self.normalisations: list[Node] = []
        """Layer normalisations over channels."""

    def run(self) -> None:
        """Label every node, and lock the model's outputs."""
        for node in self.nodes:
            if node.op == "call_function":
                self.values[node] = self._labels_of(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self.book.lock(self.labels(value), "output of the model")
        for value, write in self.program.unfollowed.items():
            for touched in (value, *write.all_input_nodes):
                self._lock_value(touched, f"{self.describe(write)} writes over a part of a value that is read again")

    def _labels_of(self, node: Node) -> Labels:
        known = self.rules.get(node.target)
        carries = any(self.values.get(source) is not None for source in node.all_input_nodes)
        reads_weight = any(source.name in self.tensors for source in node.all_input_nodes)
        if known is not None and (carries or reads_weight):
            return known.labels(self, node)
        for source in node.all_input_nodes:
            self._lock_value(source, f"{self.describe(node)} has no channel rule; add one to gator/tracing/rules")
        return None

    def _lock_value(self, node: Node, reason: str) -> None:
        parts = self.values.get(node)
        for labels in parts if isinstance(parts, list) else [parts]:
            self.book.lock(labels, reason)

    # --- read by rules ------------------------------------------------------------------------------------------------

    def arguments(self, node: Node) -> dict[str, Any]:
        """Return a node's arguments by the names of the op's schema, defaults filled in."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = dict(zip((argument.name for argument in schema), sample_args(node.args), strict=False))
        return {argument.name: argument.default_value for argument in schema} | given | sample_args(node.kwargs)

    def shape(self, node: Any) -> torch.Size:
        """Return the shape of a node's value, for SAMPLES samples."""
        return self.program.shape(node)

    def labels(self, node: Any) -> Tensor | None:
        """Return the labels of a node's value, of its own shape; None when it carries no channels."""
        labels = self.values.get(node)
        assert not isinstance(labels, list), f"{node} has several outputs"
        return labels

    def channels(self, node: Any, dim: int, reader: Node) -> Tensor:
        """Return the (size,) labels along a dimension; STATIC, and locked, when they differ elsewhere too."""
        static = torch.full((self.shape(node)[dim],), STATIC)
        labels = self.labels(node)
        if labels is None:
            return static
        line = along(labels, dim)
        if line is None:
            self.book.lock(labels, f"{self.describe(reader)} reads channels that are in several dimensions")
            return static
        return line.expand_as(static)

    def describe(self, node: Node) -> str:
        """Return "aten.conv2d at 'layer1.0.conv1'"."""
        return f"{str(node.target).rsplit('.', 1)[0]} at {module_path(node)!r}"

    # --- called by rules ----------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        """Return (count,) new labels."""
        return self.book.fresh(count)

    def bind(self, node: Node | None, dim: int, labels: Tensor) -> None:
        """Bind these labels to a dimension of the parameter or buffer `node`. None is an absent bias."""
        self.weight(node, dim, labels)

    def weight(self, node: Node | None, dim: int, labels: Tensor, *sides: str) -> Tensor:
        """Bind labels to a layer's weight, on its "out" or "in" side; return the labels that hold from now on."""
        if node is None or bool((labels == STATIC).all()):
            return labels
        if node.name not in self.tensors:
            reason = f"{self.tensor_free_weight(node)} is computed, not a parameter"
            if not sides and self._bind_source(node, dim, labels, reason):
                return labels
            self.book.lock(labels, reason)
            return torch.full_like(labels, STATIC)
        return self.book.bind(self.tensors[node.name], dim, labels, sides)

    def tensor_free_weight(self, node: Node) -> str:
        """Return a description of a weight that is not a parameter."""
        return f"the weight from {self.describe(node)}" if node.op == "call_function" else f"the input {node.name}"

    def lock(self, labels: Tensor | None, reason: str) -> None:
        """Lock the channels with these labels: they must stay."""
        self.book.lock(labels, reason)

    def tie_rows(self, labels: Tensor) -> Tensor:
        """Tie the rows of (rows, n) labels together; return the (n,) first one."""
        return self.tie_along(labels, {0})[0]

    def tie_columns(self, labels: Tensor) -> Tensor:
        """Tie the columns of (n, columns) labels together; return the (n,) first one."""
        return self.tie_rows(labels.T)

    def tie_along(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Tie entries along some dimensions together; return the labels with those of the first entry everywhere."""
        for dim in dims:
            first = labels.narrow(dim, 0, 1).expand_as(labels)
            self.book.tie(labels, first, "tied to a channel that cannot be pruned")
            labels = first
        return labels

    def spread_out(self, node: Node, labels: Tensor | None) -> Tensor | None:
        """Return labels expanded to the shape of a node's value."""
        return labels if labels is None else labels.expand(self.shape(node))

    def together(self, node: Node) -> Tensor | None:
        """Return the labels of an element-wise combination of several values, whose entries it ties together."""
        shape = self.shape(node)
        operands = [arg for arg in node.args if isinstance(arg, Node)]
        joint = next((labels.expand(shape) for labels in map(self.labels, operands) if labels is not None), None)
        if joint is not None:
            for operand in operands:
                self.meet(joint, operand, node)
        return joint

    def meet(self, joint: Tensor, operand: Node, node: Node) -> None:
        """Tie an operand's entries to the channels that they are combined with in a node.

        A parameter takes their labels, and so does a value moved out of one. Any other value without channels locks them, unless
        it is broadcast.
        """
        reason = f"{self.describe(node)} combines it with values that cannot be pruned"
        labels = self.labels(operand)
        if labels is not None:
            self.book.tie(joint, labels, reason)
            return
        size = self.shape(operand)
        for dim in varying_dims(joint):
            own_dim = dim - joint.dim() + len(size)
            if own_dim < 0 or size[own_dim] == 1:
                continue
            line = along(joint, dim)
            if line is None or not self._bind_source(operand, own_dim, line, reason):
                self.book.lock(joint, reason)

    def _bind_source(self, operand: Node, dim: int, line: Tensor, reason: str) -> bool:
        """Bind the parameter whose entries are along a dimension of `operand`; return whether there is one.

        Each dimension of the parameter is labelled and followed through the ops in between, to find these entries.
        """
        chain = self._chain_from_tensor(operand)
        if chain is None:
            return False
        source = chain[0]
        for source_dim, size in enumerate(self.shape(source)):
            probe = self.book.fresh(size)
            moved = self._label_chain(chain, spread(probe, source_dim, self.shape(source)))
            self.values.update(dict.fromkeys(chain))
            found = along(moved, dim) if moved is not None and dim in varying_dims(moved) else None
            if found is not None and bool((found != STATIC).all()):
                places = found - probe[0]
                labels = torch.full((size,), STATIC).scatter(0, places, line)
                self.book.tie(labels[places], line, reason)
                self.bind(source, source_dim, labels)
                self._label_chain(chain, spread(labels, source_dim, self.shape(source)))
                return True
        return False

    def _label_chain(self, chain: list[Node], labels: Tensor) -> Tensor | None:
        """Label the ops of a chain by the labels of the parameter that it starts with; return the last labels."""
        source, *ops = chain
        self.values[source] = labels
        for op in ops:
            self.values[op] = self.rules[op.target].labels(self, op)
        last = self.labels(chain[-1])
        self.values[source] = None
        return last

    def _chain_from_tensor(self, node: Node) -> list[Node] | None:
        """Return a parameter or buffer and the ops that compute `node` from it alone; None if there are other inputs."""
        chain = [node]
        while chain[0].name not in self.tensors:
            first = chain[0]
            if first.op != "call_function" or first.target not in self.rules or not isinstance(first.args[0], Node):
                return None
            if any(self.values.get(other) is not None for other in first.all_input_nodes[1:]):
                return None
            chain.insert(0, first.args[0])
        return chain
