"""Recording the calls of a walk that take time: their kinds, and their widths as functions of the group widths."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from gator.graph.graph import Block
from gator.graph.ops import BINARY, CHANNELS, CONVOLUTIONS, FREE, PRODUCTS, ROWS, Op, OpKind, cuts_whole_groups
from gator.tracing.labels import varying_dims
from gator.tracing.program import module_path
from gator.tracing.walk import Walk
from gator.tracing.widths import Widths


def record_ops(walk: Walk, widths: Widths, blocks: Sequence[Block]) -> tuple[Op, ...]:
    """Return the calls that take time, in the order of the forward pass."""
    recorder = _Recorder(walk, widths)
    block_of = {name: block.name for block in blocks for name in (*block.nodes, block.addition)}
    return tuple(recorder.op(node, block_of.get(node.name)) for node in walk.nodes if _takes_time(node))


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def _takes_time(node: Node) -> bool:
    val = node.meta.get("val")
    first = val[0] if isinstance(val, list | tuple) and val else val  # such as a recurrent layer's outputs and states
    return node.op == "call_function" and isinstance(first, Tensor) and _name(node) not in ("", *FREE)


class _Recorder:
    def __init__(self, walk: Walk, widths: Widths) -> None:
        self.walk, self.widths = walk, widths

    def op(self, node: Node, block: str | None) -> Op:
        """Return a call with its kind and widths. block: the removable branch that contains it."""
        name, args = _name(node), self.walk.arguments(node)
        values = self._values(name, node)
        value = args["tensors"][0] if name == "cat" else values[0]
        carrier = next(filter(self._carries, values), value) if name in PRODUCTS else value
        dim = self._channel_dim(name, carrier)
        num_in = num_out = self.widths.along(carrier, dim)
        if name not in PRODUCTS and isinstance(node.meta["val"], Tensor):
            num_out = self.widths.along(node, self._channel_dim(name, node))
        shape = list(self.walk.shape(value))
        if 0 <= dim < len(shape) and (name not in PRODUCTS or self._carries(value)):
            shape[dim] = CHANNELS
        settings = self._settings(name, args, num_in, num_out)
        if name in PRODUCTS or (name in BINARY and isinstance(args["other"], Node)):
            settings["others"] = [self._other(other, shape, is_broadcast=name in BINARY) for other in values[1:]]
        if shape and shape[0] != self.walk.batch_size:  # such as windows of an image
            settings["rows"] = shape[0] / self.walk.batch_size
        kind = OpKind(name, tuple(shape[1:]), json.dumps(settings, sort_keys=True))
        is_cut_alike = not kind.has_two_widths and name not in CONVOLUTIONS
        return Op(module_path(node), kind, num_out if is_cut_alike else num_in, num_out, block)

    def _values(self, name: str, node: Node) -> list[Node]:
        """Return the values that a call reads, the one that states its shape first; the call itself if it reads none."""
        if name in PRODUCTS:  # a value may be there twice
            return [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]
        values = list(node.all_input_nodes) or [node]
        if name in BINARY:  # a parameter may come first in a broadcast
            values.sort(key=lambda value: -math.prod(self.walk.shape(value)))
        return values

    def _channel_dim(self, name: str, node: Any) -> int:
        ndim = len(self.walk.shape(node))
        if name in ("linear", "layer_norm"):
            return ndim - 1
        channels = self.widths.channels(node)
        varying = [] if channels is None else varying_dims(channels)
        return varying[0] if len(varying) == 1 and name not in CONVOLUTIONS else min(1, ndim - 1)

    def _carries(self, value: Node) -> bool:
        channels = self.widths.channels(value)
        return channels is not None and bool(varying_dims(channels))

    def _other(self, value: Node, first: list[int], is_broadcast: bool) -> list[int]:
        """Return the shape of another value of a call with CHANNELS and ROWS in it. first: that of the first one, with CHANNELS."""
        sizes, channels = list(self.walk.shape(value)), self.widths.channels(value)
        if channels is not None:
            places = varying_dims(channels)
        elif is_broadcast:  # a parameter: the dimensions that it is broadcast along
            places = [dim - len(first) + len(sizes) for dim, size in enumerate(first) if size == CHANNELS]
        else:
            places = []
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
