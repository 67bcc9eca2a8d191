"""Pruning: a smaller plain network from a network and an architecture."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gator.errors import PruneError
from gator.graph.architecture import Architecture
from gator.graph.graph import Block, ChannelGraph
from gator.graph.ops import cuts_whole_groups
from gator.graph.plans import ForwardPlan
from gator.pruning.modules import copied, replace_forward
from gator.pruning.writing import write_forward


def prune(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> nn.Module:
    """Return a copy of `model` with only the channels that the architecture keeps; `model` itself does not change.

    Module names, attributes, hooks and layer types survive where modules do; training flags, dtypes, devices and requires_grad
    too. A module that loses a residual branch, or states sizes, gets a subclass of its class whose forward() is generated.

    Raises: ArchitectureError if the architecture belongs to another graph; PruneError if the graph belongs to another model, or
    a weight is not finite: a gate multiplies by zero, and 0 * NaN is NaN, so the masked and the pruned network would differ.
    """
    architecture.check_fits(graph)
    if (mismatch := graph.mismatch(model)) is not None:
        raise PruneError(mismatch)
    _check_finite(model, graph)
    gone = [block for block in graph.blocks if block.name in architecture.removed_blocks]
    cut = _cut_tensors(model, graph, architecture, frozenset().union(*(block.tensors for block in gone)))
    small = _copy_with(model, cut)
    keep_C = torch.cat([graph.mask_of(architecture.keep), torch.ones(1, dtype=torch.bool)])  # what no group holds stays
    inner_first = sorted(graph.plans, key=lambda path: path.count(".") if path else -1, reverse=True)
    for path in inner_first:
        _renew_forward(small, path, graph.plans[path], keep_C, [b for b in gone if b.container == path])
    return small


def _check_finite(model: nn.Module, graph: ChannelGraph) -> None:
    """Refuse NaN and infinity in parameters and in pruned buffers; other buffers may hold them, as an attention mask does."""
    cut = {dim.tensor for group in graph.groups for dim in group.dims}
    tensors = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in cut)]
    for name, tensor in tensors:
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise PruneError(
                f"{name!r} holds NaN or infinity; expected finite weights. Training has diverged: return to an earlier "
                f"checkpoint, or lower the learning rate"
            )


def _cut_tensors(
    model: nn.Module, graph: ChannelGraph, architecture: Architecture, gone: frozenset[str]
) -> dict[str, Tensor]:
    """Return every tensor that loses entries, by name, without these entries; those of `gone` are removed whole."""
    dropped: dict[tuple[str, int], list[Tensor]] = {}
    for group in graph.groups:
        closed = torch.ones(group.num_channels, dtype=torch.bool)
        closed[list(architecture.keep[group.name])] = False
        for dim in group.dims:
            if dim.tensor not in gone and bool(closed.any()):
                dropped.setdefault((dim.tensor, dim.dim), []).append(dim.entries(closed.nonzero().flatten()))
    cut: dict[str, Tensor] = {}
    for (name, axis), entries in dropped.items():
        tensor = cut.get(name, _get(model, name))
        keep = torch.ones(tensor.shape[axis], dtype=torch.bool)
        keep[torch.cat(entries)] = False
        cut[name] = tensor.detach().index_select(axis, keep.nonzero().flatten().to(tensor.device))
    return cut


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _copy_with(model: nn.Module, cut: dict[str, Tensor]) -> nn.Module:
    """Return a copy of a network with pruned tensors in place of whole ones, wherever those are used: tied ones stay tied.

    A pruned tensor is never copied whole, so a network that fills most of the memory can still be pruned.
    """
    replaced = {id(old): _like(old, smaller) for old, smaller in ((_get(model, name), cut[name]) for name in cut)}
    new = {id(tensor) for tensor in replaced.values()}
    small = copied(model, replaced)
    for module in small.modules():
        if any(id(tensor) in new for tensor in (*module._parameters.values(), *module._buffers.values())):
            _fit_attributes(module)
    return small


def _like(old: Tensor, smaller: Tensor) -> Tensor:
    """Return a pruned tensor with the memory layout and the kind of the whole one: a trained or frozen parameter, or a buffer."""
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        smaller = smaller.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(smaller, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else smaller


def _fit_attributes(module: nn.Module) -> None:
    """Set the size attributes of a layer to those of its tensors."""
    if isinstance(module, _ConvNd):
        _fit_convolution(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.GroupNorm):
        width = module.num_channels // module.num_groups
        module.num_channels = len(module.weight)
        module.num_groups = 1 if module.num_groups == 1 else module.num_channels // width
    elif isinstance(module, _NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        assert tensor is not None
        module.num_features = len(tensor)


def _fit_convolution(module: _ConvNd) -> None:
    is_transposed = isinstance(module, _ConvTransposeNd)
    old_in, old_out, groups = module.in_channels, module.out_channels, module.groups
    first, second = module.weight.shape[:2]
    if groups > 1 and cuts_whole_groups(old_in, groups):
        per_group = old_in // groups if is_transposed else old_out // groups
        module.groups = first // per_group
        module.in_channels, module.out_channels = old_in // groups * module.groups, old_out // groups * module.groups
    elif is_transposed:
        module.in_channels, module.out_channels = first, second * groups
    else:
        module.in_channels, module.out_channels = second * groups, first


def _renew_forward(model: nn.Module, path: str, plan: ForwardPlan, keep_C: Tensor, gone: list[Block]) -> None:
    """Replace the forward pass of one of the model's modules, if it changes."""
    forward = write_forward(plan, keep_C, gone)
    if not forward.is_changed:
        return
    module = model.get_submodule(path)
    _drop_unused(module, plan, gone)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    for name, tensor in forward.buffers.items():
        module.register_buffer(name, tensor.to(device), persistent=False)
    replace_forward(module, forward, "Pruned")
    if gone:
        called = {step.module for step in plan.steps if step.module is not None}
        for name, inner in module.named_modules():
            # It may now read the shortcut, whose value other modules need. What is deeper may count on writing over its own values.
            if name in called and getattr(inner, "inplace", False):
                inner.inplace = False


def _drop_unused(module: nn.Module, plan: ForwardPlan, gone: list[Block]) -> None:
    """Delete the modules and parameters that only removed branches use.

    Settings of a module remain, which other code may read: nn.TransformerEncoder reads `self_attn.batch_first` of its first layer.
    """
    skipped = frozenset().union(*(block.branch for block in gone))
    steps = (*plan.steps, *(plan.training.steps if plan.training else ()))
    used = {name for step in steps if step.name not in skipped for name in step.attributes()}
    gone_names = {name for step in plan.steps if step.name in skipped for name in step.attributes()}
    for name in sorted(gone_names, key=lambda name: -name.count(".")):  # a module after its own parameters
        if any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in used):
            continue
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        removed = getattr(owner, attribute)
        delattr(owner, attribute)
        if isinstance(removed, nn.Module):
            settings = {
                key: value for key, value in vars(removed).items() if isinstance(value, bool | int | float | str)
            }
            owner.__dict__[attribute] = SimpleNamespace(**settings)
