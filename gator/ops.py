"""The calls of a forward pass that take time, and each of them alone, to be timed.

    Op       one call in a network: its kind, and its widths as linear functions of the group widths
    OpKind   what two calls share when one timing holds for both, but for the widths
    OpChain  a module that runs a kind of call at given widths, several times over

What only moves a view (reshape, permute, chunk) counts as free, and so does reading a table of parameters (index); a network
that copies there pays for it in the calibration.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from gator.errors import LatencyError
from gator.labels import STATIC, along, collapse, compact, varying_dims

if TYPE_CHECKING:
    from gator.graph import Block, ChannelGroup
    from gator.tracing import Walk

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
NORMS = ("batch_norm", "layer_norm", "group_norm")
BINARY = ("add", "add_", "sub", "mul", "mul_", "div")
PRODUCTS = ("matmul", "bmm", "einsum", "scaled_dot_product_attention")
"""Of two values that both carry channels: attention, whose channels are heads."""
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
    *("detach", "dropout", "dropout_", "zero_"),
)
CHANNELS, ROWS = 0, -1
"""Stand in the shapes of an OpKind where the channels are, and where another value has as many rows as the first."""
COLD_BYTES = 8 << 20
"""A chain's weights are at least so large together: in a network no layer finds its weights in the cache of a core."""
CHAIN_LENGTHS = (2, 4)


@dataclass(frozen=True, order=True)
class OpKind:
    """A call but for its widths and the batch size: "conv2d", on (0, 56, 56), with its settings."""

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
    def has_two_widths(self) -> bool:
        """Whether inputs and outputs are cut apart from each other; else the outputs follow the inputs."""
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
    """(G + 1,) float64: channels it reads per channel of each group, then those that no group moves."""
    num_out: Tensor
    """(G + 1,) float64: the same of what it writes."""
    block: str | None
    """Block without which it does not run."""


# --- from the traced graph --------------------------------------------------------------------------------------------


def record_ops(
    walk: "Walk", groups: Sequence["ChannelGroup"], blocks: Sequence["Block"], channel_of_label: Tensor
) -> tuple[Op, ...]:
    """Return the calls that take time, in the order of the forward pass.

    channel_of_label: (num_labels,) int64, each label's channel in the concatenation of the groups; -1 for none.
    """
    sizes = torch.tensor([group.num_channels for group in groups], dtype=torch.int64)
    group_of_channel = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    recorder = _Recorder(walk, sizes, group_of_channel, channel_of_label)
    block_of = {name: block.name for block in blocks for name in (*block.nodes, block.addition)}
    return tuple(recorder.op(node, block_of.get(node.name)) for node in walk.nodes if _takes_time(node))


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def _takes_time(node: Node) -> bool:
    is_tensor = isinstance(node.meta.get("val"), Tensor)
    return node.op == "call_function" and is_tensor and _name(node) not in ("", *FREE)


class _Recorder:
    def __init__(self, walk: "Walk", sizes: Tensor, group_of_channel: Tensor, channel_of_label: Tensor) -> None:
        self.walk, self.sizes = walk, sizes
        self.group_of_channel, self.channel_of_label = group_of_channel, channel_of_label

    def op(self, node: Node, block: str | None) -> Op:
        """Return what a call takes its time by: its kind, sizes and widths. block: the removable branch it lies in."""
        name, args = _name(node), self.walk.arguments(node)
        values = list(node.all_input_nodes) or [node]
        if name in BINARY:  # a parameter may come first in a broadcast
            values.sort(key=lambda value: -math.prod(self.walk.shape(value)))
        value = args["tensors"][0] if name == "cat" else values[0]
        dim = self._channel_dim(name, value)
        num_in = self._width(value, dim)
        num_out = self._width(node, self._channel_dim(name, node))
        shape = list(self.walk.shape(value))
        if 0 <= dim < len(shape):
            shape[dim] = CHANNELS
        settings = self._settings(name, args, num_in, num_out)
        if name in PRODUCTS or (name in BINARY and isinstance(args["other"], Node)):
            settings["others"] = [self._other(other, shape) for other in values[1:]]
        if shape and shape[0] != self.walk.batch_size:  # windows of an image, for one
            settings["rows"] = shape[0] / self.walk.batch_size
        kind = OpKind(name, tuple(shape[1:]), json.dumps(settings, sort_keys=True))
        module = list((node.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0]
        is_cut_alike = not kind.has_two_widths and name not in CONVOLUTIONS
        return Op(module, kind, num_out if is_cut_alike else num_in, num_out, block)

    def _channel_dim(self, name: str, node: Any) -> int:
        ndim = len(self.walk.shape(node))
        if name in ("linear", "layer_norm"):
            return ndim - 1
        channels = self._channels(node)
        varying = [] if channels is None else varying_dims(channels)
        return varying[0] if len(varying) == 1 and name not in CONVOLUTIONS else min(1, ndim - 1)

    def _width(self, node: Any, dim: int) -> Tensor:
        """Return (G + 1,) the entries along a dimension per channel of each group, then those of no group."""
        row = torch.zeros(len(self.sizes) + 1, dtype=torch.float64)
        shape, channels = self.walk.shape(node), self._channels(node)
        line = None if channels is None else along(channels, dim)
        if line is None:
            row[-1] = shape[dim] if shape else 1
            return row
        line = line.expand(shape[dim])
        counts = torch.bincount(self.group_of_channel[line[line >= 0]], minlength=len(self.sizes))
        row[:-1] = counts.double() / self.sizes
        row[-1] = int((line < 0).sum())
        return row

    def _channels(self, node: Any) -> Tensor | None:
        """Return the channel of each entry of a value, -1 for none; stride 0 along every dimension on which it does not differ.

        The features of a head have labels of their own and are one channel.
        """
        labels = self.walk.values.get(node)
        if not isinstance(labels, Tensor):
            return None
        own = compact(labels)
        channels = self.channel_of_label[own.clamp(min=0)].where(own != STATIC, -1)
        return collapse(channels.expand(labels.shape))

    def _other(self, value: Node, first: list[int]) -> list[int]:
        """Return the shape of another value of a call with CHANNELS and ROWS in it. first: that of the first one, with CHANNELS."""
        sizes, channels = list(self.walk.shape(value)), self._channels(value)
        if channels is None:  # a parameter: what it lies beside in a broadcast
            places = [dim - len(first) + len(sizes) for dim, size in enumerate(first) if size == CHANNELS]
        else:
            places = varying_dims(channels)
        for dim in places:
            if dim >= 0 and sizes[dim] > 1:
                sizes[dim] = CHANNELS
        if sizes and sizes[0] == first[0]:
            sizes[0] = ROWS
        return sizes

    def _settings(self, name: str, args: dict[str, Any], num_in: Tensor, num_out: Tensor) -> dict[str, Any]:
        settings = {key: _plain(value) for key, value in args.items() if not _holds_node(value)}
        if name in (*CONVOLUTIONS, "linear"):
            settings["bias"] = args["bias"] is not None
        if name in CONVOLUTIONS:
            settings["kernel"] = list(self.walk.shape(args["weight"])[2:])
            settings |= self._groups(settings.pop("groups"), self.walk.shape(args["weight"]))
        if name == "group_norm":
            settings["per_group"] = self.walk.shape(args["input"])[1] // settings.pop("num_groups")
        if name == "cat":
            settings["parts"] = len(args["tensors"])
        if name in ("batch_norm", "layer_norm"):  # what their time does not depend on
            return {}
        return settings

    @staticmethod
    def _groups(num_groups: int, weight: torch.Size) -> dict[str, Any]:
        """Return how the convolution is grouped: whole groups are cut (their size stays), or each one (their number stays)."""
        from gator.rules import cuts_whole_groups  # late: rules are part of the tracing that calls this

        if num_groups > 1 and cuts_whole_groups(weight[1] * num_groups, num_groups):
            return {"per_group": [weight[1], weight[0] // num_groups]}
        return {"groups": num_groups}


def _holds_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(isinstance(one, Node) for one in value))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list | tuple) else str(value)


# --- alone, to be timed -----------------------------------------------------------------------------------------------


class OpChain(nn.Module):
    """Runs one kind of call `length` times on the same input, each time with weights of its own.

    A chain because a single call is shorter than what its timing costs. Divide its time by `length`.

    Raises: LatencyError if no such call can be made alone, by name.
    """

    def __init__(self, kind: OpKind, num_in: int, num_out: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        if kind.name not in TIMED:
            raise LatencyError(
                f"{kind}: this op is not timed alone; expected one of {', '.join(TIMED)}. Measure with --method halving, "
                f"or add the op to gator/ops.py"
            )
        shapes, self.call = _weights(kind, num_in, num_out), _caller(kind, num_in, num_out)
        num_bytes = 4 * sum(math.prod(shape) for shape in shapes)
        shortest, longest = CHAIN_LENGTHS
        self.length = max(shortest, min(longest, COLD_BYTES // max(1, num_bytes)))
        self.weights = [[torch.rand(shape, device=device, dtype=dtype) for shape in shapes] for _ in range(self.length)]

    def forward(self, *inputs: Tensor) -> None:
        """Run the calls and drop their results."""
        for weights in self.weights:
            self.call(inputs, weights)


def example_inputs(
    kind: OpKind, num_in: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return random inputs of a kind of call at a width."""
    rows = round(batch_size * kind.arguments.get("rows", 1))
    shape = (rows, *(num_in if size == CHANNELS else size for size in kind.shape))
    first = torch.rand(shape, device=device, dtype=dtype)
    if kind.name == "cat":
        return tuple(part.contiguous() for part in first.tensor_split(kind.arguments["parts"], dim=1))
    place = {CHANNELS: num_in, ROWS: rows}
    others = [[place.get(size, size) for size in sizes] for sizes in kind.arguments.get("others", ())]
    return first, *(torch.rand(sizes, device=device, dtype=dtype) for sizes in others)


def _weights(kind: OpKind, num_in: int, num_out: int) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters and statistics of one call."""
    arguments = kind.arguments
    if kind.name == "linear":
        return [(num_out, num_in)] + [(num_out,)] * arguments["bias"]
    if kind.name in CONVOLUTIONS:
        per_group = arguments["per_group"][0] if "per_group" in arguments else num_in // arguments["groups"]
        return [(num_out, per_group, *arguments["kernel"])] + [(num_out,)] * arguments["bias"]
    if kind.name == "batch_norm":
        return [(num_in,)] * 4
    return [(num_in,)] * 2 if kind.name in NORMS else []


def _caller(kind: OpKind, num_in: int, num_out: int) -> Callable[[Sequence[Tensor], list[Tensor]], Any]:
    """Return call(inputs, weights)."""
    own = ("bias", "kernel", "per_group", "rows", "others", "parts", "equation")
    settings = {name: value for name, value in kind.arguments.items() if name not in own}
    op = getattr(torch.ops.aten, kind.name)
    if kind.name in CONVOLUTIONS:
        per_group = kind.arguments.get("per_group")
        groups = num_in // per_group[0] if per_group else settings["groups"]
        settings["groups"] = groups
        return lambda inputs, weights: op(inputs[0], *weights, **settings)
    if kind.name == "linear":
        return lambda inputs, weights: op(inputs[0], *weights)
    if kind.name == "batch_norm":
        return lambda inputs, weights: op(inputs[0], *weights, False, 0.1, 1e-5, torch.backends.cudnn.enabled)
    if kind.name == "layer_norm":
        return lambda inputs, weights: op(inputs[0], [num_in], *weights)
    if kind.name == "group_norm":
        num_groups = max(1, num_in // kind.arguments["per_group"])
        return lambda inputs, weights: op(inputs[0], num_groups, *weights)
    if kind.name == "cat":
        return lambda inputs, weights: op(list(inputs), 1)
    if kind.name == "einsum":
        return lambda inputs, weights: op(kind.arguments["equation"], list(inputs))
    return lambda inputs, weights: op(*inputs, **settings)
