"""Re-cutting: removes closed channels from the network in the middle of gated training, which continues unchanged.

The smaller network is traced again, and each of its channels is recognised by the tensor entries it runs through. Its gates
stay those of the unpruned network: their numbers in the noise, their groups, and with them the cost, which is still relative
to the unpruned network.
"""

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gator.errors import GateError
from gator.gating.gated import NO_GATE, GatedBody, GatedModel
from gator.gating.gates import ChannelGates
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph
from gator.pruning.prune import prune
from gator.tracing.inputs import zero_inputs
from gator.tracing.trace import trace

_LOGITS = ""
"""Stands for the gates' logits among the names of parameters."""


def recut(
    gated: GatedModel, optimizer: Optimizer | None = None, architecture: Architecture | None = None
) -> GatedModel:
    """Return a gated network without the closed channels; training it gives what training `gated` would, up to rounding.

    optimizer: one over gated's parameters; gets those of the result, its momentum and other state pruned alike. Call this
    between optimizer.step() and the next forward pass; wrap the result again in DistributedDataParallel or torch.compile.
    architecture: the channels to keep, the built_architecture() of a checkpoint, instead of those open now; then load the
    checkpoint into the result.

    The result's graph, architecture() and costs remain those of the unpruned network; result.prune() prunes the trained weights.
    `gated` itself must not be trained any more. Takes about as long as trace().

    Raises: ArchitectureError if the architecture does not fit; GateError if a logit is not finite, or the smaller network is traced
    otherwise than the larger one was. In each case nothing has changed and training may continue with `gated`.

    >>> gated = recut(gated, optimizer)     # doctest: +SKIP
    """
    if architecture is None:
        gated.gates.check_finite()
        gated.gates.settle()
        left_C = _never_alone(gated.gates, gated.gates.open_C())
    else:
        left_C = gated.channels_of(architecture)
    small = _cut_body(gated.body, left_C)
    gates = gated.gates.smaller(left_C)
    _check_blocks(gated, left_C, small, gates)
    smaller = GatedModel.assembled(gated.graph, gates, small)
    smaller.divide_gradient_by(gated.gradient_cost)
    smaller.samples_per_step, smaller.loss_scale = gated.samples_per_step, gated.loss_scale
    _copy_training_flags(gated, smaller)
    if optimizer is not None:
        _carry_over(optimizer, gated, smaller, left_C)
    return smaller


def _never_alone(gates: ChannelGates, open_C: Tensor) -> Tensor:
    """Return the open channels, and a closed one next to each that is the last of its group.

    A dimension of size 1 cannot be distinguished from a broadcast one, nor a depthwise convolution of one channel from a dense
    one. The closed channel changes no output.
    """
    left_C = open_C.clone()
    for group in (gates.count(open_C) == 1).nonzero().flatten().tolist():
        closed = ((gates.group_C == group) & ~open_C).nonzero().flatten()
        left_C[closed[:1]] = True
    return left_C


def _cut_body(body: GatedBody, left_C: Tensor) -> GatedBody:
    """Return the network of the remaining channels, with the new number of each channel's gate."""
    architecture = body.architecture(left_C)
    model = prune(body.model, body.graph, architecture)
    inputs = zero_inputs(model, body.graph.input_shapes, body.graph.input_dtypes)
    selection = body.graph.selection
    graph = trace(model, inputs, selection.include, selection.exclude)
    gate_of_entry = _gates_of_entries(body, left_C.cpu())
    parts = [_gates_of_group(graph, number, gate_of_entry) for number in range(len(graph.groups))]
    gate_of_channel = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    is_found = torch.zeros(int(left_C.sum()), dtype=torch.bool)
    is_found[gate_of_channel[gate_of_channel != NO_GATE]] = True
    if not bool(is_found.all()):
        raise GateError(
            f"after the re-cut {int(is_found.sum())} channels of {graph.model} can be pruned, expected {len(is_found)}; "
            "its groups change with its widths, so train it without re-cutting"
        )
    return GatedBody(model, graph, gate_of_channel)


def _gates_of_entries(body: GatedBody, left_C: Tensor) -> dict[tuple[str, int], Tensor]:
    """Return, for each tensor dimension, the new number of the gate of each remaining entry, or NO_GATE."""
    new_number = torch.where(left_C, left_C.cumsum(0) - 1, -2)  # -2: goes away
    new_number = torch.cat([new_number, torch.tensor([NO_GATE])])  # at index NO_GATE, the last
    sizes = {**body.graph.parameters, **{name: tuple(buffer.shape) for name, buffer in body.model.named_buffers()}}
    gates: dict[tuple[str, int], Tensor] = {}
    begin = 0
    for group in body.graph.groups:
        numbers = new_number[body.gate_of_channel[begin : begin + group.num_channels]]
        for dim in group.dims:
            entries = gates.setdefault((dim.tensor, dim.dim), torch.full((sizes[dim.tensor][dim.dim],), NO_GATE))
            entries[dim.index] = numbers[:, None]
        begin += group.num_channels
    return {key: entries[entries != -2] for key, entries in gates.items()}


def _gates_of_group(graph: ChannelGraph, number: int, gate_of_entry: dict[tuple[str, int], Tensor]) -> Tensor:
    """Return the gate of each channel of a group. Raises: GateError unless all its tensors agree.

    A group none of whose channels had a gate was locked by what the re-cut has removed; its channels stay.
    """
    group = graph.groups[number]
    dims = (dim for dim in group.dims if (dim.tensor, dim.dim) in gate_of_entry)
    found = [gate_of_entry[dim.tensor, dim.dim][dim.index] for dim in dims]
    if all(bool((gates == NO_GATE).all()) for gates in found):
        return torch.full((group.num_channels,), NO_GATE)
    gates = found[0][:, 0]
    if bool((gates == NO_GATE).any()) or any(
        not torch.equal(other, gates[:, None].expand_as(other)) for other in found
    ):
        raise GateError(
            f"group {group.name} of the re-cut {graph.model} combines other channels than before the re-cut; its groups "
            "change with its widths, so train it without re-cutting"
        )
    return gates


def _check_blocks(gated: GatedModel, left_C: Tensor, small: GatedBody, gates: ChannelGates) -> None:
    """Raise GateError unless exactly the blocks that were alive can still be removed."""
    alive_B = gated.gates.alive_B(gated.gates.count(left_C)).tolist()
    expected = {block.name for block, is_alive in zip(gated.graph.blocks, alive_B, strict=True) if is_alive}
    found = set(small.gated_blocks(gated.graph, gates).values())
    if found != expected:
        raise GateError(
            f"the re-cut {small.graph.model} has the removable blocks {sorted(map(str, found))}, expected {sorted(expected)}; "
            "train it without re-cutting"
        )


def _copy_training_flags(gated: GatedModel, smaller: GatedModel) -> None:
    flags = {name: module.training for name, module in gated.named_modules()}
    for name, module in smaller.named_modules():
        module.training = flags.get(name, gated.training)


def _carry_over(optimizer: Optimizer, gated: GatedModel, smaller: GatedModel, left_C: Tensor) -> None:
    """Replace the larger parameters by the smaller ones, in the parameter groups and in the state."""
    old, new = _parameters(gated), _parameters(smaller)
    name_of = {parameter: name for name, parameter in old.items()}
    state = {name: optimizer.state.pop(p) for name, p in old.items() if p in optimizer.state}
    for group in optimizer.param_groups:
        remaining = [p for p in group["params"] if name_of.get(p) is None or name_of[p] in new]
        group["params"] = [new[name_of[p]] if p in name_of else p for p in remaining]
    for key in {key for values in state.values() for key in values}:
        like = {name: values[key] for name, values in state.items() if _is_like(values.get(key), old[name])}
        for name, tensor in _cut_like(gated, left_C, like).items():
            state[name][key] = tensor
    optimizer.state.update((new[name], values) for name, values in state.items() if name in new)


def _parameters(gated: GatedModel) -> dict[str, nn.Parameter]:
    return {_LOGITS: gated.gates.logits_C, **dict(gated.body.model.named_parameters())}


def _is_like(value: object, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _cut_like(gated: GatedModel, left_C: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, each shaped like the parameter of its name, pruned as that parameter is."""
    holder = copy.deepcopy(gated.body.model)
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            parameter.copy_(tensors.get(name, torch.zeros_like(parameter)))
    cut = prune(holder, gated.body.graph, gated.body.architecture(left_C))
    smaller = {name: parameter.detach() for name, parameter in cut.named_parameters() if name in tensors}
    if _LOGITS in tensors:
        smaller[_LOGITS] = tensors[_LOGITS][left_C]
    return smaller
