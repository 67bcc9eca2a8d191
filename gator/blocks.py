"""Residual branches that can disappear: found as additions, one operand of which is computed by layers of its own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from gator.graph import Block, ChannelGroup, Plan, Ref, Step
from gator.placing import can_silence, stack_keys
from gator.rules import RULES

if TYPE_CHECKING:
    from gator.tracing import Walk

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
SHAPE_IN_ARGUMENTS = (aten.view.default, aten.reshape.default, aten.expand.default, aten.unflatten.int)


def find_blocks(
    walk: "Walk", groups: tuple[ChannelGroup, ...]
) -> tuple[tuple[ChannelGroup, ...], tuple[Block, ...], dict[str, Plan]]:
    """Return the groups with their block filled in, the blocks, and the plans of the modules that contain them."""
    found = [block for node in walk.nodes if node.target in ADDITIONS for block in _branches(walk, node, groups)]
    inner = [(block, plan) for block, plan in found if not any(other.branch < block.branch for other, _ in found)]
    containers = [block.container for block, _ in inner]
    named = [
        (replace(block, name=block.container if containers.count(block.container) == 1 else block.name), plan)
        for block, plan in inner
    ]
    block_of = {group: block.name for block, _ in named for group in block.groups}
    plans = {block.container: plan for block, plan in named}
    return tuple(replace(group, block=block_of.get(group.name)) for group in groups), tuple(b for b, _ in named), plans


def _branches(walk: "Walk", addition: Node, groups: tuple[ChannelGroup, ...]) -> Iterator[tuple[Block, Plan]]:
    """Yield the operands of an addition that are branches: inner groups of their own, and no value used elsewhere."""
    operands = [arg for arg in addition.args if isinstance(arg, Node)]
    if len(operands) != 2:
        return
    for output, shortcut in (operands, operands[::-1]):
        branch = _ancestors(output) - _ancestors(shortcut)
        if not branch or any(user not in branch and user is not addition for node in branch for user in node.users):
            continue
        tensors = frozenset(
            name
            for source, name in _tensor_nodes(walk)
            if source.users and all(user in branch for user in source.users)
        )
        inner = tuple(group.name for group in groups if all(dim.tensor in tensors for dim in group.dims))
        if not inner or not can_silence(output, branch):
            continue
        plan = _plan(walk, addition)
        if plan is None or not {node.name for node in branch} <= {step.name for step in plan.steps}:
            continue
        container = list(addition.meta["nn_module_stack"].values())[-1][0]
        first = min(branch, key=walk.nodes.index)
        name = f"{container}:{list(first.meta['nn_module_stack'].values())[-1][0]}"
        names = frozenset(node.name for node in branch)
        yield Block(name, container, inner, tensors, names, addition.name, output.name, shortcut.name), plan


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


def _plan(walk: "Walk", addition: Node) -> Plan | None:
    """Return the forward pass of the module that holds an addition; None when it cannot be written as a Plan.

    It can when the module is called once, takes one value and returns one, and does nothing but call leaf modules and
    functions without a shape or a parameter in their arguments.
    """
    key = stack_keys(addition)[-1]
    container = addition.meta["nn_module_stack"][key][0]
    inside = [node for node in walk.nodes if key in stack_keys(node)]
    members = set(inside)
    outside = {source for node in inside for source in node.all_input_nodes if source not in members}
    inputs = [source for source in outside if source.name not in walk.tensors]
    outputs = [node for node in inside if any(user not in members for user in node.users)]
    called_again = any(
        path == container and other != key
        for node in walk.nodes
        for other, (path, _) in (node.meta.get("nn_module_stack") or {}).items()
    )
    if len(inputs) != 1 or len(outputs) != 1 or called_again:
        return None
    steps = [_step(walk, node, key, container, inside) for node in inside]
    if any(step is None for step in steps):
        return None
    return Plan(inputs[0].name, tuple(step for step in steps if step is not None), outputs[0].name)


def _step(walk: "Walk", node: Node, key: str, container: str, inside: list[Node]) -> Step | None:
    own_key = stack_keys(node)[-1]
    if own_key == key:
        reads_tensor = any(source.name in walk.tensors for source in node.all_input_nodes)
        if reads_tensor or node.target not in RULES or node.target in SHAPE_IN_ARGUMENTS:
            return None
        return Step(node.name, None, node.target, _refs(node.args), _refs(node.kwargs))  # type: ignore[arg-type]
    is_leaf_call = sum(own_key in stack_keys(other) for other in inside) == 1
    values = [source for source in node.all_input_nodes if source.name not in walk.tensors]
    if not is_leaf_call or len(values) != 1:
        return None
    path = node.meta["nn_module_stack"][own_key][0]
    return Step(node.name, path.removeprefix(f"{container}.") if container else path, None, (Ref(values[0].name),), {})


def _refs(arguments: Any) -> Any:
    """Return arguments with every node replaced by a Ref to its step."""
    return torch.fx.node.map_arg(arguments, lambda node: Ref(node.name))  # type: ignore[arg-type, return-value]
