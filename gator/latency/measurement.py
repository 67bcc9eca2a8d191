"""The latency of a network, and the conditions under which it was measured."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal, Self

from gator.errors import LatencyError
from gator.latency.gpu_state import GpuState

Runtime = Literal["eager", "compile", "cuda_graph", "onnxruntime", "tensorrt"]
"""eager, compile and cuda_graph are PyTorch's, and time_forward times them. Others run a file: time_call times them."""
LARGEST_SPREAD = 0.15
"""(p90 - p10) / median above which a measurement counts as noisy."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a latency depends on besides the network. Latencies compare when these are equal."""

    device: str
    """Name of the processor or the GPU."""
    device_type: str
    """cpu or cuda."""
    driver: str | None
    """Of the GPU."""
    dtype: str
    """Of the first input, as "float32"."""
    layout: str
    """channels_last if an input or a parameter has that memory format, else contiguous."""
    runtime: Runtime
    """What runs the network."""
    batch_size: int
    """First dimension of the first input."""
    num_threads: int
    """Threads of PyTorch's CPU kernels during the measurement."""
    is_folded: bool
    """Whether batch normalisation was folded into the convolutions."""
    allocator: str
    """The environment's settings for malloc, empty for the defaults, with which a forward pass on a CPU pays for page faults."""
    versions: dict[str, str]
    """torch, and on a GPU cuda and cudnn."""
    float32: str | None = None
    """On a GPU how float32 is multiplied, as "convolutions tf32, matrices none": tf32 rounds to three digits, ieee and none do not."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits, equal for equal conditions."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def check_same(self, other: "Conditions", whose: str) -> None:
        """Raise LatencyError, naming both values of all that differs, unless the other conditions are the same."""
        own, others = dataclasses.asdict(self), dataclasses.asdict(other)
        different = [
            f"{name} is {own[name]} here but {others[name]} in {whose}" for name in own if own[name] != others[name]
        ]
        if different:
            raise LatencyError(
                f"cannot compare latencies: {', '.join(different)}; measure both under the same conditions"
            )


@dataclass(frozen=True, kw_only=True)
class LatencyMeasurement:
    """The time of one forward pass over n repeats, and the conditions that it holds for."""

    conditions: Conditions
    """What another measurement must share to compare with this one."""
    median_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    """Timed repeats."""
    num_warmup: int
    """Untimed calls before them."""
    is_warm: bool
    """Whether the warm-up settled before it reached its bound."""
    clock: str
    """process_cpu (CPU time of the process), wall, cuda_events, or custom."""
    input_shapes: tuple[tuple[int, ...], ...]
    gpu: GpuState | None
    """What the driver reports about the GPU; None on a CPU, and without NVML."""
    time: str
    """When the measurement ended: ISO 8601, UTC."""

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.p90_ms - self.p10_ms) / self.median_ms if self.median_ms else 0.0

    @property
    def is_throttled(self) -> bool:
        """Whether the GPU held its clocks back: heat, power, or a cap."""
        return self.gpu is not None and bool(self.gpu.slowed_by)

    @property
    def is_disturbed(self) -> bool:
        """Whether the driver of the GPU reports another process on it, or held-back clocks."""
        return self.is_throttled or (self.gpu is not None and self.gpu.num_others > 0)

    @property
    def is_noisy(self) -> bool:
        """Whether the measurement was disturbed: it did not settle, its repeats differ by much, or the driver reports it."""
        return not self.is_warm or self.spread > LARGEST_SPREAD or self.is_disturbed

    def divided(self, count: int) -> Self:
        """Return the time of one of `count` equal calls that were measured together."""
        times_ms = {name: getattr(self, name) / count for name in ("median_ms", "p10_ms", "p90_ms")}
        return dataclasses.replace(self, **times_ms)
