"""The engine: walk torch.export's graph once, label every channel, and gather the labels into groups."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from gator.blocks import find_blocks
from gator.errors import TraceError
from gator.graph import ChannelDim, ChannelGraph, ChannelGroup, Layer, LockedGroup
from gator.inputs import checked_inputs, line_of_forward
from gator.labels import STATIC, Entry, LabelBook, along, varying_dims
from gator.ops import record_ops
from gator.placing import Unplaceable, channel_of_label, place_gates
from gator.rules import RULES, Labels
from gator.selection import Selection


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
    program = _export(model.eval, model, inputs)
    training_program = _export_training(model, inputs, _unused_modules(program, model))
    locks: list[tuple[Tensor, str]] = []
    while True:
        book = LabelBook()
        walk = Walk(program, model, inputs[0].shape[0], book)
        walk.run(locks)
        if training_program is not None:
            _follow_what_only_trains(training_program, model, book)
        groups, locked = _gather(book, selection)
        groups, blocks, plans = find_blocks(walk, groups, selection)
        try:
            sites = place_gates(walk, groups, blocks)
        except Unplaceable as place:  # no module's output can be masked there: those channels stay
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
            sites=sites,
            ops=record_ops(walk, groups, blocks, channel_of_label(walk, groups)),
            plans=plans,
            parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
        )


def _export(set_mode: Callable[[], nn.Module], model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Return the exported graph of a mode, model.eval or model.train. Training flags are put back whatever happens."""
    training = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            return torch.export.export(set_mode(), inputs, strict=False)
    except Exception as error:  # torch.export raises from many families; all mean the same here
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise TraceError(
            f"torch.export cannot trace {type(model).__name__} with inputs of shape {shapes}: {first_line}{line_of_forward(error)}. "
            f"Check the input's shape, dtype and device; forward() must not branch on values of tensors, nor leave torch"
        ) from error
    finally:
        for module, flag in training:
            module.training = flag


def _unused_modules(program: ExportedProgram, model: nn.Module) -> list[str]:
    """Return the modules that own a parameter which the exported forward pass does not read, under any of its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name_of = program.graph_signature.inputs_to_parameters
    used = {id(parameters[name_of[node.name]]) for node in program.graph.nodes if node.name in name_of and node.users}
    return list(dict.fromkeys(_owner(name) for name, parameter in parameters.items() if id(parameter) not in used))


def _export_training(model: nn.Module, inputs: tuple[Tensor, ...], unused: list[str]) -> ExportedProgram | None:
    """Return the training-mode graph of a network parts of which eval mode does not run, such as auxiliary classifiers.

    They may read channels that get cut, and must be cut along. The batch is doubled: batch normalisation refuses to train on
    a single value. Raises: TraceError if that graph cannot be had, for then nobody knows what those parts read.
    """
    if not unused:
        return None
    try:
        return _export(model.train, model, tuple(torch.cat([x, x]) for x in inputs))
    except TraceError as error:
        raise TraceError(
            f"{', '.join(unused[:3])} did not run in eval mode, and training mode, which tells what they read, fails: {error}. "
            f"Remove these modules (torchvision: aux_logits=False), or give inputs that training mode accepts"
        ) from error


def _follow_what_only_trains(program: ExportedProgram, model: nn.Module, book: LabelBook) -> None:
    """Let the labels of the eval-mode walk reach layers that run in training mode only; lock channels of their own."""
    begin = book.num_labels
    Walk(program, model, batch_size=1, book=book).run(locks=[])
    own = torch.arange(begin, book.num_labels)
    roots = book.roots()[begin:]  # the smallest label of each component
    book.lock(own[roots >= begin], "in a layer that runs in training mode only")


class Walk:
    """One pass over an exported graph. Rules read and write it."""

    def __init__(self, program: ExportedProgram, model: nn.Module, batch_size: int, book: LabelBook) -> None:
        self.nodes = list(program.graph.nodes)
        self.tensors = _tensor_names(program, model)
        self.batch_size = batch_size
        self.book = book
        self.values: dict[Node, Labels] = {}
        self.layers: list[Layer] = []

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
        given = dict(zip((argument.name for argument in schema), node.args, strict=False))
        return {argument.name: argument.default_value for argument in schema} | given | node.kwargs

    def shape(self, node: Any) -> torch.Size:
        """Return the shape of a node's value."""
        return node.meta["val"].shape

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
            self.book.lock(labels, f"{self.tensor_free_weight(node)} is computed, not a parameter")
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
        self.book.tie(labels, labels[:1].expand_as(labels), "tied to a channel that cannot be cut")
        return labels[0]

    def tie_columns(self, labels: Tensor) -> Tensor:
        """Say that the columns of (n, columns) labels live and die together; return the (n,) first one."""
        return self.tie_rows(labels.T)

    def together(self, node: Node) -> Tensor | None:
        """Return the labels of an element-wise combination of several values: entries that meet live and die together."""
        shape = self.shape(node)
        operands = [arg for arg in node.args if isinstance(arg, Node)]
        labelled = [labels.expand(shape) for labels in map(self.labels, operands) if labels is not None]
        if not labelled:
            return None
        joint = labelled[0]
        reason = f"{self.describe(node)} combines it with values that cannot be cut"
        for other in labelled[1:]:
            self.book.tie(joint, other, reason)
        for operand in operands:
            if self.labels(operand) is None:
                self._meet_unlabelled(joint, operand, reason)
        return joint

    def _meet_unlabelled(self, joint: Tensor, operand: Node, reason: str) -> None:
        """A parameter takes the labels of what it is combined with; any other value locks them, unless it is broadcast."""
        size = self.shape(operand)
        for dim in varying_dims(joint):
            own_dim = dim - joint.dim() + len(size)
            if own_dim < 0 or size[own_dim] == 1:
                continue
            line = along(joint, dim)
            if operand.name in self.tensors and line is not None:
                self.bind(operand, own_dim, line)
            else:
                self.book.lock(joint, reason)

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
            own = self.shape(node).numel() // num_out // self.batch_size
            positions, outputs = own if positions is None else positions, own if outputs is None else outputs
            self.layers.append(Layer(module_path(node), self.tensors[weight.name], positions, out_dim, outputs))


def _tensor_names(program: ExportedProgram, model: nn.Module) -> dict[str, str]:
    """Return the parameter or buffer of each node that stands for one; a tied one under its first name."""
    signature = program.graph_signature
    registered = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first_name: dict[int, str] = {}
    for name, tensor in registered:
        first_name.setdefault(id(tensor), name)
    canonical = {name: first_name[id(tensor)] for name, tensor in registered}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: canonical[name] for node, name in names.items()}


def module_path(node: Node) -> str:
    """Return the name of the innermost module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    return list(stack.values())[-1][0]


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
