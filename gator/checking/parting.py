"""Where two networks part: the first module whose output in one is not a part of its output in the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gator.gating.gated import GatedModel

TOLERANCE = 1e-8


@torch.no_grad()
def first_parting(pruned: nn.Module, reference: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Return ", first after module 'layer1.0.bn1'", the first that both networks call whose values differ; "" if none does.

    A pruned output agrees if its channels are channels of the other output, in their order.
    """
    outputs: dict[str, Any] = {}
    with _recorded(reference.network if isinstance(reference, GatedModel) else reference, outputs):
        reference(*inputs)
    expected, outputs = outputs, {}
    with _recorded(pruned, outputs):
        pruned(*inputs)
    for name, found in outputs.items():
        if name and name in expected and not _is_part(found, expected[name]):
            return f", first after module {name!r}"
    return ""


@contextmanager
def _recorded(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    def recorder(name: str) -> Callable[..., None]:
        """Return the hook of a module, which keeps the first output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, [x.clone() for x in tree_leaves(output) if isinstance(x, Tensor)])

        return hook

    handles = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_part(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(_is_sublist(small, large) for small, large in zip(found, expected, strict=False))


def _is_sublist(small: Tensor, large: Tensor) -> bool:
    """Whether the slices of a tensor are some of those of another one, along the one dimension in which they differ."""
    dims = [dim for dim, sizes in enumerate(zip(small.shape, large.shape, strict=False)) if sizes[0] != sizes[1]]
    if small.dim() != large.dim() or len(dims) > 1:
        return True  # more than this comparison can know
    scale = TOLERANCE * float(large.abs().max()) if large.numel() else 0.0
    if not dims:
        return _are_close(small, large, scale)
    rest = iter(large.unbind(dims[0]))
    return all(any(_are_close(one, other, scale) for other in rest) for one in small.unbind(dims[0]))


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance).all()) if one.is_floating_point() else torch.equal(one, other)
