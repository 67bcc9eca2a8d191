"""The engine: walk torch.export's graph once, label every channel, and gather the labels into groups."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from gator.blocks import find_blocks
from gator.errors import TraceError
from gator.forwards import Forwards
from gator.graph import Block, ChannelDim, ChannelGraph, ChannelGroup, GateSite, Layer, LockedGroup, Plan, Product
from gator.inputs import checked_inputs
from gator.labels import STATIC, Entry, LabelBook, along, spread, varying_dims
from gator.ops import record_ops
from gator.placing import Channels, Placer, Unplaceable
from gator.program import SAMPLES, Program, batch_factor, module_path, sample_args
from gator.rules import RULES, Labels
from gator.selection import Selection
from gator.sizes import Sizes


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> ChannelGraph:
    """Return the channel groups of a network.

    model: any network that torch.export can trace; it is not run and not changed. Its weights do not matter.
    example_inputs: what forward() takes, batch first: (N, 3, H, W). Costs hold for this height and width.
    include, exclude: names of modules ("layer1", which is all that is in it) or glob patterns ("layer*.conv2"). A group may be
    cut when all layers that write it are included and none is excluded; layers that only read it follow. All others are locked.

    Raises: TraceError if torch.export cannot trace the model with these inputs, or a name matches no module.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(group.name, group.num_channels) for group in trace(net, torch.zeros(1, 3, 8, 8)).groups]
    [('0', 8)]
    """
    inputs = checked_inputs(model, example_inputs)
    selection = Selection.of(model, include, exclude)
    program = Program(model, inputs)
    training = _training_program(model, inputs, program)
    locks: list[tuple[Tensor, str]] = []
    while True:
        book = LabelBook()
        walk = Walk(program, book)
        walk.run(locks)
        training_walk = None if training is None else _follow_what_only_trains(training, book)
        forwards = Forwards(walk, model)
        sizes = Sizes(walk, forwards)
        obstacles = list(sizes.obstacles())
        if training_walk is not None:
            obstacles.extend(Sizes(training_walk, forwards).obstacles_in_training())
        if obstacles:  # those channels stay; what is tied to them is found by walking again
            locks.extend(obstacles)
            continue
        groups, locked = _gather(book, selection)
        channels = Channels(walk, groups)
        placer = Placer(walk, channels, forwards)
        groups, blocks = find_blocks(walk, groups, forwards, placer, selection)
        try:
            sites = placer.place(blocks)
        except Unplaceable as place:  # no value can be masked there: those channels stay
            locks.append((place.labels, place.reason))
            continue
        return ChannelGraph(
            model=type(model).__name__,
            input_shapes=tuple(tuple(x.shape) for x in inputs),
            selection=selection,
            groups=groups,
            locked=locked,
            blocks=blocks,
            layers=tuple(walk.layers),
            products=_products(walk, channels, blocks),
            sites=sites,
            ops=record_ops(walk, groups, blocks, channels.of_label),
            plans=_plans(sizes, blocks, sites, channels),
            parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        )


def _training_program(model: nn.Module, inputs: tuple[Tensor, ...], program: Program) -> Program | None:
    """Return the training-mode graph of a network parts of which eval mode does not run, such as auxiliary classifiers.

    They may read channels that get cut, and must be cut along. Raises: TraceError if that graph cannot be had, for then nobody
    knows what those parts read.
    """
    if not program.unused:
        return None
    try:
        return Program(model, inputs, training=True)
    except TraceError as error:
        raise TraceError(
            f"{', '.join(program.unused[:3])} did not run in eval mode, and training mode, which tells what they read, fails: "
            f"{error}. Remove these modules (torchvision: aux_logits=False), or give inputs that training mode accepts"
        ) from error


def _follow_what_only_trains(program: Program, book: LabelBook) -> "Walk":
    """Let the labels of the eval-mode walk reach layers that run in training mode only; lock channels of their own."""
    begin = book.num_labels
    walk = Walk(program, book)
    walk.run(locks=[])
    own = torch.arange(begin, book.num_labels)
    roots = book.roots()[begin:]  # the smallest label of each component
    book.lock(own[roots >= begin], "in a layer that runs in training mode only")
    return walk


def _products(walk: "Walk", channels: Channels, blocks: tuple[Block, ...]) -> tuple[Product, ...]:
    block_of = {name: block.name for block in blocks for name in block.nodes}
    return tuple(
        Product(module_path(node), macs, channels.distinct(labels).flatten(), block_of.get(node.name))
        for node, labels, macs in walk.products
    )


def _plans(sizes: Sizes, blocks: tuple[Block, ...], sites: tuple[GateSite, ...], channels: Channels) -> dict[str, Plan]:
    """Return the plans of the modules whose forward pass may have to be written again."""
    inside = (site.module for site in sites if site.step is not None)
    paths = dict.fromkeys([*sizes.modules(), *(block.container for block in blocks), *inside])
    return {path: sizes.plan(path, channels.of) for path in paths}


class Walk:
    """One pass over the exported graph. Rules read and write it."""

    def __init__(self, program: Program, book: LabelBook) -> None:
        self.program, self.book = program, book
        self.nodes, self.tensors = program.nodes, program.tensors
        self.batch_size = SAMPLES
        self.values: dict[Node, Labels] = {}
        self.layers: list[Layer] = []
        self.reads: list[Node] = []
        """Values whose channels are summed up somewhere, so that closed ones must be zero."""
        self.breaks_zeros: set[Node] = set()
        """Nodes whose closed channels are not zero although their op keeps zeros."""
        self.normalisations: list[Node] = []
        """Layer normalisations over channels."""
        self.products: list[tuple[Node, Tensor, float]] = []
        """Products of two computed values: the labels over which the multiply-adds per sample are spread evenly."""

    def run(self, locks: Sequence[tuple[Tensor, str]]) -> None:
        """Label every node; then lock the model's outputs and `locks`, labels found by an earlier walk (they repeat)."""
        for node in self.nodes:
            if node.op == "call_function":
                self.values[node] = self._labels_of(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self.book.lock(self.labels(value), "output of the model")
        for labels, reason in locks:
            self.book.lock(labels, reason)

    def _labels_of(self, node: Node) -> Labels:
        known = RULES.get(node.target)
        carries = any(self.values.get(source) is not None for source in node.all_input_nodes)
        reads_weight = any(source.name in self.tensors for source in node.all_input_nodes)
        if known is not None and (carries or reads_weight):
            return known.labels(self, node)
        for source in node.all_input_nodes:
            parts = self.values.get(source)
            for labels in parts if isinstance(parts, list) else [parts]:
                self.book.lock(labels, f"{self.describe(node)} has no channel rule; add one to gator/rules.py")
        return None

    # --- what rules ask -----------------------------------------------------------------------------------------------

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
            self.book.lock(labels, f"{self.describe(reader)} reads channels that lie across several dimensions")
            return static
        return line.expand_as(static)

    def describe(self, node: Node) -> str:
        """Return "aten.conv2d at 'layer1.0.conv1'"."""
        return f"{str(node.target).rsplit('.', 1)[0]} at {module_path(node)!r}"

    # --- what rules say -----------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        """Return (count,) new labels."""
        return self.book.fresh(count)

    def bind(self, node: Node | None, dim: int, labels: Tensor) -> None:
        """Say that a dimension of the parameter or buffer `node` carries these labels. None is an absent bias."""
        self.weight(node, dim, labels)

    def weight(self, node: Node | None, dim: int, labels: Tensor, *sides: str) -> Tensor:
        """Same as bind() for a layer's weight, on its "out" or "in" side; returns the labels that hold from now on."""
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
        """Return how to call a weight that is the result of other ops."""
        return f"the weight from {self.describe(node)}" if node.op == "call_function" else f"the input {node.name}"

    def lock(self, labels: Tensor | None, reason: str) -> None:
        """Say that the channels with these labels must stay."""
        self.book.lock(labels, reason)

    def tie_rows(self, labels: Tensor) -> Tensor:
        """Say that the rows of (rows, n) labels live and die together; return the (n,) first one."""
        return self.tie_along(labels, {0})[0]

    def tie_columns(self, labels: Tensor) -> Tensor:
        """Say that the columns of (n, columns) labels live and die together; return the (n,) first one."""
        return self.tie_rows(labels.T)

    def tie_along(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Say that entries along some dimensions live and die together; return the labels with the first one's everywhere."""
        for dim in dims:
            first = labels.narrow(dim, 0, 1).expand_as(labels)
            self.book.tie(labels, first, "tied to a channel that cannot be cut")
            labels = first
        return labels

    def spread_out(self, node: Node, labels: Tensor | None) -> Tensor | None:
        """Return labels expanded to the shape of a node's value."""
        return labels if labels is None else labels.expand(self.shape(node))

    def together(self, node: Node) -> Tensor | None:
        """Return the labels of an element-wise combination of several values: entries that meet live and die together."""
        shape = self.shape(node)
        operands = [arg for arg in node.args if isinstance(arg, Node)]
        joint = next((labels.expand(shape) for labels in map(self.labels, operands) if labels is not None), None)
        if joint is not None:
            for operand in operands:
                self.meet(joint, operand, node)
        return joint

    def meet(self, joint: Tensor, operand: Node, node: Node) -> None:
        """Say that an operand's entries live and die with the channels they meet in a node.

        A parameter takes their labels; so does what was moved out of one. Any other value without channels locks them, unless
        it is broadcast.
        """
        reason = f"{self.describe(node)} combines it with values that cannot be cut"
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
        """Bind the parameter whose entries lie along a dimension of `operand`; whether there is one.

        Which entries those are is found by labelling each dimension of the parameter and following the ops in between.
        """
        chain = self._chain_from_tensor(operand)
        if chain is None:
            return False
        source, *ops = chain
        for source_dim, size in enumerate(self.shape(source)):
            probe = self.book.fresh(size)
            self.values[source] = spread(probe, source_dim, self.shape(source))
            for op in ops:
                self.values[op] = RULES[op.target].labels(self, op)
            moved = self.labels(operand)
            for node in chain:
                self.values[node] = None
            found = along(moved, dim) if moved is not None and dim in varying_dims(moved) else None
            if found is not None and bool((found != STATIC).all()):
                places = found - probe[0]
                labels = torch.full((size,), STATIC).scatter(0, places, line)
                self.book.tie(labels[places], line, reason)
                self.bind(source, source_dim, labels)
                self._label_chain(chain, spread(labels, source_dim, self.shape(source)))
                return True
        return False

    def _label_chain(self, chain: list[Node], labels: Tensor) -> None:
        """Give the ops of a chain the labels that follow from those of the parameter it begins with."""
        source, *ops = chain
        self.values[source] = labels
        for op in ops:
            self.values[op] = RULES[op.target].labels(self, op)
        self.values[source] = None

    def _chain_from_tensor(self, node: Node) -> list[Node] | None:
        """Return a parameter or buffer and the ops that make `node` of it alone; None when it is made of more."""
        chain = [node]
        while chain[0].name not in self.tensors:
            first = chain[0]
            if first.op != "call_function" or first.target not in RULES or not isinstance(first.args[0], Node):
                return None
            if any(self.values.get(other) is not None for other in first.all_input_nodes[1:]):
                return None
            chain.insert(0, first.args[0])
        return chain

    def product(self, node: Node, labels: Tensor, sizes: Mapping[str, int]) -> None:
        """Record a product of two computed values: letters with their sizes, and the labels over all letters."""
        shape = (size for operand in node.all_input_nodes for size in operand.meta["val"].shape)
        samples = SAMPLES if any(batch_factor(size) for size in shape) else 1
        self.products.append((node, labels, math.prod(sizes.values()) / samples))

    def layer(
        self,
        node: Node,
        weight: Node,
        num_out: int,
        positions: int | None = None,
        out_dim: int = 0,
        outputs: float | None = None,
    ) -> None:
        """Record a use of a convolution or linear weight; by default one that is not transposed. See Layer."""
        if weight.name in self.tensors:
            samples = SAMPLES if any(self.program.batch_factors(node)) else 1
            own = self.shape(node).numel() // num_out // samples
            positions, outputs = own if positions is None else positions, own if outputs is None else outputs
            self.layers.append(Layer(module_path(node), self.tensors[weight.name], positions, out_dim, outputs))


# --- from labels to groups --------------------------------------------------------------------------------------------

_NEVER = torch.iinfo(torch.int64).max


def _gather(book: LabelBook, selection: Selection) -> tuple[tuple[ChannelGroup, ...], tuple[LockedGroup, ...]]:
    """Return groups and locked groups: channels that run through the same tensor dimensions form one."""
    roots = book.roots()
    entries = list(book.entries.values())
    lines = [roots[entry.labels.clamp(min=0)].where(entry.labels != STATIC, STATIC) for entry in entries]
    signature, first_seen = _signatures(lines, book.num_labels)
    reasons = list(book.lock_reasons(roots).items())
    reason_of_root = torch.full((book.num_labels,), -1)
    for number, (_, locked) in enumerate(reasons):
        reason_of_root[locked] = number
        signature[locked] += _salt(-1 - number)

    families = _families(signature, first_seen)
    dims = _dims_by_family(entries, lines, families, book.num_labels)
    sides = {(entry.tensor, entry.dim): entry.sides for entry in entries}
    groups, locked_groups, names = [], [], set[str]()
    for members, own in zip(families, dims, strict=True):
        name = _unique(_name(own, sides), names)
        layers = frozenset((_owner(dim.tensor), side) for dim in own for side in sides[dim.tensor, dim.dim])
        number = int(reason_of_root[members[0]])
        writers = {module for module, side in layers if side == "out"} or {_owner(own[0].tensor)}
        reason = reasons[number][0] if number >= 0 else selection.why_not(writers)
        if reason is None:
            groups.append(ChannelGroup(name, len(members), tuple(own), layers, block=None))
        else:
            locked_groups.append(LockedGroup(name, len(members), reason))
    return tuple(groups), tuple(locked_groups)


def _signatures(lines: list[Tensor], num_labels: int) -> tuple[Tensor, Tensor]:
    """Return per root a hash of the dimensions it lies in, with multiplicity, and the place where it is seen first."""
    signature = torch.zeros(num_labels, dtype=torch.int64)
    first_seen = torch.full((num_labels,), _NEVER)
    begin = 0
    for number, line in enumerate(lines):
        places = (line != STATIC).nonzero().flatten()
        signature.index_add_(0, line[places], torch.full((len(places),), _salt(number)))
        first_seen.scatter_reduce_(0, line[places], begin + places, "amin")
        begin += len(line)
    return signature, first_seen


def _salt(number: int) -> int:
    """Return a fixed random 62-bit number for an integer, so that the sums over different sets of them differ."""
    generator = torch.Generator().manual_seed(0x6A7E + number)
    return int(torch.randint(1, 2**62, (), generator=generator))


def _families(signature: Tensor, first_seen: Tensor) -> list[Tensor]:
    """Return the roots of equal signature together, families and roots both in order of first appearance."""
    used = (first_seen < _NEVER).nonzero().flatten()
    used = used[first_seen[used].argsort()]
    _, family, sizes = signature[used].unique(return_inverse=True, return_counts=True)
    families = used[family.argsort(stable=True)].split(sizes.tolist())
    return sorted(families, key=lambda members: int(first_seen[members[0]]))


def _dims_by_family(
    entries: list[Entry], lines: list[Tensor], families: list[Tensor], num_labels: int
) -> list[list[ChannelDim]]:
    """Return for each family the tensor dimensions it runs through, with the places of each member."""
    family_of = torch.full((num_labels,), -1)
    rank_of = torch.zeros(num_labels, dtype=torch.int64)
    for number, members in enumerate(families):
        family_of[members] = number
        rank_of[members] = torch.arange(len(members))
    dims: list[list[ChannelDim]] = [[] for _ in families]
    for entry, line in zip(entries, lines, strict=True):
        family = family_of[line.clamp(min=0)].where(line != STATIC, -1)
        for number in family.unique().tolist():
            if number >= 0:
                places = (family == number).nonzero().flatten()
                places = places[rank_of[line[places]].argsort(stable=True)]
                dims[number].append(ChannelDim(entry.tensor, entry.dim, places.view(len(families[number]), -1)))
    return dims


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _name(dims: list[ChannelDim], sides: dict[tuple[str, int], tuple[str, ...]]) -> str:
    """Return the first layer that writes the channels, else the owner of the first tensor."""
    writers = (dim for dim in dims if "out" in sides[dim.tensor, dim.dim])
    return _owner(next(writers, dims[0]).tensor) or dims[0].tensor


def _unique(name: str, names: set[str]) -> str:
    """Return a name not taken yet: conv1, conv1#2, conv1#3 when a layer's outputs fall into several groups."""
    count, candidate = 1, name
    while candidate in names:
        count += 1
        candidate = f"{name}#{count}"
    names.add(candidate)
    return candidate
