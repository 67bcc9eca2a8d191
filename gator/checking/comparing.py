"""Comparing networks: whether their outputs agree, and the first module where their values part."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gator.gating.gated import GatedModel

TOLERANCE = 1e-8
"""Relative to the largest value, in float64: exact networks differ by less than 1e-12, rounding of badly scaled ones included."""
TOLERANCE_OF_FLOAT32 = 1e-4
"""For networks that compute some values in float32 whatever their own type."""


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of real numbers of what a network returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Watch(TorchDispatchMode):
    """Notes the first op of which a test of what it takes and returns holds."""

    op: Any = None

    def __init__(self, test: Callable[[list[Tensor], list[Tensor]], bool]) -> None:
        super().__init__()
        self.test = test

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.op is None and self.test(tensors_of(args), tensors_of(output)):
            self.op = func
        return output


@torch.no_grad()
def rounds_inside(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a network of float64 computes some values in fewer bits, as rotary embeddings and RMSNorm do in float32."""

    def rounds(given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether an op turns float64 into fewer bits."""
        return any(x.dtype == torch.float64 for x in given) and any(x.dtype != torch.float64 for x in made)

    with _Watch(rounds) as watch:
        model(*inputs)
    return watch.op is not None


def infinite_op(run: Callable[[], Any]) -> Any:
    """Return the first op in what `run` runs that makes infinite values of finite ones; None if there is none."""
    with _Watch(lambda given, made: bool(given) and is_finite(given) and not is_finite(made)) as watch:
        run()
    return watch.op


def is_finite(output: Any) -> bool:
    """Whether there is no NaN or infinity in an output."""
    return all(bool(part.isfinite().all()) for part in tensors_of(output))


def differs(found: Any, expected: Any, tolerance: float = TOLERANCE) -> str | None:
    """Return how two outputs differ, as the end of a sentence; None if they agree."""
    one, other = tensors_of(found), tensors_of(expected)
    if [x.shape for x in one] != [x.shape for x in other]:
        return f" in shape: {[tuple(x.shape) for x in one]} and {[tuple(x.shape) for x in other]}"
    for a, b in zip(one, other, strict=True):
        if not torch.equal(a, b) and not (error := float((a - b).abs().max() / b.abs().max())) <= tolerance:
            return f" by {error:.1e} of the largest output"
    return None


@torch.no_grad()
def first_parting(pruned: nn.Module, reference: nn.Module, inputs: Sequence[Tensor]) -> str:
    """Return ", first after module 'layer1.0.bn1'", the first that both networks call whose values differ; "" if there is none.

    A pruned output agrees if its channels are channels of the other output, in their order.
    """
    body = reference.network if isinstance(reference, GatedModel) else reference
    expected = _outputs(body, lambda: reference(*inputs))
    for name, found in _outputs(pruned, lambda: pruned(*inputs)).items():
        if name and not all(map(_is_sublist, found, expected.get(name, ()))):
            return f", first after module {name!r}"
    return ""


def _outputs(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """Return the outputs of all modules while `run` runs, by name in the order of their first calls."""
    outputs: dict[str, list[Tensor]] = {}
    with _hooks(model, lambda name, output: outputs.setdefault(name, [x.clone() for x in tensors_of(output)])):
        run()
    return outputs


@contextmanager
def _hooks(model: nn.Module, record: Callable[[str, Any], Any]) -> Iterator[None]:
    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Return the hook of a module. It returns None, so that the output stays what it is."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record(name, output)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_sublist(small: Tensor, large: Tensor) -> bool:
    """Whether the slices of a tensor are some of those of another one, along the one dimension in which they differ."""
    if small.dim() != large.dim():
        return True  # the module is written for other shapes, so the outputs cannot be compared
    dims = [dim for dim in range(small.dim()) if small.shape[dim] != large.shape[dim]]
    scale = TOLERANCE * float(large.abs().max())
    if not dims:
        return _are_close(small, large, scale)
    rest = iter(large.unbind(dims[0]))
    return len(dims) > 1 or all(any(_are_close(one, other, scale) for other in rest) for one in small.unbind(dims[0]))


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance).all())
