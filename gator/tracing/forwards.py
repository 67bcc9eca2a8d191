"""The forward pass of each module, recovered from the exported graph: its calls, their arguments, and its output.

A module's forward is regenerated when a residual branch was removed, when it states sizes that change (views, splits,
attention), or when a value inside it has to be masked.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node
from torch.fx.node import base_types, map_arg
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from gator.errors import TraceError
from gator.graph.numbers import SizeOf, plain
from gator.graph.plans import Attribute, ForwardPlan, InTraining, Ref, Step, map_nested, refs_in
from gator.tracing.calls.record import STACK, Call, is_hook
from gator.tracing.calls.training import (
    Differs,
    check_states_no_size,
    in_both_modes,
    keeps_zeros,
    read_when_broken,
    with_switches,
)
from gator.tracing.program import Program, batch_factor, call_keys
from gator.tracing.writes import is_in_place

aten = torch.ops.aten
_SET_GRAD = torch._C._set_grad_enabled
_ATTENTION = aten.scaled_dot_product_attention.default


class Unwritable(Exception):
    """A forward pass that cannot be regenerated, with the reason."""


class Forwards:
    """Plans of the modules of one network."""

    def __init__(self, program: Program, model: nn.Module, training: Program | None = None) -> None:
        """training: the network in training mode, where that runs modules that eval mode does not."""
        self.program, self.model, self.training = program, model, training
        self.only_training = [] if training is None else sorted({*program.unused} - {*training.unused})
        self.nodes: dict[str, list[Node]] = {}
        """Key of a call -> the nodes traced in it."""
        self.keys_of_path: dict[str, list[str]] = {}
        for node in program.nodes:
            for key, (path, _) in (node.meta.get(STACK) or {}).items():
                if key not in self.nodes:
                    self.nodes[key] = []
                    if not is_hook(key):
                        self.keys_of_path.setdefault(path, []).append(key)
                self.nodes[key].append(node)
        self._plans: dict[str, ForwardPlan | Unwritable] = {}

    def plan(self, key: str) -> ForwardPlan:
        """Return the forward pass of the module of a call. Raises: Unwritable."""
        plan = self._in_both_modes(key)
        if len(self.keys_of_path[plan.module]) > 1:
            raise Unwritable("it is called several times")
        try:
            check_states_no_size(plan)
        except Differs as reason:
            raise Unwritable(f"it depends on the mode: {reason}") from reason
        return plan

    def _in_both_modes(self, key: str) -> ForwardPlan:
        """Return the forward pass of one call, which may state sizes in training mode. Raises: Unwritable."""
        if key not in self._plans:
            try:
                self._plans[key] = _PlanMaker(self, key).plan()
            except Unwritable as reason:
                self._plans[key] = reason
        plan = self._plans[key]
        if isinstance(plan, Unwritable):
            raise plan
        return plan

    def plan_of(self, path: str) -> ForwardPlan:
        """Return the forward pass of a module that is called once. Raises: Unwritable."""
        return self.plan(self.keys_of_path[path][0])

    def own_key(self, node: Node) -> str:
        """Return the key of the call whose forward() holds a node."""
        return call_keys(node)[-1]

    def can_mask(self, key: str, value: str) -> bool:
        """Whether a value can be masked in the forward pass of the module of a call: by a step of it that both modes run."""
        return self.has_plan(key) and any(value in step.outputs() for step in self.plan(key).common_steps())

    def broken_in_training(self) -> Iterator[Node]:
        """Yield what modules return in eval mode, where training mode returns something else that need not keep zeros."""
        keeping: dict[str, bool] = {}
        for call in self.program.calls.values():
            module = self.model.get_submodule(call.path)
            if call.parent is None or not call.reads_training or type(module).__module__.startswith("torch.nn."):
                continue  # outputs of the network stay, and each op of torch has a rule for both modes
            if call.path not in keeping:
                keeping[call.path] = self._keeps_zeros_in_training(call.key)
            if not keeping[call.path]:
                names = [ref.name for ref in refs_in(call.own_output)]
                yield from (self.program.by_name[name] for name in names if name in self.program.by_name)

    def read_when_broken_in_training(self) -> Iterator[tuple[Node, str]]:
        """Yield values whose channels, not all zero any more, a step reads that training mode alone runs, where no gate can mask them."""
        for call in self.program.calls.values():
            if not call.reads_training or call.key not in self.nodes:
                continue
            try:
                found = list(read_when_broken(self._in_both_modes(call.key)))
            except Unwritable:
                continue
            for step, names in found:
                reason = f"{step.module or step.function} in {call.path!r} reads it changed, in training mode alone"
                yield from ((self.program.by_name[name], reason) for name in sorted(names))

    def _keeps_zeros_in_training(self, key: str) -> bool:
        if key not in self.nodes:  # it returns values of others, in a list
            return False
        try:
            return keeps_zeros(self._in_both_modes(key))
        except Unwritable:
            return False

    def has_plan(self, key: str) -> bool:
        """Whether the forward pass of the module of a call can be regenerated."""
        try:
            self.plan(key)
        except Unwritable:
            return False
        return True


class _PlanMaker:
    def __init__(self, forwards: Forwards, key: str) -> None:
        self.forwards, self.program, self.key = forwards, forwards.program, key
        self.tensors = forwards.program.tensors
        self.nodes = forwards.nodes[key]
        call = self.program.calls.get(key)
        if call is None:
            raise Unwritable("hooks of a module compute it")
        self.call: Call = call
        self.prefix = f"{call.path}." if call.path else ""
        self.known: set[str] = set()
        self.gradient_mode: Ref | None = None
        self.constants: dict[str, Tensor] = {}
        self._check_all_modules_are_seen()

    def _check_all_modules_are_seen(self) -> None:
        """Refuse a forward that runs one of its modules in training mode only, unless it is traced in training mode too."""
        if self.call.reads_training:
            return
        called = (self.program.calls.get(item) for item in self._items() if isinstance(item, str))
        calls = [call.path for call in called if call]
        for module in self.forwards.only_training:
            is_inside = module.startswith(self.prefix) or module == self.call.path
            if is_inside and not any(module == path or module.startswith(f"{path}.") for path in calls):
                raise Unwritable(f"it does not run {module!r} in eval mode")

    def plan(self) -> ForwardPlan:
        """Return the plan of the forward in both modes. Raises: Unwritable if one of its steps cannot be regenerated."""
        plan = self._in_one_mode()
        if not self.call.reads_training:
            return plan
        module = self.forwards.model.get_submodule(self.call.path)
        if isinstance(module, nn.MultiheadAttention) and any(step.function is _ATTENTION for step in plan.steps):
            dropout = {"dropout_p": InTraining(module.dropout)}  # all that its code does with the mode
            steps = (with_switches(step, dropout) if step.function is _ATTENTION else step for step in plan.steps)
            return replace(plan, steps=tuple(steps))
        try:
            return in_both_modes(plan, self._in_training(module))
        except Differs as reason:
            raise Unwritable(f"it depends on the mode: {reason}") from reason

    def _in_training(self, module: nn.Module) -> ForwardPlan:
        """Return the plan of the module traced alone in training mode, with the arguments that it gets in eval mode."""
        program = self.forwards.training if self.call.parent is None else None
        if program is None:
            args, kwargs = map_nested(self._fake, (self.call.own_args, self.call.own_kwargs))
            try:
                program = Program(module, args, kwargs, training=True)
            except TraceError as error:
                raise Differs(f"training mode cannot be traced: {error}") from error
        key = next(call.key for call in program.calls.values() if call.parent is None)
        return _PlanMaker(Forwards(program, module), key)._in_one_mode()

    def _fake(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref) and leaf.name not in self.program.by_name:
            raise Unwritable("it is given a tensor that the exported graph does not show")
        return self.program.by_name[leaf.name].meta["val"] if isinstance(leaf, Ref) else plain(leaf)

    def _in_one_mode(self) -> ForwardPlan:
        inputs = tuple(self._inputs())
        self.known = {value for _, value, _ in inputs if value is not None}
        steps = []
        for item in self._items():
            for step in self._steps(item):
                self.known |= step.outputs()
                steps.append(step)
        self._check_regions_end(steps)
        known = self.known
        output = map_nested(lambda a: None if isinstance(a, Ref) and a.name not in known else a, self.call.own_output)
        no_channels = torch.empty(0, dtype=torch.int64)
        batch, is_overwritten = self._batch(inputs), self._is_overwritten(output)
        numbers = tree_leaves([(step.args, step.kwargs) for step in steps])
        if batch is None and any(map(batch_factor, numbers)):
            raise Unwritable("it is given the number of samples as a number, not with a tensor")
        sizes, decisions = tuple(self._input_sizes(inputs)), self.program.decisions.get(self.key, ())
        return ForwardPlan(
            *(self.call.path, inputs, tuple(steps), output, self.constants, {}, {}, no_channels, batch, is_overwritten),
            *(sizes, decisions),
        )

    def _input_sizes(self, inputs: tuple[tuple[str, str | None, Any], ...]) -> Iterator[SizeOf]:
        """Yield the sizes of all inputs, those left out that depend on the batch."""
        for _, value, _ in inputs:
            if value is not None:
                for dim, size in enumerate(self.program.by_name[value].meta["val"].shape):
                    if not batch_factor(size):
                        yield SizeOf(Ref(value), dim, size)

    def _inputs(self) -> Iterator[tuple[str, str | None, Any]]:
        """Yield the parameters of forward(). A value that is passed several times is known by its first name."""
        seen: set[str] = set()
        args, kwargs = self.call.own_args, self.call.own_kwargs
        names = [*self.call.parameter_names[: len(args)], *kwargs]
        names += [f"argument_{number}" for number in range(len(names), len(args))]
        given = [*args, *kwargs.values()]
        if len(names) != len(given):
            raise Unwritable("it takes any number of arguments")
        for name, value in zip(names, given, strict=True):
            if isinstance(value, Ref):
                yield name, None if value.name in seen else value.name, None
                seen.add(value.name)
            elif refs_in(value):
                raise Unwritable(f"its argument {name} holds several values")
            else:
                yield name, None, value

    def _items(self) -> Iterator[Node | str]:
        """Yield the nodes of the module's own forward() and the keys of the calls that it makes, in order."""
        seen: set[str] = set()
        for node in self.nodes:
            keys = call_keys(node)
            below = keys[keys.index(self.key) + 1 :]
            if not below:
                yield node
            elif below[0] not in seen and not is_hook(below[0]):
                seen.add(below[0])
                yield below[0]

    def _steps(self, item: Node | str) -> list[Step]:
        if isinstance(item, str):
            return [self._module(item)]
        if item.target is aten._assert_tensor_metadata.default:  # of the type that the network was traced in
            return []
        return self._gradient_mode(item) if item.target is _SET_GRAD else [self._function(item)]

    def _gradient_mode(self, node: Node) -> list[Step]:
        """Return the steps that turn gradients off, or back to the mode that the forward began with."""
        (is_on,) = node.args
        if self.gradient_mode is None and is_on:
            return []
        before: list[Step] = []
        if self.gradient_mode is None:
            self.gradient_mode = Ref(f"{node.name}_before")
            before = [
                Step(self.gradient_mode.name, frozenset(), None, torch.is_grad_enabled, (), {}, self.gradient_mode)
            ]
        mode = self.gradient_mode if is_on else False
        return [*before, Step(node.name, frozenset([node.name]), None, _SET_GRAD, (mode,), {}, Ref(node.name))]

    def _check_regions_end(self, steps: list[Step]) -> None:
        """Refuse a forward that leaves autocast or gradients in another mode than it found."""
        modes = [step.args for step in steps if step.function is _SET_GRAD]
        counts = [sum(step.function is function for step in steps) for function in (_enter_autocast, _exit_autocast)]
        if modes[-1:] == [(False,)] or counts[0] != counts[1]:
            raise Unwritable("it changes autocast or the gradient mode for what comes after it")

    def _function(self, node: Node) -> Step:
        function = node.target
        if isinstance(self.forwards.model.get_submodule(self.call.path), _NormBase):
            raise Unwritable("it is a normalisation over the batch")
        kwargs = self._arguments(node.kwargs)
        args = self._arguments(node.args)
        return Step(node.name, frozenset([node.name]), None, function, args, kwargs, Ref(node.name))  # type: ignore[arg-type]

    def _module(self, key: str) -> Step:
        call = self.program.calls.get(key)
        assert call is not None, "only hooks have a key without a call"
        if call.attribute is None:
            raise Unwritable(f"it calls {call.path!r}, which is not part of it")
        args, kwargs = map_nested(self._given, (call.args, call.kwargs))
        names = [ref.name for ref in refs_in(call.output)]
        if not names:
            raise Unwritable(f"what {call.path!r} returns holds no tensor that is seen")
        nodes = frozenset(node.name for node in self.forwards.nodes[key])
        return Step(names[0], nodes, call.attribute, None, args, kwargs, call.output)

    def _given(self, argument: Any) -> Any:
        """Return an argument of a call, a tensor of the module as an Attribute."""
        if isinstance(argument, Ref):
            node = self.program.by_name.get(argument.name)
            if node is None:
                raise Unwritable("it passes on a tensor that the exported graph does not show")
            return self._argument(node)
        if not isinstance(argument, (*base_types, type(None), type(...))):
            raise Unwritable(f"it passes on a {type(argument).__name__}")
        return argument

    def _arguments(self, arguments: Any) -> Any:
        return map_arg(arguments, self._argument)

    def _argument(self, node: Node) -> Any:
        if node.name in self.tensors and node.name not in self.known:
            names = self.program.names[self.tensors[node.name]]
            name = next((name for name in names if name.startswith(self.prefix)), None)
            if name is None:
                raise Unwritable(f"it reads {names[0]!r}, which is not part of it")
            return Attribute(name.removeprefix(self.prefix))
        if node.name in self.program.constants:
            self.constants[node.name] = self.program.constants[node.name]
        elif node.name not in self.known:
            raise Unwritable(f"it reads {node.name!r}, which is neither given to it nor returned to it")
        return Ref(node.name)

    def _batch(self, inputs: tuple[tuple[str, str | None, Any], ...]) -> tuple[str, int, int] | None:
        for _, value, _ in inputs:
            if value is not None:
                for dim, factor in enumerate(self.program.batch_factors(self.program.by_name[value])):
                    if factor:
                        return value, dim, factor
        return None

    def _is_overwritten(self, output: Any) -> bool:
        names, members = {ref.name for ref in refs_in(output)}, set(self.nodes)
        users = {user for node in self.nodes if node.name in names for user in node.users if user not in members}
        return any(is_in_place(user.target) for user in users)
