"""The forward pass of a module in both modes: what they have in common, and the end that only training mode runs."""

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gator.graph.numbers import SizeFloat, SizeInt, plain, renamed, sizes_in
from gator.graph.plans import ForwardPlan, InTraining, Ref, Step, TrainingEnd, map_nested, refs_in
from gator.tracing.program import batch_factor
from gator.tracing.rules import RULES, elementwise, movement, pooling
from gator.tracing.walk import Rule, Zeros

_SWITCHES = ("train", "training", "dropout_p", "use_input_stats")
"""Arguments of ops whose value may depend on the mode."""
_CLIPS = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)
_CONTIGUOUS = torch.ops.aten.contiguous.default
_SIZES = re.compile(r"SymInt[\[\]\d]*\?? (\w+)")
"""The arguments in the text of an op's schema that are sizes or positions."""

_ALWAYS_KEEPING = (
    *(elementwise.same_value, elementwise.unary, elementwise.prelu, elementwise.gated_linear_unit),
    *(movement.movement, movement.concatenation, movement.stacking, movement.item, pooling.pooling, pooling.reduction),
)
"""Rules of ops that keep zeros whatever their numbers are, except a clip to numbers above zero."""
_BY_ITSELF = (
    *(
        elementwise.unary,
        elementwise.unary_breaking_zero,
        elementwise.prelu,
        elementwise.same_value,
        elementwise.addition,
    ),
    *(elementwise.product, elementwise.comparison, elementwise.choice, elementwise.quotient, elementwise.expansion),
    *(movement.movement, movement.likeness, movement.concatenation, movement.item, pooling.pooling),
)
"""Rules of ops that treat each channel by itself, zero or not."""


class Differs(Exception):
    """The two modes cannot be put together, with the reason."""


def in_both_modes(plan: ForwardPlan, training: ForwardPlan) -> ForwardPlan:
    """Return the plan of a forward in eval mode, with what training mode does instead, whose plan is given. Raises: Differs."""
    if len(plan.inputs) != len(training.inputs) or _num_decisions(plan) != _num_decisions(training):
        raise Differs("it takes other arguments, or decides by other sizes, in training mode")
    pairs = zip(plan.inputs, training.inputs, strict=True)
    names = {theirs: own for (_, own, _), (_, theirs, _) in pairs if theirs is not None and own is not None}
    constants = dict(plan.constants)
    for name, tensor in training.constants.items():
        equal = (
            own for own, other in plan.constants.items() if other.dtype == tensor.dtype and torch.equal(other, tensor)
        )
        names[name] = next(equal, f"in_training_{name}")
        constants[names[name]] = tensor
    common: list[Step] = []
    training = _without_layouts(training, {step.function for step in plan.steps})
    for own, theirs in zip(plan.steps, training.steps, strict=False):
        step = _alike(own, _renamed(theirs, names))
        if step is None:
            break
        names |= {ref.name: mine.name for ref, mine in zip(refs_in(theirs.output), refs_in(own.output), strict=True)}
        common.append(step)
    begin = len(common)
    end = training.steps[begin:]
    names |= {name: f"in_training_{name}" for step in end for name in step.outputs()}
    output = map_nested(lambda leaf: _new_ref(leaf, names), training.output)
    steps = (*common, *plan.steps[begin:])
    if not end and begin == len(plan.steps) and output == plan.output:
        return replace(plan, steps=steps)
    return replace(
        plan,
        steps=steps,
        constants=constants,
        training=TrainingEnd(begin, tuple(_renamed(step, names) for step in end), output),
    )


def _num_decisions(plan: ForwardPlan) -> int:
    """Return how often a forward decides by sizes of its own tensors. A size that it is given as a number is none, in training mode."""
    own = {value for _, value, _ in plan.inputs} | {name for step in plan.steps for name in step.outputs()}
    return sum(any(size.value.name in own for size in sizes_in(decision.formula)) for decision in plan.decisions)


def keeps_zeros(plan: ForwardPlan) -> bool:
    """Whether channels that are zero in what both modes compute are zero in all that training mode returns.

    False also where an op's numbers decide, as in `x + 1`: to mask the output once more does no harm.
    """
    if plan.training is None:
        return True
    return _zeros_in_training(plan).issuperset(ref.name for ref in refs_in(plan.training.output))


def read_when_broken(plan: ForwardPlan) -> Iterator[tuple[Step, set[str]]]:
    """Yield the steps of training mode alone that sum over channels where zeros may be lost, with the values of both modes behind them."""
    if plan.training is None:
        return
    zero = _zeros_in_training(plan, {step.module for step in plan.steps} - {None})
    common = {value for _, value, _ in plan.inputs if value is not None}
    sources = {name: {name} for name in common.union(*(step.outputs() for step in plan.common_steps()))}
    for step in plan.training.steps:
        rule, names = RULES.get(step.function), step.inputs()
        behind = {name: sources.get(name, set()) for name in names}
        if step.module is not None or rule is None or rule.labels not in _BY_ITSELF:
            found = set[str]().union(*(behind[name] for name in names if name not in zero))
            if found:
                yield step, found
        sources |= dict.fromkeys(step.outputs(), set[str]().union(*behind.values()))


def _zeros_in_training(plan: ForwardPlan, gated: Collection[str | None] = ()) -> set[str]:
    """Return the values of training mode whose channels stay zero if they are in the values of both modes and of these modules."""
    assert plan.training is not None
    zero = {value for _, value, _ in plan.inputs if value is not None}
    zero |= {name for step in plan.common_steps() for name in step.outputs()}
    for step in plan.training.steps:
        kept = [name in zero for name in step.inputs()]
        rule = RULES.get(step.function)
        is_kept = (
            step.module in gated
            if rule is None
            else (
                (rule.zeros is Zeros.ONE_INPUT and any(kept))
                or (rule.zeros is Zeros.FIRST_INPUT and isinstance(step.args[0], Ref) and step.args[0].name in zero)
                or (rule.zeros is Zeros.KEPT and bool(kept) and all(kept) and _needs_no_number(step, rule))
            )
        )
        zero |= step.outputs() if is_kept else set()
    return zero


def _needs_no_number(step: Step, rule: Rule) -> bool:
    """Whether an op that keeps zeros does so whatever numbers it is given, or is given none."""
    if rule.labels is elementwise.addition:
        return all(isinstance(arg, Ref) for arg in step.args[:2])
    return rule.labels in _ALWAYS_KEEPING and step.function not in _CLIPS


def _without_layouts(plan: ForwardPlan, functions: set[Any]) -> ForwardPlan:
    """Return a plan without `contiguous`, unless it is among the functions: kernels of attention differ in layout by mode."""
    if _CONTIGUOUS in functions:
        return plan
    names: dict[str, str] = {}
    steps: list[Step] = []
    for step in plan.steps:
        if step.function is _CONTIGUOUS:
            names[step.name] = names.get(step.args[0].name, step.args[0].name)
        else:
            steps.append(replace(_renamed(step, names), nodes=step.nodes))
    output = map_nested(lambda leaf: _new_ref(leaf, names), plan.output)
    return replace(plan, steps=tuple(steps), output=output)


def _new_ref(leaf: Any, names: dict[str, str]) -> Any:
    if isinstance(leaf, Ref):
        return Ref(names.get(leaf.name, leaf.name))
    return renamed(leaf, lambda value: _new_ref(value, names))


def _renamed(step: Step, names: dict[str, str]) -> Step:
    args, kwargs, output = map_nested(lambda leaf: _new_ref(leaf, names), (step.args, step.kwargs, step.output))
    return replace(
        step, name=names.get(step.name, step.name), nodes=frozenset(), args=args, kwargs=kwargs, output=output
    )


def _alike(own: Step, theirs: Step) -> Step | None:
    """Return a step for both modes; None if training mode does something else."""
    if (own.module, own.function, len(refs_in(own.output))) != (
        theirs.module,
        theirs.function,
        len(refs_in(theirs.output)),
    ):
        return None
    before, after = _named(own), _named(theirs)
    changed = {name for name in before if name in _SWITCHES and before[name] != after.get(name)}
    if any(before[name] for name in changed):
        return None
    if {**before, **dict.fromkeys(changed)} != {**after, **dict.fromkeys(changed)}:
        return None
    return with_switches(own, {name: InTraining(after[name]) for name in changed})


def with_switches(step: Step, values: dict[str, InTraining]) -> Step:
    """Return a step with other values of some arguments, by their names in the op's schema."""
    if not values:
        return step
    names = [argument.name for argument in step.function._schema.arguments]  # type: ignore[union-attr]
    args = tuple(values.get(name, given) for name, given in zip(names, step.args, strict=False))
    rest = {name: value for name, value in values.items() if name not in names[: len(args)]}
    return replace(step, args=args, kwargs={**step.kwargs, **rest})


def _named(step: Step) -> dict[Any, Any]:
    """Return a step's arguments by name, those that are not given with their default."""
    schema = getattr(step.function, "_schema", None)
    if schema is None:
        return {**dict(enumerate(step.args)), **step.kwargs}
    defaults = {arg.name: arg.default_value for arg in schema.arguments}
    return {**defaults, **dict(zip((arg.name for arg in schema.arguments), step.args, strict=False)), **step.kwargs}


def check_states_no_size(plan: ForwardPlan) -> None:
    """Refuse what training mode alone runs if it states a size, which is not that of the kept widths. Raises: Differs."""
    for step in plan.training.steps if plan.training is not None else ():
        _check_step(step, plan.batch is not None)


def _check_step(step: Step, has_batch: bool) -> None:
    """Refuse a step that states a size, or a number of samples that no input shows."""
    values = _named(step)
    for name in _SIZES.findall(str(getattr(step.function, "_schema", ""))):
        given = values.get(name)
        for size in given if isinstance(given, (list, tuple)) else [given]:
            if size is not None and plain(size) not in (0, 1, -1) and not (has_batch and batch_factor(size)):
                raise Differs(f"what it does in training mode alone states a size ({step.function})")
    for leaf in tree_leaves((step.args, step.kwargs)):
        is_computed = isinstance(leaf, SizeInt | SizeFloat)
        if is_computed and not all(batch_factor(size.found) for size in sizes_in(leaf.formula)):
            raise Differs(f"what it does in training mode alone depends on a size ({step.function})")
