"""Counting the MACs that run, by torch's counter, with no kernel that hides them from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count what runs meanwhile, without gradients.

    The fused kernels of attention, nn.MultiheadAttention and recurrent layers hide their products from the counter, so slower
    kernels replace them.
    """
    backends = torch.backends
    were = backends.mha.get_fastpath_enabled(), bool(backends.mkldnn.enabled), bool(backends.cudnn.enabled)
    try:
        _allow(False, False, False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        _allow(*were)


def _allow(fast_path: bool, mkldnn: bool, cudnn: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(fast_path)
    torch.backends.mkldnn.enabled = mkldnn  # type: ignore[assignment]
    torch.backends.cudnn.enabled = cudnn


def count_macs(model: nn.Module, *inputs: Tensor) -> dict[str, dict[str, int]]:
    """Return the MACs of a forward pass of the first image, by module and by the counter's op.

    Modules are those of named_modules(), each with all that runs in it; "" is the network. Runs the model in its own mode.

    >>> count_macs(nn.Sequential(nn.Linear(3, 5)), torch.zeros(2, 3))[""]
    {'addmm': 15}
    """
    batch_size = inputs[0].shape[0]
    first = [tensor[:1] if tensor.shape[:1] == (batch_size,) else tensor for tensor in inputs]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:  # the counter fails where one is passed to a module
            parameter.requires_grad_(False)
        with counting() as counter:
            model(*first)
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
    return {
        path.partition(".")[2]: {op.__name__: flops // 2 for op, flops in counts.items()}
        for path, counts in counter.get_flop_counts().items()
        if path != "Global"
    }
