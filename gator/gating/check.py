"""Checks a pruned network: the outputs of the gated network, and the predicted number of MACs."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gator.costs.counted import MacsCost
from gator.errors import PruneError
from gator.gating.gated import GatedModel
from gator.graph.architecture import Architecture

# Relative to the largest logit: in float32, layers of other widths add in another order.
PRUNING_TOLERANCE = 1e-3


def check_pruning(
    gated: GatedModel, pruned: nn.Module, architecture: Architecture, macs: MacsCost, images: Tensor
) -> None:
    """Raise PruneError unless gated.prune() gives the outputs of the gated network and runs the counted MACs.

    pruned: what gated.prune() returned.    images: (N, 3, H, W), what both get. Leaves both networks in eval mode.
    """
    pruned.eval()
    gated.eval()
    # TensorFloat-32 would round the two networks' convolutions differently, to three digits.
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = gated(images)
        if not bool(expected.isfinite().all()):
            raise PruneError(
                "the network's logits are not finite before pruning, expected finite numbers: gating has diverged; lower "
                "gating.lr or warm it up"
            )
        difference = float((pruned(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        with FlopCounterMode(display=False) as counter:
            pruned(images[:1])
    if not difference <= PRUNING_TOLERANCE:
        raise PruneError(
            f"the logits of the pruned network and the gated one differ by {difference:.2g} of the largest, "
            f"expected at most {PRUNING_TOLERANCE:g}; gator prunes this network wrongly, please report it"
        )
    counted, priced = counter.get_total_flops() // 2, round(macs(architecture))
    if counted != priced:
        raise PruneError(
            f"the pruned network runs {counted} multiply-adds, MacsCost says {priced}; "
            "gator's graph misses a layer, please report it"
        )
