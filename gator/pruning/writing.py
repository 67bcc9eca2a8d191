"""Regenerating a module's forward pass from its ForwardPlan: without removed branches, for the kept widths, or with gates."""

import contextlib
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from gator.errors import PruneError
from gator.graph.graph import Block
from gator.graph.numbers import Computed, SizeFloat, SizeInt, SizeOf, plain, sizes_in
from gator.graph.plans import Attribute, ForwardPlan, InTraining, Made, Ref, Step, map_nested, refs_in
from gator.tracing.program import BATCH, SAMPLES, batch_factor
from gator.tracing.writes import out_of_place

aten = torch.ops.aten
Rewrite = Callable[[Graph, Step, tuple[Any, ...], dict[str, Any]], Node]
"""Makes the value of a step from its arguments, instead of the step's own function."""


@dataclass
class Forward:
    """A forward pass as a torch.fx graph."""

    graph: Graph
    buffers: dict[str, Tensor]
    """Tensors that the graph reads in addition to those of the module."""
    in_training: Graph | None = None
    """That of training mode, if it is another one."""
    is_changed: bool = False
    """Whether it differs from the forward pass that it was made of."""


def write_forward(
    plan: ForwardPlan,
    keep_C: Tensor | None = None,
    gone: Sequence[Block] = (),
    replaced: Mapping[str, Rewrite] | None = None,
    masked: Mapping[str, str] | None = None,
    owner: str = "",
) -> Forward:
    """Return the forward pass of a plan.

    keep_C: (all channels + 1,) bool, the last one True; None keeps all. gone: removed blocks of the module.
    replaced: by name of a step, the call that replaces it. masked: by name of a value, the attribute of the module that it
    is passed through before anything reads it. owner: "" or the submodule that gets the buffers, with a dot.
    """
    how = keep_C, gone, replaced or {}, masked or {}, owner
    forward = _Writer(plan, *how, {}).write()
    training = plan.in_training()
    if training is not None:
        forward.in_training = _Writer(training, *how, forward.buffers).write().graph
    return forward


class _Writer:
    def __init__(
        self,
        plan: ForwardPlan,
        keep_C: Tensor | None,
        gone: Sequence[Block],
        replaced: Mapping[str, Rewrite],
        masked: Mapping[str, str],
        owner: str,
        buffers: dict[str, Tensor],
    ) -> None:
        self.plan, self.keep_C, self.replaced, self.masked, self.owner = plan, keep_C, replaced, masked, owner
        self.skipped: frozenset[str] = frozenset().union(*(block.branch for block in gone))
        self.shortcut_of = {block.addition: block.shortcut for block in gone}
        self.overwritten = {block.addition for block in gone if block.is_overwritten}
        cuts = keep_C is not None and not bool(keep_C[plan.channels].all())
        self.forward = Forward(Graph(), buffers, is_changed=bool(cuts or gone or replaced or masked))
        self.graph = self.forward.graph
        self.values: dict[str, Node] = {}
        self.attributes: dict[str, Node] = {}
        self.ragged: set[str] = set()
        """Values that are not rectangular for the kept widths, and are not written."""
        self._batch: Node | None = None
        self.numbers: dict[str, Node] = {}
        """Inputs that are numbers, by formula."""
        self.decisions, self.input_sizes = list(plan.decisions), plan.input_sizes
        """Those that are not checked yet."""

    def write(self) -> Forward:
        """Return the forward as a graph for the kept widths."""
        self._write_inputs()
        self._write_checks()
        for step in self.plan.steps:
            if step.name in self.shortcut_of:
                value = self.values[self.shortcut_of[step.name]]
                if step.name in self.overwritten:
                    value = self.graph.call_function(torch.clone, (value,))
                self.values[step.name] = value
            elif step.name not in self.skipped:
                self._write_step(step)
                self._write_checks()
        if self.decisions:
            self._check_inputs()
        output = self._filled(self.plan.output)
        if self.shortcut_of and self.plan.is_overwritten:
            output = self.graph.call_function(torch.clone, (output,))
        self.graph.output(output)
        return self.forward

    def _write_inputs(self) -> None:
        required = [number for number, (_, value, _) in enumerate(self.plan.inputs) if value is not None]
        for number, (name, value, default) in enumerate(self.plan.inputs):
            has_default = value is None and number > max(required, default=-1)
            node = self.graph.placeholder(name, **({"default_value": plain(default)} if has_default else {}))
            if value is not None:
                self.values[value] = node
            elif isinstance(default, SizeInt | SizeFloat):
                self.numbers[repr(default.formula)] = node

    def _write_step(self, step: Step) -> None:
        if step.module is not None:
            value = self.graph.call_module(step.module, self._filled(step.args), self._filled(step.kwargs))
            self._take_apart(value, step.output)
        elif self._kept(step.name) is None:
            self.ragged.add(step.name)
        elif self.ragged & step.inputs():
            self._write_picked(step)
        else:
            self._write_function(step)
        for name in step.outputs() & self.masked.keys():
            self.values[name] = self.graph.call_module(self.masked[name], (self.values[name],))

    def _take_apart(self, value: Node, output: Any) -> None:
        """Name the parts of a module's output."""
        if isinstance(output, Ref):
            self.values[output.name] = value
            return
        get = getattr if isinstance(output, Made) and not output.is_mapping else operator.getitem
        for key, part in _parts(output):
            if refs_in(part):
                self._take_apart(self.graph.call_function(get, (value, key)), part)

    def _write_function(self, step: Step) -> None:
        function, args = self._fitted(step)
        if function is aten.view.default:  # the export drops .contiguous() where its own strides need none
            function = aten.reshape.default
        if self.shortcut_of:
            function = out_of_place(function)
        filled = self._filled(self._with_batch(function, args)), self._filled(step.kwargs)
        if step.name in self.replaced:
            self.values[step.name] = self.replaced[step.name](self.graph, step, *filled)
        else:
            self.values[step.name] = self.graph.call_function(function, *filled)

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _filled(self, arguments: Any) -> Any:
        return self._made(map_nested(self._value, arguments))

    def _made(self, value: Any) -> Any:
        """Return nested values with each Made as a call that makes it."""
        if isinstance(value, Made):
            parts = {key: self._made(part) for key, part in value.parts.items()}
            args, kwargs = ((), parts) if value.is_dataclass else ((parts,), {})
            return self.graph.call_function(value.cls, args, kwargs)
        if isinstance(value, dict):
            return {key: self._made(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self._made(part) for part in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            if argument.name in self.plan.constants and argument.name not in self.values:
                self.values[argument.name] = self._buffer(self.plan.constants[argument.name])
            return self.values[argument.name]
        if isinstance(argument, Attribute):
            return self._attribute(argument.name)
        if isinstance(argument, InTraining):
            if not argument.value:
                return argument.value
            flag = self._attribute("training")
            return flag if argument.value is True else self.graph.call_function(operator.mul, (argument.value, flag))
        if isinstance(argument, SizeInt | SizeFloat):
            return self._number(argument.formula)
        if isinstance(argument, torch.device):
            return self._device(argument)
        return self._times_batch(batch_factor(argument)) if batch_factor(argument) else argument

    def _attribute(self, name: str) -> Node:
        if name not in self.attributes:
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def _device(self, traced: torch.device) -> Any:
        """Return the device of the first input, as read from it: a network is traced on one device and may run on another."""
        first = next((value for _, value, _ in self.plan.inputs if value is not None), None)
        return traced if first is None else self.graph.call_function(getattr, (self.values[first], "device"))

    def _buffer(self, tensor: Tensor) -> Node:
        taken = {*self.forward.buffers, *(name for step in self.plan.steps for name in step.attributes())}
        name = next(name for number in itertools.count() if (name := f"constant_{number}") not in taken)
        self.forward.buffers[name] = tensor
        return self._attribute(self.owner + name)

    def _times_batch(self, factor: int) -> Node:
        """Return the number of samples times a factor, as read from an input."""
        if self._batch is None:
            assert self.plan.batch is not None, "no input holds the batch"
            name, dim, per_sample = self.plan.batch
            size = self.graph.call_method("size", (self.values[name], dim))
            self._batch = size if per_sample == 1 else self.graph.call_function(operator.floordiv, (size, per_sample))
        return self._batch if factor == 1 else self.graph.call_function(operator.mul, (self._batch, factor))

    def _with_batch(self, function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a view with -1 in place of the size that depends on the batch."""
        if function not in (aten.view.default, aten.reshape.default, aten.unflatten.int) or -1 in args[-1]:
            return args
        sizes = list(args[-1])
        holds_batch = [number for number, size in enumerate(sizes) if batch_factor(size)]
        if holds_batch:
            sizes[holds_batch[0]] = -1
        return (*args[:-1], sizes)

    # --- numbers computed from sizes ----------------------------------------------------------------------------------

    def _number(self, formula: Any) -> Any:
        """Return what a formula computes, from the sizes of this call; cut sizes are those of the unpruned network."""
        if repr(formula) in self.numbers:
            return self.numbers[repr(formula)]
        if isinstance(formula, SizeOf):
            return self._size(formula)
        if not isinstance(formula, Computed):  # len(x) is a plain number
            return self._times_batch(batch_factor(formula)) if batch_factor(formula) else formula
        args = tuple(map(self._number, formula.args))
        is_plain = not any(isinstance(arg, Node) for arg in args)
        return formula.function(*args) if is_plain else self.graph.call_function(formula.function, args)

    def _size(self, size: SizeOf) -> Any:
        is_cut = self._is_cut(size)
        if not is_cut and size.value.name in self.values:
            return self.graph.call_method("size", (self.values[size.value.name], size.dim))
        if batch_factor(size.found):
            return self._times_batch(batch_factor(size.found))
        if not is_cut:
            self._check_inputs()
        return size.found

    def _is_cut(self, size: SizeOf) -> bool:
        """Whether a size may change when channels are cut."""
        if isinstance(size.value, Attribute):
            return True
        kept = self._kept(size.value.name)
        return kept is None or bool(kept and not kept[size.dim].all())

    def _write_checks(self) -> None:
        """Write checks of the decisions whose sizes are known by now."""
        waiting = []
        for decision in self.decisions:
            sizes = [size for size in sizes_in(decision.formula) if not self._is_cut(size)]
            if all(size.value.name in self.values for size in sizes):
                found = self._number(decision.formula)
                self._check(found, decision.found, [(self._size(size), size.found) for size in sizes])
            else:
                waiting.append(decision)
        self.decisions = waiting

    def _check_inputs(self) -> None:
        """Check first of all that the inputs have the sizes with which the network was traced."""
        sizes, self.input_sizes = self.input_sizes, ()
        begin = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with contextlib.nullcontext() if begin is None else self.graph.inserting_before(begin):
            for size in sizes:
                if not self._is_cut(size):
                    found = self._size(size)
                    self._check(found, size.found, [(found, size.found)])

    def _check(self, found: Any, traced: Any, sizes: list[tuple[Any, int]]) -> None:
        if isinstance(found, Node):
            self.graph.call_function(check_sizes, (found, traced, self.plan.module, *zip(*sizes, strict=True)))

    # --- widths -------------------------------------------------------------------------------------------------------

    def _kept(self, name: str) -> list[Tensor] | None:
        """Return the masks of a value's dimensions, none if it keeps its widths; None if the value is not rectangular."""
        layout = self.plan.layouts.get(name)
        if layout is None or self.keep_C is None:
            return []
        return layout.kept(self.keep_C)

    def _write_picked(self, step: Step) -> None:
        """Pick channels by an index if the values in between are not rectangular."""
        gather = self.plan.gathers.get(step.name)
        if gather is None:  # several values together, of which getitem takes one
            self.ragged.add(step.name)
            return
        kept_in, kept_out = self._kept(gather.source), self._kept(step.name)
        assert kept_in, "channels are picked out of a rectangle"
        assert kept_out, "channels are picked into a rectangle"
        rank = kept_in[gather.dim].cumsum(0) - 1
        index = self._buffer(rank[gather.places[kept_out[gather.dim]]])
        args = self.values[gather.source], gather.dim, index
        self.values[step.name] = self.graph.call_function(torch.index_select, args)

    def _fitted(self, step: Step) -> tuple[Any, tuple[Any, ...]]:
        """Return a step's function and arguments for the kept widths."""
        fit = _FITS.get(step.function)
        if fit is None:
            return step.function, step.args
        kept = self._kept(step.name if fit is _fit_reshape else getattr(step.args[0], "name", ""))
        return fit(step, kept) if kept else (step.function, step.args)


def check_sizes(found: Any, traced: Any, module: str, sizes: Sequence[int], traced_sizes: Sequence[int]) -> None:
    """Raise PruneError unless a forward pass finds out about its sizes what it found while traced, and so runs as traced."""
    if found != traced:
        raise PruneError(
            f"the forward pass of {module!r} was regenerated for values of size {tuple(traced_sizes)} and got {tuple(sizes)}; "
            "trace the network with inputs of this size and prune it again"
        )


def _parts(output: Any) -> list[tuple[Any, Any]]:
    """Return what a module returns in parts, each with its key, index or name."""
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    parts = output.parts if isinstance(output, Made) else output
    return list(parts.items()) if isinstance(parts, dict) else []


# --- one function per family of ops that state sizes: (function, args) for the kept widths ----------------------------


def _fit_reshape(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    *before, sizes = step.args
    begin = before[1] % (len(kept) - len(sizes) + 1) if step.function is aten.unflatten.int else 0
    masks = kept[begin : begin + len(sizes)]
    fitted = [size if plain(size) == -1 else _fit_size(size, mask) for size, mask in zip(sizes, masks, strict=True)]
    return step.function, (*before, type(sizes)(fitted))


def _fit_size(size: int, mask: Tensor) -> int:
    if bool(mask.all()):
        return size
    num_kept = int(mask.sum())
    return num_kept // SAMPLES * BATCH if batch_factor(size) else num_kept


def _fit_split(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    source, how, *dim = step.args
    mask = kept[dim[0] if dim else 0]
    if bool(mask.all()):
        return step.function, step.args
    parts = _PARTS.get(step.function, torch.split)(mask, how)
    return aten.split_with_sizes.default, (source, [int(part.sum()) for part in parts], *dim)


_PARTS: dict[Any, Callable[..., Sequence[Tensor]]] = {
    aten.chunk.default: torch.chunk,
    aten.tensor_split.sections: torch.tensor_split,
    aten.tensor_split.indices: torch.tensor_split,
}


def _fit_slice(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    given = list(step.args[:4])
    source, dim, start, end = given + [0, None, None][len(given) - 1 :]
    mask = kept[dim]
    if bool(mask.all()):
        return step.function, step.args
    begin, stop, _ = slice(start, end).indices(len(mask))
    return step.function, (source, dim, int(mask[:begin].sum()), int(mask[:stop].sum()))


def _fit_narrow(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    source, dim, start, length = step.args
    mask = kept[dim]
    start %= len(mask)
    return step.function, (source, dim, int(mask[:start].sum()), int(mask[start : start + length].sum()))


def _fit_select(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    source, dim, index = step.args
    return step.function, (source, dim, int(kept[dim][: index % len(kept[dim])].sum()) if index >= 0 else index)


def _fit_layer_norm(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    source, shape, *rest = step.args
    sizes = map(_fit_size, shape, kept[len(kept) - len(shape) :])
    return step.function, (source, type(shape)(sizes), *rest)


def _fit_squeeze(step: Step, kept: list[Tensor]) -> tuple[Any, tuple[Any, ...]]:
    """Name the dimensions, so that one with a single channel left is not taken for one of them."""
    return aten.squeeze.dims, (step.args[0], [dim for dim, mask in enumerate(kept) if len(mask) == 1])


_FITS: dict[Any, Callable[[Step, list[Tensor]], tuple[Any, tuple[Any, ...]]]] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unflatten.int), _fit_reshape),
    **dict.fromkeys((aten.expand.default, aten.broadcast_to.default), _fit_reshape),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, *_PARTS), _fit_split),
    aten.slice.Tensor: _fit_slice,
    aten.narrow.default: _fit_narrow,
    aten.select.int: _fit_select,
    aten.layer_norm.default: _fit_layer_norm,
    aten.rms_norm.default: _fit_layer_norm,
    aten.squeeze.default: _fit_squeeze,
}
