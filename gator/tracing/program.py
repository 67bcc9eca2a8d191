"""The exported graph of a network: every op, the module call that contains it, and the sizes that depend on the batch.

The batch is exported as BATCH samples, a large prime, on fake tensors that compute nothing. A size in the graph therefore depends
on the batch if and only if BATCH divides it, and a forward regenerated from the graph works for any batch.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.node import map_aggregate
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from gator.errors import TraceError
from gator.graph.numbers import Decision, plain, renamed, sizes_in
from gator.graph.plans import Attribute, Ref
from gator.tracing.inputs import line_of_forward
from gator.tracing.reads import SizeReads, changed
from gator.tracing.writes import Writes

BATCH = 8191
SAMPLES = 2
"""Samples in the shapes that Program.shape() gives: small, and more than one, so that no dimension looks like a broadcast one."""


@dataclass(frozen=True)
class Call:
    """One call of a module during the forward pass."""

    key: str
    """Key of the call in the nn_module_stack of the nodes traced in it."""
    parent: str | None
    """Key of the call that made this one."""
    path: str
    """Name of the module in named_modules()."""
    args: tuple[Any, ...]
    """Its arguments; a tensor is the Ref of its node, without a name when it has none."""
    kwargs: dict[str, Any]
    output: Any
    """Its result, tensors as Refs."""
    parameter_names: tuple[str, ...]
    """Names of the positional parameters of its forward()."""


class Program:
    """The exported graph of one network in eval mode, or in training mode."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], training: bool = False) -> None:
        with _recorded_calls(model) as records, SizeReads() as reads:
            program = _export(model, inputs, training)
        signature = program.graph_signature
        spared = _spare_aliases(program.graph, records)
        self.names = _names_by_first(model)
        """First name of each parameter and buffer -> all its names, of which a tied one has several."""
        self.tensors = _tensor_names(signature, self.names)
        """Node name -> first name of the parameter or buffer."""
        writes = Writes(program.graph, self.tensors)
        self.unfollowed = writes.unfollowed
        """A value -> the op that writes over a part of it, unseen by the dataflow."""
        self.nodes: list[Node] = list(program.graph.nodes)
        self.by_name = {node.name: node for node in self.nodes}
        self.unused = _unused_modules(model, {self.tensors.get(node.name) for node in self.nodes if node.users})
        """Modules with a parameter of their own that the forward pass does not read."""
        lifted = signature.inputs_to_lifted_tensor_constants
        self.constants: dict[str, Tensor] = {node: program.constants[name] for node, name in lifted.items()}
        """Node name -> tensor that forward() makes of Python numbers."""

        def value_of(node: Node) -> Ref | Attribute:
            is_tensor = node.name in self.tensors
            return Attribute(self.tensors[node.name]) if is_tensor else Ref(spared.get(node, node).name)

        for node in self.nodes:
            node.args, node.kwargs = changed((node.args, node.kwargs), lambda leaf: renamed(leaf, value_of))
        calls = (_call(record, spared, value_of) for record in records)
        self.calls = {call.key: call for call in self._after_writes([one for one in calls if one is not None], writes)}
        """Key in the nn_module_stack of the nodes traced in a module call -> the call."""
        self.decisions = {
            key: tuple(renamed(decision, value_of) for decision in decisions if not _is_of_batch(decision))
            for key, decisions in reads.decisions.items()
        }
        """The same key -> what the call's own code decided by sizes other than those of the batch."""

    def _after_writes(self, calls: list[Call], writes: Writes) -> Iterator[Call]:
        """Yield the calls with what holds their arguments when they begin, and their results when they end."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for node, place in writes.order.items():
            for key in call_keys(node):
                first.setdefault(key, place)
                last[key] = place

        def held(values: Any, place: int) -> Any:
            def now(leaf: Any) -> Any:
                is_value = isinstance(leaf, Ref) and leaf.name in self.by_name
                return Ref(writes.at(self.by_name[leaf.name], place).name) if is_value else leaf

            return map_aggregate(values, now)

        for call in calls:
            begin, end = first.get(call.key, 0) - 1, last.get(call.key, -1)
            yield replace(
                call, args=held(call.args, begin), kwargs=held(call.kwargs, begin), output=held(call.output, end)
            )

    def shape(self, node: Node) -> torch.Size:
        """Return the shape of a node's value for SAMPLES samples."""
        return torch.Size(map(with_samples, node.meta["val"].shape))

    def batch_factors(self, node: Node) -> tuple[int, ...]:
        """Return for each dimension of a node's value its entries per sample; 0 where it does not hold the batch."""
        return tuple(batch_factor(size) for size in node.meta["val"].shape)


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
    return list(node.meta.get("nn_module_stack") or {})


def module_path(node: Node) -> str:
    """Return the name of the innermost module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
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


def _export(model: nn.Module, inputs: Sequence[Tensor], training: bool) -> torch.export.ExportedProgram:
    """Return the exported graph. Restores the training flags, also after an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            return torch.export.export(model.train(training), _fake_batch(inputs), strict=False)
    except Exception as error:  # torch.export raises many exception types; all mean the same here
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".").replace(str(BATCH), "N")
        raise TraceError(
            f"torch.export cannot trace {type(model).__name__} with inputs of shape {shapes}: {first_line}{line_of_forward(error)}. "
            f"Check the input's shape, dtype and device; forward() must not branch on values of tensors, nor leave "
            f"torch, and must take any number of samples"
        ) from error
    finally:
        for module, flag in flags:
            module.training = flag


def _fake_batch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return inputs like the given ones for BATCH samples, without memory."""
    shapes = [(BATCH, *x.shape[1:]) if x.shape[:1] == inputs[0].shape[:1] else x.shape for x in inputs]
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(
            torch.empty(shape, dtype=x.dtype, device=x.device) for x, shape in zip(inputs, shapes, strict=True)
        )


@dataclass(frozen=True)
class _Record:
    """A module call as seen while tracing, tensors as their nodes; a Ref without a name for a tensor that has none."""

    paths: frozenset[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    parameter_names: tuple[str, ...]


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[_Record]]:
    """Collect every module call that is traced meanwhile.

    A module that returns its input, as dropout and stochastic depth do in eval mode, leaves nothing in the graph. An alias is
    inserted for it, so that the regenerated forward calls it.
    """
    paths: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), set()).add(path)
    records: list[_Record] = []
    arguments: list[Any] = []  # of the calls in progress; recorded before the call, which may change them in place

    def enter(module: nn.Module, args: Any) -> None:
        """Note the nodes of the arguments."""
        arguments.append(tree_map_only(Tensor, _node_of, args))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Record the call; an output that is one of the inputs becomes a value of its own."""
        nodes = arguments.pop()
        if id(module) not in paths or get_proxy_mode() is None:
            return None
        is_input = isinstance(output, Tensor) and any(output is leaf for leaf in tree_leaves((args, kwargs)))
        output = torch.ops.aten.alias.default(output) if is_input else output
        kwargs, returned = tree_map_only(Tensor, _node_of, (kwargs, output))
        names = tuple(inspect.signature(module.forward).parameters)
        records.append(_Record(frozenset(paths[id(module)]), nodes, kwargs, returned, names))
        return output

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
        # torch 2.14 does not remove this entry, and torch.compile then warns of global hooks forever.
        _global_forward_hooks_with_kwargs.pop(handles[1].id, None)


def _node_of(tensor: Tensor) -> Node | Ref:
    mode = get_proxy_mode()
    return Ref("") if mode is None else get_proxy_slot(tensor, mode.tracer, Ref(""), lambda slot: slot.proxy.node)


def _spare_aliases(graph: Graph, records: list[_Record]) -> dict[Node, Node]:
    """Remove the aliases of modules that are visible in the graph, because they changed their input in place."""
    spared: dict[Node, Node] = {}
    for record in records:
        alias = record.output
        if isinstance(alias, Node) and alias.target is torch.ops.aten.alias.default and alias not in spared:
            source = alias.all_input_nodes[0]
            if call_keys(source)[-1:] == call_keys(alias)[-1:]:
                alias.replace_all_uses_with(source)
                graph.erase_node(alias)
                spared[alias] = source
    return spared


def _call(record: _Record, spared: dict[Node, Node], value_of: Callable[[Node], Ref | Attribute]) -> Call | None:
    """Return the call of a record; None when it left nothing in the graph."""

    def ref(leaf: Any) -> Any:
        return Ref(spared.get(leaf, leaf).name) if isinstance(leaf, Node) else renamed(leaf, value_of)

    args, kwargs, output = map_aggregate((record.args, record.kwargs, record.output), ref)
    node = next((leaf for leaf in tree_leaves(record.output) if isinstance(leaf, Node)), None)
    stack = {} if node is None else spared.get(node, node).meta.get("nn_module_stack") or {}
    keys = list(stack)
    for number, key in reversed(list(enumerate(keys))):
        path = stack[key][0]
        if path in record.paths:
            parent = keys[number - 1] if number else None
            return Call(key, parent, path, args, kwargs, output, record.parameter_names)
    return None
