"""Residual branches that can disappear: found as additions, one operand of which is computed by layers of its own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from gator.graph import Block, ChannelGroup, Plan, Ref, Step
from gator.placing import can_silence, stack_keys
from gator.rules import RULES
from gator.selection import Selection

if TYPE_CHECKING:
    from gator.tracing import Walk

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
SHAPE_IN_ARGUMENTS = (aten.view.default, aten.reshape.default, aten.expand.default, aten.unflatten.int)


@dataclass(frozen=True)
class _Branch:
    """A branch that can go, before it has its final name."""

    block: Block
    nodes: frozenset[Node]
    addition: Node


def find_blocks(
    walk: "Walk", groups: tuple[ChannelGroup, ...], selection: Selection
) -> tuple[tuple[ChannelGroup, ...], tuple[Block, ...], dict[str, Plan]]:
    """Return the groups with their block filled in, the blocks, and the plans of the modules that contain them.

    A branch with a module that may not be cut is no block.
    """
    found = [
        branch
        for node in walk.nodes
        if node.target in ADDITIONS
        for branch in _branches(walk, node, groups)
        if selection.why_not({name.rpartition(".")[0] for name in branch.block.tensors}) is None
    ]
    inner = [branch for branch in found if not any(other.nodes < branch.nodes for other in found)]
    in_container: dict[str, list[_Branch]] = {}
    for branch in inner:
        in_container.setdefault(branch.block.container, []).append(branch)
    plans = {
        container: _plan(walk, branches[0].addition, [branch.nodes for branch in branches])
        for container, branches in in_container.items()
    }
    blocks = tuple(
        replace(branch.block, name=branch.block.container)
        if len(in_container[branch.block.container]) == 1
        else branch.block
        for branch in inner
    )
    block_of = {group: block.name for block in blocks for group in block.groups}
    return (
        tuple(replace(group, block=block_of.get(group.name)) for group in groups),
        blocks,
        {container: plan for container, plan in plans.items() if plan is not None},
    )


def _branches(walk: "Walk", addition: Node, groups: tuple[ChannelGroup, ...]) -> Iterator[_Branch]:
    """Yield the operands of an addition that are branches: inner groups of their own, and no value used elsewhere."""
    operands = [arg for arg in addition.args if isinstance(arg, Node)]
    if len(operands) != 2:
        return
    for output, shortcut in (operands, operands[::-1]):
        branch = frozenset(_ancestors(output) - _ancestors(shortcut))
        if not branch or any(user not in branch and user is not addition for node in branch for user in node.users):
            continue
        tensors = frozenset(
            name
            for source, name in _tensor_nodes(walk)
            if source.users and all(user in branch for user in source.users)
        )
        inner = tuple(group.name for group in groups if all(dim.tensor in tensors for dim in group.dims))
        if not inner or not can_silence(walk, output, branch) or _plan(walk, addition, [branch]) is None:
            continue
        container = list(addition.meta["nn_module_stack"].values())[-1][0]
        first = min(branch, key=walk.nodes.index)
        name = f"{container}:{list(first.meta['nn_module_stack'].values())[-1][0]}"
        names = frozenset(node.name for node in branch)
        block = Block(name, container, inner, tensors, names, addition.name, output.name, shortcut.name)
        yield _Branch(block, branch, addition)


def _ancestors(node: Node) -> set[Node]:
    """Return a node and every op it depends on."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _tensor_nodes(walk: "Walk") -> list[tuple[Node, str]]:
    return [(node, walk.tensors[node.name]) for node in walk.nodes if node.name in walk.tensors]


def _plan(walk: "Walk", addition: Node, branches: Sequence[frozenset[Node]]) -> Plan | None:
    """Return the forward pass of the module that holds an addition; None when it cannot be written as a Plan.

    It can when the module is called once, takes one value and returns one, and consists of calls of other modules that lie
    in a branch or outside of it as a whole, and of functions without a shape or a parameter in their arguments.
    """
    key = stack_keys(addition)[-1]
    container = addition.meta["nn_module_stack"][key][0]
    inside = [node for node in walk.nodes if key in stack_keys(node)]
    called_again = any(
        path == container and other != key
        for node in walk.nodes
        for other, (path, _) in (node.meta.get("nn_module_stack") or {}).items()
    )
    ends = _ends(walk, inside)
    if ends is None or called_again:
        return None
    steps: list[Step] = []
    done: set[Node] = set()
    for node in inside:
        if node in done:
            continue
        call = _whole_call(walk, node, key, inside, branches)
        step = _function_step(walk, node) if call is None else _call_step(walk, node, call, container)
        if step is None:
            return None
        steps.append(step)
        done.update([node] if call is None else call.nodes)
    is_overwritten = any(user not in done and _is_in_place(user.target) for user in ends[1].users)
    return Plan(ends[0].name, tuple(steps), ends[1].name, is_overwritten)


@dataclass(frozen=True)
class _Call:
    """A module call with everything traced in it, which takes one value and returns one."""

    path: str
    nodes: list[Node]
    input: Node
    output: Node


def _whole_call(
    walk: "Walk", node: Node, key: str, inside: list[Node], branches: Sequence[frozenset[Node]]
) -> _Call | None:
    """Return the outermost call below the container `key` that holds a node, and that no branch begins or ends in."""
    keys = stack_keys(node)
    for own_key in keys[keys.index(key) + 1 :]:
        nodes = [other for other in inside if own_key in stack_keys(other)]
        ends = _ends(walk, nodes)
        if ends is not None and not any(0 < len(branch.intersection(nodes)) < len(nodes) for branch in branches):
            return _Call(node.meta["nn_module_stack"][own_key][0], nodes, *ends)
    return None


def _ends(walk: "Walk", nodes: list[Node]) -> tuple[Node, Node] | None:
    """Return the one value that nodes read from elsewhere and the one that is read elsewhere; None if there are more."""
    members = set(nodes)
    read = {source for node in nodes for source in node.all_input_nodes if source not in members}
    inputs = [source for source in read if source.name not in walk.tensors]
    outputs = [node for node in nodes if any(user not in members for user in node.users)]
    return (inputs[0], outputs[0]) if len(inputs) == len(outputs) == 1 else None


def _call_step(walk: "Walk", node: Node, call: _Call, container: str) -> Step:
    path = call.path.removeprefix(f"{container}.") if container else call.path
    return Step(call.output.name, path, None, (Ref(call.input.name),), {})


def _function_step(walk: "Walk", node: Node) -> Step | None:
    reads_tensor = any(source.name in walk.tensors for source in node.all_input_nodes)
    if reads_tensor or node.target not in RULES or node.target in SHAPE_IN_ARGUMENTS:
        return None
    return Step(node.name, None, out_of_place(node.target), _refs(node.args), _refs(node.kwargs))


def _is_in_place(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def out_of_place(op: Any) -> Callable[..., Any]:
    """Return the op that writes its result to a new tensor: what remains of a block may read a value that others need."""
    if not _is_in_place(op):
        return op
    packet = getattr(aten, op._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, op._overloadname)


def _refs(arguments: Any) -> Any:
    """Return arguments with every node replaced by a Ref to its step."""
    return torch.fx.node.map_arg(arguments, lambda node: Ref(node.name))  # type: ignore[arg-type, return-value]
