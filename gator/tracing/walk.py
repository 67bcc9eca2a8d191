"""The walk: one pass over the exported graph that labels the channels of every value, by the rules of its ops."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from gator.graph.plans import compact
from gator.tracing.labels import STATIC, LabelBook, along, spread, varying_dims
from gator.tracing.program import SAMPLES, Program, module_path, sample_args

aten = torch.ops.aten
METADATA_OPS = (
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
    aten._assert_tensor_metadata.default,
)
"""Ops that read only the dtype and the device of a value."""

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
        self.plain: set[Node] = set()
        """Values that no layer has written: leaves of the graph, and what is computed from them alone, such as a scale made of
        several parameters. They get their labels from the values that they are combined with."""
        self._reader: Node | None = None
        self._explained: list[tuple[Node | None, Node, int]] = []
        """Reader, plain value, dimension: uses of channels of a plain value that the reader's rule has bound."""
        self.reads: list[Node] = []
        """Values whose channels are summed somewhere, so closed ones must be zero."""
        self.breaks_zeros: set[Node] = set()
        """Nodes whose closed channels are not zero, although their op keeps zeros."""
        self.normalisations: list[Node] = []
        """Ops that must not see closed channels, which they would count, or divide by: layer normalisation, a mean over channels."""
        self.divisions: dict[Node, list[Node]] = {}
        """Ops that divide by values that are not zero, unless one of these is masked."""

    def run(self) -> None:
        """Label every node, and lock the model's outputs."""
        for node in self.nodes:
            if node.op == "call_function":
                self.values[node] = self._labels_of(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self.book.lock(self.labels(value), "output of the model")
            if not self._is_labelled(node) and self.plain.issuperset(node.all_input_nodes):
                self.plain.add(node)
        self._follow_parameters()
        for value, write in self.program.unfollowed.items():
            for touched in (value, *write.all_input_nodes):
                self.lock_value(touched, f"{self.describe(write)} writes over a part of a value that is read again")

    def _labels_of(self, node: Node) -> Labels:
        if node.target in METADATA_OPS:
            return None
        self._reader = node
        known = self.rules.get(node.target)
        carries = any(self.values.get(source) is not None for source in node.all_input_nodes)
        reads_weight = any(source.name in self.tensors for source in node.all_input_nodes)
        if known is not None and (carries or reads_weight):
            return known.labels(self, node)
        self.lock_inputs(
            node, "has no channel rule, so what flows into it stays whole; other channels can still be pruned"
        )
        return None

    def lock_value(self, node: Node, reason: str) -> None:
        parts = self.values.get(node)
        for labels in parts if isinstance(parts, list) else [parts]:
            self.book.lock(labels, reason)

    def _is_labelled(self, node: Node) -> bool:
        parts = self.values.get(node)
        several = parts if isinstance(parts, list) else [parts]
        return any(labels is not None and bool((compact(labels) != STATIC).any()) for labels in several)

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
        """Bind labels to a layer's weight, on its "out" or "in" side; return the labels that hold from now on.

        The weight may be computed from parameters: transposed, standardised, scaled.
        """
        if node is None or bool((labels == STATIC).all()):
            return labels
        reason = f"{self.tensor_free_weight(node)} is computed, not a parameter"
        if not self._bind_source(node, dim, labels, reason, sides):
            self.book.lock(labels, reason)
            return torch.full_like(labels, STATIC)
        known = self.book.entries.get((self.tensors.get(node.name, ""), dim))
        return labels if known is None else known.labels

    def is_of_parameters(self, node: Node) -> bool:
        """Whether a value is a parameter or buffer, or computed from such alone."""
        leaves = [leaf for leaf in self._ancestors(node) if leaf.op == "placeholder"] if node in self.plain else []
        return bool(leaves) and all(leaf.name in self.tensors for leaf in leaves)

    def tensor_free_weight(self, node: Node) -> str:
        """Return a description of a weight that is not a parameter."""
        return f"the weight from {self.describe(node)}" if node.op == "call_function" else f"the input {node.name}"

    def lock(self, labels: Tensor | None, reason: str) -> None:
        """Lock the channels with these labels: they must stay."""
        self.book.lock(labels, reason)

    def lock_inputs(self, node: Node, what: str) -> None:
        """Lock all channels that flow into a node, which `what` is true of."""
        for source in node.all_input_nodes:
            self.lock_value(source, f"{self.describe(node)} {what}")

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
        labelled = [labels.expand(shape) for labels in map(self.labels, operands) if labels is not None]
        if not labelled:
            return None
        joint = max(
            labelled, key=lambda labels: len(varying_dims(labels))
        )  # a single channel is broadcast over those of others
        for operand in operands:
            self.meet(joint, operand, node)
        return joint

    def meet(self, joint: Tensor, operand: Node, node: Node) -> None:
        """Tie an operand's entries to the channels that they are combined with in a node.

        A parameter takes their labels, and so does a value computed from parameters. Any other value without channels locks them,
        unless it is broadcast.
        """
        reason = f"{self.describe(node)} combines it with values that cannot be pruned"
        labels, size = self.labels(operand), self.shape(operand)
        offset = joint.dim() - len(size)
        broadcast = [dim for dim in varying_dims(joint) if dim < offset or size[dim - offset] == 1]
        if labels is not None:
            own = {dim + offset for dim in varying_dims(labels)}
            if broadcast and not own:
                if self.rules[node.target].zeros is Zeros.KEPT:  # such as a sum: closed channels take the other's value
                    self.breaks_zeros.add(node)
                self.book.lock(labels, f"{self.describe(node)} broadcasts this one channel over those of another value")
            elif broadcast and not own <= set(varying_dims(joint)):
                self.book.lock(
                    labels, f"{self.describe(node)} combines channels of one dimension with those of another"
                )
                if self.rules[node.target].zeros is Zeros.KEPT:
                    self.breaks_zeros.add(node)
            else:
                self.book.tie(joint, labels, reason)
            return
        for dim in varying_dims(joint):
            line = along(joint, dim)
            if dim not in broadcast and (line is None or not self._bind_source(operand, dim - offset, line, reason)):
                self.book.lock(joint, reason)

    # --- parameters, and values computed from them --------------------------------------------------------------------

    def _bind_source(self, node: Node, dim: int, line: Tensor, reason: str, sides: tuple[str, ...] = ()) -> bool:
        """Bind the parameters whose entries are along a dimension of a plain value; return whether all entries are of some.

        Each dimension of each parameter is labelled and followed through the ops in between, to find these entries.
        """
        self._explained.append((self._reader, node, dim))
        if node.name in self.tensors:
            self.book.bind(self.tensors[node.name], dim, line, sides)
            return True
        if node.op != "call_function" or node not in self.plain:
            return False
        chain, missing = self._ancestors(node), torch.ones(len(line), dtype=torch.bool)
        for source, source_dim in self._leaf_dims(chain):
            before, num_explained = self.book.state(), len(self._explained)
            probe = self.book.fresh(self.shape(source)[source_dim])
            moved = self._flow(source, spread(probe, source_dim, self.shape(source)), chain)[node]
            if not isinstance(moved, Tensor) or dim not in varying_dims(moved):
                self.book.restore(before)
                del self._explained[num_explained:]
                continue
            found = along(moved, dim)
            if found is None or source.name not in self.tensors:
                return False
            places = found != STATIC
            self.book.tie(found[places], line[places], reason)
            is_used = torch.isin(probe, found)
            self.book.bind(self.tensors[source.name], source_dim, probe.where(is_used, STATIC), sides)
            missing &= ~places
            if not bool(missing.any()):
                return True
        return False

    def _ancestors(self, node: Node) -> list[Node]:
        """Return a plain value and all that it is computed from, in order."""
        found, queue = {node}, [node]
        while queue:
            new = set(queue.pop().all_input_nodes) - found
            found |= new
            queue.extend(new)
        return [other for other in self.nodes if other in found]

    def _leaf_dims(self, chain: list[Node]) -> Iterator[tuple[Node, int]]:
        for leaf in chain:
            if leaf.op == "placeholder":
                yield from ((leaf, dim) for dim, size in enumerate(self.shape(leaf)) if size > 1)

    def _flow(self, source: Node, labels: Tensor, nodes: list[Node]) -> dict[Node, Labels]:
        """Return the labels of plain values when those of one leaf are given; the walk is left as it was."""
        reader, saved = self._reader, {node: self.values.pop(node, None) for node in nodes}
        self.values[source] = labels
        for node in nodes:
            if any(self.values.get(other) is not None for other in node.all_input_nodes):
                self.values[node] = self._labels_of(node)
        flown = {node: self.values.get(node) for node in nodes}
        self.values.update(saved)
        self._reader = reader
        return flown

    def _follow_parameters(self) -> None:
        """Label what is computed from the parameters that are cut, and lock those with a use that no rule has bound."""
        leaf_of = {self.tensors[node.name]: node for node in self.nodes if node.name in self.tensors}
        explained = set(self._explained)
        for entry in list(self.book.entries.values()):
            leaf = leaf_of.get(entry.tensor)
            if leaf is None:
                continue
            labels = spread(entry.labels.contiguous(), entry.dim, self.shape(leaf))
            unbound = self._unbound_use(leaf, labels, explained)
            if unbound is not None:
                self.book.lock(
                    entry.labels,
                    f"{entry.tensor} is also read by {self.describe(unbound)}, which cannot follow its channels",
                )

    def _unbound_use(self, leaf: Node, labels: Tensor, explained: set[tuple[Node | None, Node, int]]) -> Node | None:
        """Return a reader of the leaf, or of a value computed from it, that neither binds nor passes on all of its channels."""
        plain = self._descendants(leaf)
        flown = {leaf: labels, **(self._flow(leaf, labels, [leaf, *plain]) if plain else {})}
        for value, own in flown.items():
            if isinstance(own, Tensor):
                if value is not leaf and not self._keep_labels(value, own):
                    return value
                for user in value.users:
                    is_bound = all((user, value, dim) in explained for dim in varying_dims(own))
                    if not (
                        is_bound or user.target in METADATA_OPS or _passes(own, flown.get(user), whole=value is leaf)
                    ):
                        return user
        return None

    def _keep_labels(self, value: Node, labels: Tensor) -> bool:
        """Note the labels of a plain value; return False if it states sizes and has other labels in other dimensions already."""
        known = self.values.get(value)
        if known is None:
            self.values[value] = known = labels
        is_alike = isinstance(known, Tensor) and varying_dims(known) == varying_dims(labels)
        return is_alike or not any(isinstance(arg, (list, tuple)) for arg in value.args)

    def _descendants(self, leaf: Node) -> list[Node]:
        """Return the plain values that are computed from a leaf, in order."""
        found, queue = set[Node](), [leaf]
        while queue:
            new = {user for user in queue.pop().users if user in self.plain} - found
            found |= new
            queue.extend(new)
        return [node for node in self.nodes if node in found] if found else []


def _passes(labels: Tensor, result: Labels, whole: bool) -> bool:
    """Whether what an op returns has labels of what it reads: all of them if `whole`, because a part of a parameter is not cut."""
    own = set(compact(labels).unique().tolist()) - {STATIC}
    parts = [part for part in (result if isinstance(result, list) else [result]) if part is not None]
    passed = [own & set(compact(part).unique().tolist()) for part in parts]
    return all(part == own for part in passed) if whole and passed else any(passed)
