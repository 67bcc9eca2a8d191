"""Warm start: a gating stage that starts from the pruned network of an earlier one, as in the paper's chains of networks.

Source: Gator, arXiv 2205.15404: train, remove, continue with a larger weight of the cost, and so on. The gates are kept and clamped
from above to their starting value; the cost is still relative to the unpruned network, because the graph is that of the latter.
"""

import copy

import torch
from torch import Tensor, nn

from gator.errors import GateError, PruneError
from gator.gating.gated import GatedModel
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph
from gator.pruning.prune import prune


@torch.no_grad()
def continue_from(
    gated: GatedModel, model: nn.Module, pruned: nn.Module, architecture: Architecture, logits_C: Tensor
) -> None:
    """Load an earlier stage's result into a fresh gated network, in place: in eval mode its outputs are then those of `pruned`.

    gated: GatedModel(model, graph).    pruned: prune(model, graph, architecture), trained since or not.
    logits_C: (C,) gated.gates.logits_C at the end of the earlier stage; an open gate above the starting value is clamped to
    it, so that no channel starts further from closing than in a first stage.

    Raises: ArchitectureError or PruneError if the architecture or the pruned network belong to another model; GateError if the
    number of logits is wrong, or one is not finite.
    """
    gates = gated.gates
    if logits_C.shape != gates.logits_C.shape or not bool(logits_C.isfinite().all()):
        raise GateError(
            f"the logits of the earlier stage have shape {tuple(logits_C.shape)}, expected finite numbers of shape "
            f"{tuple(gates.logits_C.shape)}; take those of a stage on the same graph"
        )
    put_back(model, gated.graph, architecture, pruned)
    gates.logits_C.copy_(torch.minimum(logits_C.to(gates.logits_C), gates.logits_C))
    gated.load_architecture(architecture)


@torch.no_grad()
def put_back(model: nn.Module, graph: ChannelGraph, architecture: Architecture, pruned: nn.Module) -> None:
    """Write the tensors of a pruned network into the entries of `model` that they came from; the other entries stay.

    Raises: ArchitectureError if the architecture belongs to another graph, PruneError if `pruned` is not of this architecture.
    """
    # A network with positions instead of weights is pruned like any other; each entry is then the position it came from.
    # In float64, which counts to 2**53 exactly.
    places = copy.deepcopy(model).double()
    for tensor in (*places.parameters(), *places.buffers()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    wanted = prune(places, graph, architecture).state_dict()
    found = pruned.state_dict()
    for name, place in wanted.items():
        if name not in found or found[name].shape != place.shape:
            shape = tuple(found[name].shape) if name in found else "missing"
            raise PruneError(
                f"{name!r} is {shape} in the pruned network, expected {tuple(place.shape)} by its architecture; give the two "
                "of one stage"
            )
    full = model.state_dict()
    for name, place in wanted.items():
        flat = full[name].flatten()
        flat[place.flatten().to(torch.int64)] = found[name].flatten().to(flat)
        full[name].copy_(flat.view(full[name].shape))
