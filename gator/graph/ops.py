"""The calls of a forward pass that take time, as data: kinds of calls, and calls with their widths."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
NORMS = ("batch_norm", "layer_norm", "group_norm")
BINARY = ("add", "add_", "sub", "mul", "mul_", "div")
PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
"""Products of values, some of which carry channels: of attention, whose channels are heads, all."""
POINTWISE = (
    *("relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu", "gelu", "silu", "silu_", "hardswish", "hardswish_"),
    *("tanh", "sigmoid", "sigmoid_", "hardsigmoid", "exp", "neg", "clone", "clamp", "clamp_min"),
    *("softmax", "linalg_vector_norm", "pad", "roll"),
)
POOLING = (
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "mean"),
)
TIMED = (*CONVOLUTIONS, "linear", *NORMS, *BINARY, *PRODUCTS, *POINTWISE, *POOLING, "cat")
FREE = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "squeeze", "unsqueeze", "expand"),
    *("expand_as", "slice", "narrow", "select", "index", "chunk", "split", "split_with_sizes", "contiguous", "alias"),
    *(
        "unbind",
        "tensor_split",
        "unsafe_chunk",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "broadcast_tensors",
        "meshgrid",
    ),
    *("detach", "dropout", "dropout_", "zero_"),
)
CHANNELS, ROWS = 0, -1
"""In the shapes of an OpKind: the place of the channels, and of as many rows as the first value has."""


@dataclass(frozen=True, order=True)
class OpKind:
    """A call without its widths and its batch size: "conv2d", on (0, 56, 56), with its settings."""

    name: str
    """ATen's: conv2d, linear, batch_norm, relu_, add, max_pool2d, ..."""
    shape: tuple[int, ...]
    """Of the first input without the batch; 0 stands for the channels."""
    settings: str
    """Every other argument as JSON: kernel, stride, padding, whether there is a bias, ..."""

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The settings as values."""
        values: dict[str, Any] = json.loads(self.settings)
        return values

    @property
    def is_layer(self) -> bool:
        """Whether this is a convolution or a linear layer."""
        return self.name in (*CONVOLUTIONS, "linear")

    @property
    def has_two_widths(self) -> bool:
        """Whether inputs and outputs are pruned independently; else the outputs follow the inputs."""
        return self.name == "linear" or (self.name in CONVOLUTIONS and "per_group" not in self.arguments)

    def __str__(self) -> str:
        """Return "conv2d on (C, 56, 56) with kernel [3, 3], stride [1, 1], ..."."""
        shape = ", ".join("C" if size == CHANNELS else str(size) for size in self.shape)
        settings = ", ".join(f"{name} {value}" for name, value in self.arguments.items())
        return f"{self.name} on ({shape})" + (f" with {settings}" if settings else "")


@dataclass(frozen=True, eq=False)
class Op:
    """One call in the eval-mode forward pass."""

    module: str
    kind: OpKind
    num_in: Tensor
    """(G + 1,) float64: channels read per channel of each group, then those outside all groups."""
    num_out: Tensor
    """(G + 1,) float64: the same for channels written."""
    block: str | None
    """Block without which it does not run."""


def cuts_whole_groups(num_in: int, num_groups: int) -> bool:
    """Whether a grouped convolution is pruned by whole groups, as a depthwise one is; else at the same places in each group."""
    return num_groups >= num_in // num_groups
