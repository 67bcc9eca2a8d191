"""Removable residual branches: found as additions, one operand of which is computed by layers of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from gator.graph.graph import Block, ChannelGroup
from gator.graph.plans import ForwardPlan, Step, refs_in
from gator.graph.selection import Selection
from gator.tracing.forwards import Forwards
from gator.tracing.placing import GatePlacer
from gator.tracing.program import module_path
from gator.tracing.walk import Walk
from gator.tracing.writes import is_in_place

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)


def find_blocks(
    walk: Walk, groups: tuple[ChannelGroup, ...], forwards: Forwards, placer: GatePlacer, selection: Selection
) -> tuple[tuple[ChannelGroup, ...], tuple[Block, ...]]:
    """Return the groups with their block filled in, and the blocks, each named after its module if that has no other block.

    A branch with a module that must not be pruned is not a block.
    """
    found = [
        block
        for node in walk.nodes
        if node.target in ADDITIONS
        for block in _branches(walk, node, groups, forwards, placer)
        if selection.why_not({name.rpartition(".")[0] for name in block.tensors}) is None
    ]
    inner = [block for block in found if not any(_is_inside(other, block) for other in found)]
    blocks = tuple(replace(block, name=_name(block, inner)) for block in inner)
    block_of = {group: block.name for block in blocks for group in block.groups}
    return tuple(replace(group, block=block_of.get(group.name)) for group in groups), blocks


def _name(block: Block, blocks: Sequence[Block]) -> str:
    """Return the shortest name that no other block has: of its module, of where its branch begins, or of its first group."""
    if sum(other.container == block.container for other in blocks) == 1:
        return block.container
    is_alone = sum(other.name == block.name for other in blocks) == 1
    return block.name if is_alone else f"{block.container}:{block.groups[0]}"


def _is_inside(one: Block, other: Block) -> bool:
    """Whether a branch is a part of another one: of x + (x + f(x)), f alone is a block."""
    return one.tensors < other.tensors or (one.tensors == other.tensors and one.nodes < other.nodes)


def _branches(
    walk: Walk, addition: Node, groups: tuple[ChannelGroup, ...], forwards: Forwards, placer: GatePlacer
) -> Iterator[Block]:
    """Yield the operand of an addition that is a branch: inner groups of its own, and no value used elsewhere.

    Of two branches that are added the first one is a block: without both there would be nothing left to return.
    """
    key = forwards.own_key(addition)
    operands = [arg for arg in addition.args if isinstance(arg, Node)]
    if len(operands) != 2 or not forwards.has_plan(key):
        return
    plan = forwards.plan(key)
    for output, shortcut in (operands, operands[::-1]):
        if walk.is_of_parameters(shortcut) or not _is_the_rest(shortcut, addition):
            continue
        branch = _steps_before(plan, output.name) - _steps_before(plan, shortcut.name)
        in_both_modes = {step.name for step in plan.common_steps()}
        if not branch or not in_both_modes.issuperset([addition.name, *(step.name for step in branch)]):
            continue
        if _is_used_outside(plan, branch, addition.name):
            continue
        nodes = {walk.program.by_name[name] for step in branch for name in step.nodes}
        modules = {step.module for step in branch} - {step.module for step in plan.steps if step not in branch} - {None}
        tensors = _tensors_of(walk, nodes) | _unread_in(walk, plan, modules)
        inner = tuple(group.name for group in groups if all(dim.tensor in tensors for dim in group.dims))
        if not inner or placer.silencer(output) not in nodes:
            continue
        container = module_path(addition)
        steps = frozenset(step.name for step in branch)
        name = f"{container}:{module_path(min(nodes))}"
        names = frozenset(node.name for node in nodes)
        is_overwritten = any(_is_written_inside(plan, value) for value in (addition, shortcut))
        ends = addition.name, output.name, shortcut.name
        yield Block(name, container, inner, tensors, steps, names, *ends, is_overwritten)
        return


def _is_the_rest(shortcut: Node, addition: Node) -> bool:
    """Whether an addition without its other operand gives the shortcut itself: not broadcast, not converted, not times alpha."""
    value, result = shortcut.meta["val"], addition.meta["val"]
    is_scaled = addition.args[1] is shortcut and addition.kwargs.get("alpha", 1) != 1
    return value.shape == result.shape and value.dtype == result.dtype and not is_scaled


def _steps_before(plan: ForwardPlan, value: str) -> set[Step]:
    """Return the step that makes a value and every step it depends on."""
    makers = {name: step for step in plan.steps for name in step.outputs()}
    steps: set[Step] = set()
    names = [value]
    while names:
        step = makers.get(names.pop())
        if step is not None and step not in steps:
            steps.add(step)
            names.extend(step.inputs())
    return steps


def _is_used_outside(plan: ForwardPlan, branch: set[Step], addition: str) -> bool:
    made = {name for step in branch for name in step.outputs()}
    end = plan.training
    others = (
        step for step in (*plan.steps, *(end.steps if end else ())) if step not in branch and step.name != addition
    )
    returned = {ref.name for ref in refs_in((plan.output, end.output if end else None))}
    return bool(made & returned) or any(made & step.inputs() for step in others)


def _is_written_inside(plan: ForwardPlan, value: Node) -> bool:
    """Whether a module that this forward calls writes over a value by an op of its own forward or of a module in it."""
    prefix = f"{plan.module}." if plan.module else ""
    writers = {user.name: module_path(user) for user in value.users if is_in_place(user.target)}
    called = {name: f"{prefix}{step.module}" for step in plan.steps if step.module is not None for name in step.nodes}
    return any(name in called and called[name] != path for name, path in writers.items())


def _tensors_of(walk: Walk, nodes: set[Node]) -> frozenset[str]:
    """Return the parameters and buffers that only these nodes use."""
    sources = {source for node in nodes for source in node.all_input_nodes if source.name in walk.tensors}
    return frozenset(walk.tensors[source.name] for source in sources if nodes.issuperset(source.users))


def _unread_in(walk: Walk, plan: ForwardPlan, modules: set[str | None]) -> frozenset[str]:
    """Return the parameters and buffers of some modules of a forward that nothing reads: they go with the modules."""
    read = {walk.tensors[node.name] for node in walk.nodes if node.name in walk.tensors and node.users}
    prefix = f"{plan.module}." if plan.module else ""
    inside = tuple(f"{prefix}{module}." for module in modules)
    names = walk.program.names.items()
    return frozenset(
        first for first, others in names if first not in read and all(n.startswith(inside) for n in others)
    )
