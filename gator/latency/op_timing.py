"""Timing a kind of call alone, at given widths, to fill a latency table.

Ops that only move a view (reshape, permute, chunk) count as free, and so does reading a table of parameters (index); a
network that copies there pays for it in the calibration.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gator.errors import LatencyError
from gator.graph.graph import ChannelGraph
from gator.graph.ops import CHANNELS, CONVOLUTIONS, NORMS, ROWS, TIMED, OpKind
from gator.latency.forward import time_forward
from gator.latency.measurement import Conditions, LatencyMeasurement
from gator.latency.table import LatencyTable, OpTime, Point

COLD_BYTES = 8 << 20
"""Least total size of a chain's weights: in a network no layer finds its weights in the cache of a core."""
CHAIN_LENGTHS = (2, 4)
REPEATS_PER_TURN = 5
PORTION = 40
"""Points that are timed and stored together."""


# --- one kind of call as a module -------------------------------------------------------------------------------------


class OpChain(nn.Module):
    """Runs one kind of call `length` times on the same input, each time with its own weights.

    A chain, because a single call takes less time than its timing. Divide its time by `length`.

    Raises: LatencyError, naming the kind, if it cannot be timed alone.
    """

    def __init__(self, kind: OpKind, num_in: int, num_out: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        if kind.name not in TIMED:
            raise LatencyError(
                f"{kind}: this op cannot be timed alone; expected one of {', '.join(TIMED)}. Add the op to gator/graph/ops.py"
            )
        shapes, self.call = weight_shapes(kind, num_in, num_out), _caller(kind, num_in, num_out)
        self.length = chain_length(shapes)
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


def chain_length(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return how many calls with weights of these shapes are timed together."""
    shortest, longest = CHAIN_LENGTHS
    return max(shortest, min(longest, COLD_BYTES // max(1, 4 * sum(math.prod(shape) for shape in shapes))))


def weight_shapes(kind: OpKind, num_in: int, num_out: int) -> list[tuple[int, ...]]:
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


# --- measuring --------------------------------------------------------------------------------------------------------


def time_op(point: Point, conditions: Conditions, num_repeats: int = REPEATS_PER_TURN) -> LatencyMeasurement:
    """Return the time of one call at a point, on the device and under the settings of the conditions.

    Raises: LatencyError if this kind of call cannot be timed alone.
    """
    kind, num_in, num_out = point
    device, dtype = torch.device(conditions.device_type), getattr(torch, conditions.dtype)
    with torch.random.fork_rng(devices=[]):
        chain = OpChain(kind, num_in, num_out, device, dtype)
        inputs = example_inputs(kind, num_in, conditions.batch_size, device, dtype)
    if conditions.layout == "channels_last":
        chain.weights = [[_channels_last(weight) for weight in weights] for weights in chain.weights]
        inputs = tuple(_channels_last(tensor) for tensor in inputs)
    measured = time_forward(
        chain,
        inputs,
        runtime=conditions.runtime,
        num_repeats=num_repeats,
        max_warmup=0,  # the median over the repeats ignores the first, and the fastest turn ignores slow turns
        num_threads=conditions.num_threads,
        is_part=True,
    )
    return measured.divided(chain.length)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def time_points(points: Iterable[Point], timer: Callable[[Point], LatencyMeasurement]) -> Iterator[OpTime]:
    """Yield the time of each point, over one turn."""
    for kind, num_in, num_out in points:
        measured = timer((kind, num_in, num_out))
        times_ms = {name: getattr(measured, name) for name in ("median_ms", "p10_ms", "p90_ms")}
        yield OpTime(kind=kind, num_in=num_in, num_out=num_out, n=measured.n, noisy=True, **times_ms)


def completed(
    table: LatencyTable,
    graph: ChannelGraph,
    measure: Callable[[Sequence[Point]], Iterable[OpTime]],
    portion: int = PORTION,
) -> Iterator[LatencyTable]:
    """Yield the table with one more turn of up to `portion` points each time, until it has all of the network."""
    while due := table.due(graph):
        for begin in range(0, len(due), portion):
            table = table.with_ops(measure(due[begin : begin + portion]))
            yield table
