"""The inputs of trace(), checked before torch.export runs, and the line of forward() at which torch.export failed."""

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gator.errors import TraceError


def checked_inputs(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the example inputs as a tuple. Raises: TraceError unless they are tensors with a batch, and `model` a module."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace() got a {type(model).__name__} as the model; expected a torch.nn.Module")
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


def line_of_forward(error: Exception) -> str:
    """Return " (model.py:14: if x.sum() > 0:)", the innermost line of a forward() outside torch that raised; "" if there is none."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.name == "forward" and not frame.filename.startswith(torch_folder):
            return f" ({frame.filename}:{frame.lineno}: {frame.line})"
    return ""
