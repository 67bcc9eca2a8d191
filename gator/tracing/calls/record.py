"""The module calls of a forward pass, recorded while torch.export traces it: who calls whom, with what, and what comes back.

Every node gets a stack of these calls. That of torch.export is not used: it misses modules that are torch.fx graphs.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._pytree import tree_leaves

from gator.graph.plans import Made, Ref, map_nested

STACK = "nn_module_stack"
"""Key of a node's meta, a dictionary: key of a call -> (name of the module, "")."""
_CALL, _HOOKS = "gator.call.", ".hooks"


@dataclass(frozen=True)
class Call:
    """One call of a module during the forward pass."""

    key: str
    """Key of the call in the stacks of the nodes traced in it."""
    parent: str | None
    """Key of the call that made this one."""
    path: str
    """Name of the module in named_modules()."""
    attribute: str | None
    """Name of the module in the one that calls it, which may be another than the end of its path if several modules share it."""
    args: tuple[Any, ...]
    """What the parent passes; a tensor is the Ref of its node, without a name when it has none."""
    kwargs: dict[str, Any]
    output: Any
    """What the parent gets, tensors as Refs."""
    own_args: tuple[Any, ...]
    """What forward() gets: args, changed by the pre-hooks of the module."""
    own_kwargs: dict[str, Any]
    own_output: Any
    """What forward() returns: output, before the hooks of the module."""
    parameter_names: tuple[str, ...]
    """Names of the positional parameters of its forward()."""
    reads_training: bool
    """Whether its own code, or its train(), may depend on the mode."""


def is_hook(key: str) -> bool:
    """Whether a key in a node's stack stands for the hooks of the module call before it."""
    return key.endswith(_HOOKS)


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator["CallRecorder"]:
    """Record every module call that is traced meanwhile."""
    recorder = CallRecorder(model)
    handles = [handle for module in model.modules() for handle in recorder.watch(module)]
    try:
        with mock.patch.object(nn.Module, "training", recorder.training_flag(), create=True):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Progress:
    """A call in progress, tensors as their nodes."""

    key: str
    module: nn.Module
    fields: dict[str, Any]


class CallRecorder:
    """Hooks that record calls. A module with hooks of its own is watched before and after them.

    A module that returns its input, as dropout and stochastic depth do in eval mode, leaves nothing in the graph. An alias is
    inserted for it, so that the regenerated forward calls it; and for what a module of its own returns, if its code depends on the
    mode, because training mode may return something else in its place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(path)
        self.switching = {id(module) for module in model.modules() if type(module).train is not nn.Module.train}
        """Modules that change more than flags when the mode changes."""
        self.tracer: Any = None
        self.open: list[_Progress] = []
        self.done: list[dict[str, Any]] = []

    def watch(self, module: nn.Module) -> Iterator[Any]:
        """Yield the handles of the hooks that are put on a module."""
        has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
        leave_forward, leave = partial(self._leave_forward, has_hooks), partial(self._leave, has_hooks)
        enter, enter_forward = partial(self._enter, module, has_hooks), partial(self._enter_forward, has_hooks)
        yield module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        yield module.register_forward_pre_hook(enter_forward, with_kwargs=True)
        yield module.register_forward_hook(leave_forward, prepend=True, with_kwargs=True)
        yield module.register_forward_hook(leave, with_kwargs=True)

    def _enter(self, module: nn.Module, has_hooks: bool, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the nodes of the arguments, which the call may change in place."""
        stack = self._stack()
        if stack is None:
            return
        caller = self.open[-1] if self.open else None
        key = f"{_CALL}{len(self.done) + len(self.open)}"
        fields = {
            "key": key,
            "parent": caller and caller.key,
            "path": self.paths[id(module)][0],
            "attribute": caller and self._attribute(caller.module, module),
            "args": _nodes_in(args),
            "kwargs": _nodes_in(kwargs),
            "reads_training": id(module) in self.switching,
            "parameter_names": tuple(inspect.signature(module.forward).parameters),
        }
        self.open.append(_Progress(key, module, fields))
        stack[key] = (fields["path"], "")
        if has_hooks:
            stack[key + _HOOKS] = (fields["path"], "")

    def _enter_forward(self, has_hooks: bool, _: nn.Module, args: Any, kwargs: Any) -> None:
        stack = self._stack()
        if stack is None:
            return
        call = self.open[-1]
        call.fields |= {"own_args": _nodes_in(args), "own_kwargs": _nodes_in(kwargs)}
        if has_hooks:
            del stack[call.key + _HOOKS]

    def _leave_forward(self, has_hooks: bool, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        stack = self._stack()
        if stack is None:
            return None
        call = self.open[-1]
        output = _visible(output, (args, kwargs))
        if call.fields["reads_training"] and _is_made_inside(output, call.key):
            output = torch.ops.aten.alias.default(output)
        call.fields["own_output"] = _nodes_in(output)
        if has_hooks:
            stack[call.key + _HOOKS] = (call.fields["path"], "")
        return output

    def _leave(self, has_hooks: bool, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        stack = self._stack()
        if stack is None:
            return None
        call = self.open.pop()
        if has_hooks:
            output = _visible(output, (args, kwargs))
            del stack[call.key + _HOOKS]
        call.fields["output"] = _nodes_in(output)
        self.done.append(call.fields)
        del stack[call.key]
        return output

    def training_flag(self) -> property:
        """Return the property that replaces the attribute of modules meanwhile: it notes the call that reads it."""

        def read(module: nn.Module) -> bool:
            if self.open:
                self.open[-1].fields["reads_training"] = True
            return module.__dict__["training"]

        def write(module: nn.Module, value: bool) -> None:
            module.__dict__["training"] = value

        return property(read, write)

    def _stack(self) -> dict[str, tuple[str, str]] | None:
        """Return the stack that the next node gets; None when nothing is traced, or an inner graph such as a branch of torch.cond."""
        mode = get_proxy_mode()
        if mode is None:
            return None
        self.tracer = self.tracer or mode.tracer
        return self.tracer.module_stack if self.tracer is mode.tracer else None

    def _attribute(self, parent: nn.Module, module: nn.Module) -> str | None:
        prefixes = [f"{path}." if path else "" for path in self.paths[id(parent)]]
        pairs = ((path, prefix) for path in self.paths[id(module)] for prefix in prefixes)
        return next(
            (path.removeprefix(prefix) for path, prefix in pairs if path != prefix and path.startswith(prefix)), None
        )

    def spared(self, graph: Graph) -> dict[Node, Node]:
        """Reduce the stacks of a graph's nodes to the calls; return the nodes that others replace, and which."""
        for node in graph.nodes:
            stack = node.meta.get(STACK) or {}  # torch.export puts a prefix of its own before each key
            node.meta[STACK] = {key[key.index(_CALL) :]: place for key, place in stack.items() if _CALL in key}
        return _spare_aliases(graph, [fields["own_output"] for fields in self.done])

    def aliases_in_one_mode(self) -> set[Node]:
        """Return what modules return that depend on the mode, where that is their input under a new name."""
        outputs = (fields["own_output"] for fields in self.done if fields["reads_training"])
        return {node for node in outputs if isinstance(node, Node) and node.target is torch.ops.aten.alias.default}

    def calls(self, named: Callable[[Any], Any]) -> list[Call]:
        """Return the calls. named: from a node, or a number with a formula, to what it is in a Call."""
        return [Call(**{name: map_nested(named, value) for name, value in fields.items()}) for fields in self.done]


def _visible(output: Any, given: Any) -> Any:
    """Return what a module returns; when that is one of its inputs, an alias."""
    is_input = isinstance(output, Tensor) and any(output is leaf for leaf in tree_leaves(given))
    return torch.ops.aten.alias.default(output) if is_input else output


def _is_made_inside(output: Any, key: str) -> bool:
    """Whether a module returns, as it is, what a module that it calls has made."""
    node = _nodes_in(output)
    return isinstance(node, Node) and not next(iter(reversed(node.meta[STACK])), "").endswith(key)


def _nodes_in(value: Any) -> Any:
    """Return what a module takes or returns, each tensor as its node; a Ref without a name for a tensor that has none."""
    if isinstance(value, Tensor):
        mode = get_proxy_mode()
        return Ref("") if mode is None else get_proxy_slot(value, mode.tracer, Ref(""), lambda slot: slot.proxy.node)
    if isinstance(value, (tuple, list)):
        items = map(_nodes_in, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        parts = {key: _nodes_in(part) for key, part in value.items()}
        return parts if type(value) is dict else Made(type(value), parts, dataclasses.is_dataclass(value), True)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Ref)):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return Made(type(value), {name: _nodes_in(getattr(value, name)) for name in names}, True, False)
    return value


def _spare_aliases(graph: Graph, outputs: list[Any]) -> dict[Node, Node]:
    """Remove the aliases of modules that are visible in the graph, because they changed their input in place."""
    spared: dict[Node, Node] = {}
    for alias in outputs:
        if isinstance(alias, Node) and alias.target is torch.ops.aten.alias.default and alias not in spared:
            source = alias.all_input_nodes[0]
            if alias.graph is graph and list(source.meta[STACK])[-1:] == list(alias.meta[STACK])[-1:]:
                alias.replace_all_uses_with(source)
                graph.erase_node(alias)
                spared[alias] = source
    return spared
