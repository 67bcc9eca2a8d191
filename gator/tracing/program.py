"""The exported graph of a network: every op, the module call that contains it, and the sizes that depend on the batch.

The batch is exported as BATCH samples, a large prime, on fake tensors that compute nothing. A size in the graph therefore depends
on the batch if and only if BATCH divides it, and a forward regenerated from the graph works for any batch.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from gator.errors import TraceError
from gator.graph.numbers import Decision, plain, renamed, sizes_in
from gator.graph.plans import Attribute, Ref, map_nested
from gator.tracing.calls.record import STACK, Call, CallRecorder, recorded_calls
from gator.tracing.inputs import line_of_forward
from gator.tracing.reads import SizeReads, changed
from gator.tracing.writes import Writes

BATCH = 8191
_RESHAPES = (
    *(torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default),
    *(torch.ops.aten.flatten.using_ints, torch.ops.aten.unflatten.int),
)
_APPENDS = (torch.ops.aten.cat.default, torch.ops.aten.concat.default, torch.ops.aten.repeat.default)
SAMPLES = 2
"""Samples in the shapes that Program.shape() gives: small, and more than one, so that no dimension looks like a broadcast one."""


class Program:
    """The exported graph of one network in eval mode, or in training mode."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        training: bool = False,
        examples: Sequence[Tensor] = (),
    ) -> None:
        """args, kwargs: what forward() takes, with tensors of BATCH samples that compute nothing. examples: what errors show."""
        try:
            with torch.enable_grad():  # which shows regions without gradients
                recorder, reads, program = _recorded_export(model, args, kwargs or {}, training, examples)
        except TraceError:
            with torch.no_grad():  # in which autograd lets views be written to
                recorder, reads, program = _recorded_export(model, args, kwargs or {}, training, examples)
        signature = program.graph_signature
        spared = recorder.spared(program.graph)
        self.names = _names_by_first(model)
        """First name of each parameter and buffer -> all its names, of which a tied one has several."""
        self.tensors = _tensor_names(signature, self.names)
        """Node name -> first name of the parameter or buffer."""
        _take_shuffles_apart(program.graph)
        writes = Writes(program.graph, self.tensors, recorder.aliases_in_one_mode())
        self.unfollowed = writes.unfollowed
        """A value -> the op that writes over a part of it, unseen by the dataflow."""
        self.nodes: list[Node] = list(program.graph.nodes)
        self.by_name = {node.name: node for node in self.nodes}
        self.unused = _unused_modules(model, {self.tensors.get(node.name) for node in self.nodes if node.users})
        """Modules with a parameter of their own that the forward pass does not read."""
        lifted = signature.inputs_to_lifted_tensor_constants
        self.constants: dict[str, Tensor] = {node: program.constants[name] for node, name in lifted.items()}
        """Node name -> tensor that forward() makes of Python numbers."""
        self._check_no_weight_is_hidden()
        self._check_sizes_are_known(model)

        def value_of(node: Node) -> Ref | Attribute:
            is_tensor = node.name in self.tensors
            return Attribute(self.tensors[node.name]) if is_tensor else Ref(spared.get(node, node).name)

        def named(leaf: Any) -> Any:
            return Ref(spared.get(leaf, leaf).name) if isinstance(leaf, Node) else renamed(leaf, value_of)

        for node in self.nodes:
            node.args, node.kwargs = changed((node.args, node.kwargs), lambda leaf: renamed(leaf, value_of))
        self.calls = {call.key: call for call in self._after_writes(recorder.calls(named), writes)}
        """Key of a module call in the stacks of the nodes traced in it -> the call."""
        self.decisions = {
            key: tuple(renamed(decision, value_of) for decision in decisions if not _is_of_batch(decision))
            for key, decisions in reads.decisions.items()
        }
        """The same key -> what the call's own code decided by sizes other than those of the batch."""

    def _check_no_weight_is_hidden(self) -> None:
        """Refuse code that runs in a graph of its own with weights of the network, which would be in no group and no cost."""
        for node in self.nodes:
            weights = [self.tensors[source.name] for source in node.all_input_nodes if source.name in self.tensors]
            if isinstance(node.target, torch._ops.HigherOrderOperator) and weights:
                raise TraceError(
                    f"{node.target} at {module_path(node)!r} runs {weights[0]!r} where gator cannot follow; expected ops of torch "
                    f"alone: write it without control flow"
                )

    def _check_sizes_are_known(self, model: nn.Module) -> None:
        """Refuse values whose sizes depend on what is in them, such as x[x > 0]."""
        for node in self.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
                raise TraceError(
                    f"{type(model).__name__}: {node.target} at {module_path(node)!r} returns a value whose size depends on values of "
                    f"tensors; expected sizes that depend on the input's size alone: use a mask, or a fixed number of entries"
                )

    def _after_writes(self, calls: list[Call], writes: Writes) -> Iterator[Call]:
        """Yield the calls with what holds their arguments when they begin, and their results when they end."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for node, place in writes.order.items():
            for key in call_keys(node):
                first.setdefault(key, place)
                last[key] = place

        def held(values: Any, place: int) -> Any:
            """Return nested values with the Refs that hold at a place of the graph."""

            def now(leaf: Any) -> Any:
                is_value = isinstance(leaf, Ref) and leaf.name in self.by_name
                return Ref(writes.at(self.by_name[leaf.name], place).name) if is_value else leaf

            return map_nested(now, values)

        for call in calls:
            begin, end = first.get(call.key, 0) - 1, last.get(call.key, -1)
            given = ("args", "kwargs", "own_args", "own_kwargs")
            values = {name: held(getattr(call, name), begin) for name in given}
            yield replace(call, output=held(call.output, end), own_output=held(call.own_output, end), **values)

    def shape(self, node: Node) -> torch.Size:
        """Return the shape of a node's value for SAMPLES samples."""
        return torch.Size(map(with_samples, node.meta["val"].shape))

    def batch_factors(self, node: Node) -> tuple[int, ...]:
        """Return for each dimension of a node's value its entries per sample; 0 where it does not hold the batch."""
        value = node.meta.get("val")
        return tuple(batch_factor(size) for size in value.shape) if isinstance(value, Tensor) else ()

    def batch_dim(self, node: Node) -> int | None:
        """Return the one dimension of a node's value that holds the batch; None if there is none, or several."""
        dims = [dim for dim, factor in enumerate(self.batch_factors(node)) if factor]
        return dims[0] if len(dims) == 1 else None

    @cached_property
    def in_a_row(self) -> dict[Node, int]:
        """Value -> entries of its batch dimension in a row that belong to one sample. A value of unknown order is missing.

        All entries of a sample are in a row where frames or windows are folded into the batch. Where time comes first, or views of
        the batch are concatenated, the samples follow one another several times.
        """
        found: dict[Node, int] = {}
        for node in self.nodes:
            dim = self.batch_dim(node)
            if dim is None:
                continue
            factor = self.batch_factors(node)[dim]
            rows = {1} if factor == 1 else {self._row(node, dim, factor, source, found) for source in _read_by(node)}
            row = (rows - {0}).pop() if len(rows - {0}) == 1 else -1
            if row > 0 and factor % row == 0:
                found[node] = row
        return found

    def _row(self, node: Node, dim: int, factor: int, source: Node, found: dict[Node, int]) -> int:
        """Return the length of a row of a value as one of its sources gives it; 0 if that has no batch, -1 if it is unknown."""
        own_dim = self.batch_dim(source)
        if not any(self.batch_factors(source)):
            return 0
        if own_dim is None or source not in found:
            return -1
        if node.target in _RESHAPES:
            size, own_size = self.shape(node)[dim + 1 :].numel(), self.shape(source)[own_dim + 1 :].numel()
            return found[source] * own_size // size if found[source] * own_size % size == 0 else -1
        is_longer = node.target in _APPENDS and self.batch_factors(source)[own_dim] <= factor
        return found[source] if is_longer or self.batch_factors(source)[own_dim] == factor else -1


def _take_shuffles_apart(graph: Graph) -> None:
    """Write channel shuffles as the views that they stand for, which are followed."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.channel_shuffle.default):
        value, groups = node.args
        n, c, *positions = value.meta["val"].shape
        with graph.inserting_before(node):
            apart = graph.call_function(torch.ops.aten.view.default, (value, [n, groups, c // groups, *positions]))
            swapped = graph.call_function(torch.ops.aten.transpose.int, (apart, 1, 2))
        apart.meta = {**node.meta, "val": value.meta["val"].unflatten(1, (groups, c // groups))}
        swapped.meta = {**node.meta, "val": apart.meta["val"].transpose(1, 2)}
        node.target, node.args, node.kwargs = torch.ops.aten.reshape.default, (swapped, [n, c, *positions]), {}


def _read_by(node: Node) -> Iterator[Node]:
    """Yield the tensors that a node reads, through ops that return several."""
    for source in node.all_input_nodes:
        yield from [source] if isinstance(source.meta.get("val"), Tensor) else source.all_input_nodes


def _is_of_batch(decision: Decision) -> bool:
    return any(batch_factor(size.found) for size in sizes_in(decision.formula))


def batch_factor(size: Any) -> int:
    """Return how many times an exported size holds the batch; 0 when it does not."""
    is_size = isinstance(size, int) and not isinstance(size, bool)
    return plain(size) // BATCH if is_size and plain(size) % BATCH == 0 else 0


def with_samples(argument: Any) -> Any:
    """Return an exported argument with the size it has for SAMPLES samples."""
    return batch_factor(argument) * SAMPLES or plain(argument)


def one_sample(argument: Any) -> Any:
    """Return an exported size with its value for one sample."""
    return batch_factor(argument) or argument


def sample_args(arguments: Any) -> Any:
    """Return exported arguments, nested as they are, with the sizes they have for SAMPLES samples."""
    return map_aggregate(arguments, with_samples)


def call_keys(node: Node) -> list[str]:
    """Return the keys of the module calls that a node was traced in, outermost first."""
    return list(node.meta.get(STACK) or {})


def module_path(node: Node) -> str:
    """Return the name of the innermost module that a node was traced in."""
    stack = node.meta.get(STACK) or {"": ("", "")}
    return list(stack.values())[-1][0]


def _names_by_first(model: nn.Module) -> dict[str, list[str]]:
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for registered in (model.named_parameters, model.named_buffers):
        for name, tensor in registered(remove_duplicate=False):
            names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def _tensor_names(signature: torch.export.ExportGraphSignature, names: dict[str, list[str]]) -> dict[str, str]:
    first = {name: first for first, others in names.items() for name in others}
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: first[name] for node, name in inputs.items()}


def _unused_modules(model: nn.Module, used: set[str | None]) -> list[str]:
    owners = (name.rpartition(".")[0] for name, _ in model.named_parameters() if name not in used)
    return list(dict.fromkeys(owners))


def _recorded_export(model: nn.Module, *how: Any) -> tuple[CallRecorder, SizeReads, torch.export.ExportedProgram]:
    """Return the exported graph with what was recorded meanwhile. how: the other arguments of _export()."""
    with recorded_calls(model) as recorder, _flat_regions(), SizeReads() as reads:
        return recorder, reads, _export(model, *how)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, examples: Sequence[Tensor]
) -> torch.export.ExportedProgram:
    """Return the exported graph. Restores the attributes of all modules, also after an error."""
    was_training, states = model.training, [(module, dict(vars(module))) for module in model.modules()]
    kept = [(value, copy.copy(value)) for _, state in states for value in state.values() if type(value) in (dict, list)]
    try:
        model.train(training)  # some of timm's return nothing
        with _called(model):
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises many exception types; all mean the same here
        shapes = ", ".join(str(tuple(x.shape)) for x in examples or args if isinstance(x, Tensor))
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".").replace(str(BATCH), "N")
        raise TraceError(
            f"torch.export cannot trace {type(model).__name__} with inputs of shape {shapes}: {first_line}{line_of_forward(error)}. "
            f"Check the input's shape, dtype and device; forward() must not branch on values of tensors, nor leave "
            f"torch, and must take any number of samples"
        ) from error
    finally:
        model.train(was_training)  # a network made of two torch.fx graphs changes between them
        for module, state in states:  # flags, and what forward() has stored meanwhile, such as fake tensors
            module.__dict__.clear()
            module.__dict__.update(state)
        for value, contents in kept:
            value.clear()
            value.update(contents) if isinstance(value, dict) else value.extend(contents)


@contextmanager
def _flat_regions() -> Iterator[None]:
    """Let torch.export leave the ops of an autocast or no_grad region in the graph, between those that begin and end it."""
    passes = "torch._export.passes"
    with (
        mock.patch(f"{passes}.replace_autocast_with_hop_pass.replace_autocast_with_hop_pass", lambda *given: given),
        mock.patch(f"{passes}.replace_set_grad_with_hop_pass.replace_set_grad_with_hop_pass", lambda *given: given),
    ):
        yield


@contextmanager
def _called(model: nn.Module) -> Iterator[None]:
    """Let torch.export call a network that is a torch.fx graph, which it would interpret node by node."""
    cls = type(model)
    if isinstance(model, GraphModule):
        model.__class__ = type(cls.__name__, (nn.Module,), {"forward": cls.forward})
    try:
        yield
    finally:
        model.__class__ = cls


def fake_batch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return inputs like the given ones for BATCH samples, without memory."""
    shapes = [(BATCH, *x.shape[1:]) if x.shape[:1] == inputs[0].shape[:1] else x.shape for x in inputs]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(
            torch.empty(shape, dtype=x.dtype, device=x.device) for x, shape in zip(inputs, shapes, strict=True)
        )
