"""Recording the calls of a walk that take time: their kinds, and their widths as functions of the group widths."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from gator.graph.graph import Block, ChannelGroup
from gator.graph.ops import BINARY, CHANNELS, CONVOLUTIONS, FREE, PRODUCTS, ROWS, Op, OpKind, cuts_whole_groups
from gator.graph.plans import compact
from gator.tracing.labels import STATIC, along, collapse, varying_dims
from gator.tracing.walk import Walk


def record_ops(
    walk: Walk, groups: Sequence[ChannelGroup], blocks: Sequence[Block], channel_of_label: Tensor
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
    def __init__(self, walk: Walk, sizes: Tensor, group_of_channel: Tensor, channel_of_label: Tensor) -> None:
        self.walk, self.sizes = walk, sizes
        self.group_of_channel, self.channel_of_label = group_of_channel, channel_of_label

    def op(self, node: Node, block: str | None) -> Op:
        """Return a call with its kind and widths. block: the removable branch that contains it."""
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
        if shape and shape[0] != self.walk.batch_size:  # such as windows of an image
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
        """Return (G + 1,) entries along a dimension per channel of each group, then those of no group."""
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
        if channels is None:  # a parameter: the dimensions that it is broadcast along
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
        """Return how the convolution is grouped: pruned by whole groups (their size stays), or within each (their number stays)."""
        if num_groups > 1 and cuts_whole_groups(weight[1] * num_groups, num_groups):
            return {"per_group": [weight[1], weight[0] // num_groups]}
        return {"groups": num_groups}


def _holds_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(isinstance(one, Node) for one in value))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str | list | tuple) else str(value)
