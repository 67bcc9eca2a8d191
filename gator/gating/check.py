"""Checks a pruned network: the outputs of the gated network, and the predicted number of MACs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gator.costs.counted import AttentionCost, MacsCost
from gator.costs.counter import count_macs
from gator.errors import PruneError
from gator.gating.gated import GatedModel
from gator.graph.architecture import Architecture
from gator.graph.graph import ChannelGraph

# Relative to the largest logit: in float32, layers of other widths add in another order.
PRUNING_TOLERANCE = 1e-3


def check_pruning(
    gated: GatedModel, pruned: nn.Module, graph: ChannelGraph, architecture: Architecture, images: Tensor
) -> None:
    """Raise PruneError unless gated.prune() gives the outputs of the gated network and runs the counted MACs.

    pruned: what gated.prune() returned.    graph: of the unpruned network.    images: (N, 3, H, W), what both get.
    Leaves both networks in eval mode.
    """
    pruned.eval()
    gated.eval()
    with torch.inference_mode(), _full_precision():
        expected = gated(images)
        if not bool(expected.isfinite().all()):
            raise PruneError(
                "the network's logits are not finite before pruning, expected finite numbers: gating has diverged; lower "
                "gating.lr or warm it up"
            )
        difference = float((pruned(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= PRUNING_TOLERANCE:
        raise PruneError(
            f"the logits of the pruned network and the gated one differ by {difference:.2g} of the largest, "
            f"expected at most {PRUNING_TOLERANCE:g}; gator prunes this network wrongly, please report it"
        )
    check_macs(pruned, graph, architecture, images)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute in float32 what is float32. TensorFloat-32 would round the two networks differently, to three digits."""
    mkldnn: Any = torch.backends.mkldnn
    libraries = torch.backends.cuda.matmul, mkldnn.matmul, mkldnn.conv
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # by default flags() turns cuDNN off
            yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision


def check_macs(pruned: nn.Module, graph: ChannelGraph, architecture: Architecture, *inputs: Tensor) -> None:
    """Raise PruneError, naming the modules that differ, unless a pruned network runs the MACs that costs say.

    Does nothing where the graph names ops that it does not count.
    """
    counted = {path: sum(by_op.values()) for path, by_op in count_macs(pruned, *inputs).items()}
    said = _macs_by_module(graph, architecture)
    if counted.get("", 0) == round(said[""]) or graph.uncounted:
        return
    different = [path for path in counted.keys() | said.keys() if counted.get(path, 0) != round(said.get(path, 0.0))]
    lowest = [path for path in different if not any(other != path and _is_below(other, path) for other in different)]
    where = "; ".join(
        f"{path!r} runs {counted.get(path, 0)}, not {said.get(path, 0.0):.0f}" for path in sorted(lowest)[:3]
    )
    raise PruneError(
        f"the pruned network runs {counted.get('', 0)} MACs, MacsCost and AttentionCost say {said['']:.0f}: "
        f"{where}; gator's graph misses a product, please report it"
    )


def _is_below(path: str, module: str) -> bool:
    """Whether a module is part of another; "" is the network."""
    return not module or path == module or path.startswith(f"{module}.")


def _macs_by_module(graph: ChannelGraph, architecture: Architecture) -> dict[str, float]:
    """Return the MACs of each module, with all that runs in it."""
    widths = torch.tensor([architecture.widths[group.name] for group in graph.groups], dtype=torch.float64)
    said = {"": 0.0}
    for products, cost in ((graph.layers, MacsCost(graph)), (graph.products, AttentionCost(graph))):
        for product, macs in zip(products, cost.terms_of(widths).tolist(), strict=True):
            names = product.module.split(".") if product.module else []
            for depth in range(len(names) + 1):
                path = ".".join(names[:depth])
                said[path] = said.get(path, 0.0) + macs
    return said
