"""The inputs of trace(), checked before torch.export runs, and the line of forward() at which torch.export failed."""

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gator.errors import TraceError

_QUANTISED = (
    *("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat"),
    *("torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer"),
)
"""What the names of modules with layers for quantisation begin with."""


def checked_inputs(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the example inputs as a tuple. Raises: TraceError unless they are tensors with a batch, and `model` a module."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace() got a {type(model).__name__} as the model; expected a torch.nn.Module")
    _check_network(model)
    inputs = tuple(example_inputs) if isinstance(example_inputs, Sequence) else (example_inputs,)
    if not inputs:
        raise TraceError(
            "trace() got no example inputs; expected what forward() takes, such as torch.zeros(1, 3, 224, 224)"
        )
    for value in inputs:
        if not isinstance(value, Tensor):
            raise TraceError(
                f"an example input is of type {type(value).__name__}; expected a tensor, or a sequence of the tensors that forward() "
                f"takes, such as torch.zeros(1, 3, 224, 224)"
            )
        if value.dim() == 0 or len(value) == 0:
            raise TraceError(
                f"an example input has shape {tuple(value.shape)}; expected a batch of one at least, as in (1, 3, 224, 224)"
            )
    return inputs


def zero_inputs(model: nn.Module, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> list[Tensor]:
    """Return example inputs of zeros on the network's device, those of floating point in the dtype of its parameters."""
    like = next(model.parameters(), torch.empty(0))
    known = [getattr(torch, name) for name in dtypes]
    own = [like.dtype if dtype.is_floating_point else dtype for dtype in known]
    return [torch.zeros(*shape, dtype=dtype, device=like.device) for shape, dtype in zip(shapes, own, strict=True)]


def _check_network(model: nn.Module) -> None:
    """Raise TraceError for a network whose layers are not those that trace() follows, which torch.export would not say so."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(f"{path!r} is a TorchScript module; expected the torch.nn.Module that it was made of")
        if type(module).__module__.startswith(_QUANTISED):
            raise TraceError(
                f"{path!r} is a {type(module).__name__} of {type(module).__module__}, made or prepared for quantisation; expected "
                f"a network in floating point: prune first, quantise the pruned network"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TraceError(f"{name!r} has no shape yet; run the network once on an example before trace()")


def line_of_forward(error: Exception) -> str:
    """Return " (model.py:14: if x.sum() > 0:)", the innermost line of a forward() outside torch that raised; "" if there is none."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name == "forward" and not frame.filename.startswith(torch_folder):
            return f" ({frame.filename}:{frame.lineno}: {frame.line})"
    return ""
