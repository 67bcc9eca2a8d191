"""Timing one forward pass: warm-up, repeats, and the conditions of the measurement.

On a CPU with one thread the clock is the CPU time of the process, which other programs on the machine hardly change. With
more threads that clock adds up the time of each of them, so the wall clock is read instead. On a GPU CUDA events bracket
every repeat.
"""

import datetime
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from gator.errors import LatencyError
from gator.latency.gpu_state import GpuState, GpuWatch
from gator.latency.measurement import Conditions, LatencyMeasurement, Runtime

Sampler = Callable[[], float]  # one timed call; returns its milliseconds
TORCH_RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "cuda_graph")
WARMUP_WINDOW = 5  # calls whose median is compared with that of the calls before
WARMUP_TOLERANCE = 0.05  # largest relative change between two windows that counts as stable
WARMUP_S = 0.3  # least time of a warm-up on a GPU, whose clocks take tens of milliseconds to rise
ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")


def time_forward(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    runtime: Runtime = "eager",
    num_repeats: int = 100,
    max_warmup: int = 50,
    num_threads: int = 1,
    fold_batchnorm: bool = False,
    is_part: bool = False,
    clock_ns: Callable[[], int] | None = None,
) -> LatencyMeasurement:
    """Return the latency of model(*example_inputs) in eval mode, without gradients.

    Warms up until the medians of two windows of five calls agree within 5 %, max_warmup calls at most, on a GPU for WARMUP_S
    at least; then times num_repeats calls. Restores each module's training flag and the process's thread count. On a GPU the
    inputs rotate over copies that together exceed the L2 cache; a CUDA graph pays for the copy into its fixed inputs, as a
    server would, unless is_part: a part of a network finds its inputs on the device, so each copy gets a graph of its own.
    Runtime "compile" compiles in each call, unless the model is Compiled already. fold_batchnorm times a copy whose batch
    normalisation is folded into its convolutions, as a deployed network has it. clock_ns replaces the clock of a CPU
    (nanoseconds, any origin).

    >>> ticks_ns = iter(range(0, 10**9, 2_000_000))    # a clock that is read twice per call, 2 ms apart
    >>> time_forward(nn.ReLU(), torch.zeros(1, 3, 8, 8), clock_ns=lambda: next(ticks_ns)).median_ms
    2.0

    Raises: LatencyError if the runtime is unknown or not for this device, a count is out of range, the model and the inputs
    are on different devices, or torch.fx cannot follow a model that is to be folded. Errors of the model itself pass through.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    device = _shared_device(model, inputs)
    _check_runtime(runtime, device, clock_ns)
    _check_counts(num_repeats=(num_repeats, 1), num_threads=(num_threads, 1), max_warmup=(max_warmup, 0))

    watch = GpuWatch(device) if device.type == "cuda" else None
    with _measuring(model, num_threads):
        model = _folded(model) if fold_batchnorm else model
        if watch is not None:
            clock = "cuda_events"
            copies = _copies_beyond_l2(inputs, device, max_warmup + num_repeats)
            with torch.cuda.device(device):
                calls = _calls(model, copies, runtime, is_part=is_part)
            sample = _cuda_sampler(calls, device, watch)
        else:
            clock, clock_ns = _cpu_clock(num_threads, clock_ns)
            (call,) = _calls(model, [inputs], runtime, is_part=is_part)
            sample = _cpu_sampler(call, clock_ns)
        times_ms, num_warmup, is_warm = _timed(sample, num_repeats, max_warmup, 0.0 if watch is None else WARMUP_S)

    gpu = None if watch is None else watch.state()
    conditions = conditions_on(
        device,
        driver=None if gpu is None else gpu.driver,
        dtype=str(inputs[0].dtype).removeprefix("torch."),
        layout=_layout((*inputs, *model.parameters())),
        runtime=runtime,
        batch_size=inputs[0].shape[0] if inputs[0].ndim else 1,
        num_threads=num_threads,
        is_folded=fold_batchnorm,
    )
    shapes = tuple(tuple(tensor.shape) for tensor in inputs)
    return _measurement(conditions, times_ms, num_warmup, is_warm, clock, shapes, gpu)


def time_call(
    call: Callable[[], object],
    conditions: Conditions,
    *,
    input_shapes: tuple[tuple[int, ...], ...],
    num_repeats: int = 100,
    max_warmup: int = 50,
    clock_ns: Callable[[], int] | None = None,
) -> LatencyMeasurement:
    """Return the latency of a call that is ready to run, such as that of another runtime's session, timed as time_forward does.

    call: returns when its result is there. conditions: those that the call runs under; with a device other than a CPU the wall
    clock is read.

    Raises: LatencyError if a count is out of range. Errors of the call pass through.
    """
    _check_counts(num_repeats=(num_repeats, 1), max_warmup=(max_warmup, 0))
    num_cpu_threads = conditions.num_threads if conditions.device_type == "cpu" else 0
    clock, clock_ns = _cpu_clock(num_cpu_threads, clock_ns)
    least_s = 0.0 if conditions.device_type == "cpu" else WARMUP_S
    times_ms, num_warmup, is_warm = _timed(_cpu_sampler(call, clock_ns), num_repeats, max_warmup, least_s)
    return _measurement(conditions, times_ms, num_warmup, is_warm, clock, input_shapes, None)


def _timed(sample: Sampler, num_repeats: int, max_warmup: int, least_s: float) -> tuple[list[float], int, bool]:
    """Return the milliseconds of the repeats, how many calls warmed up, and whether they settled."""
    num_warmup, is_warm = _warm_up(sample, max_warmup, least_s)
    return [sample() for _ in range(num_repeats)], num_warmup, is_warm


def _measurement(
    conditions: Conditions,
    times_ms: list[float],
    num_warmup: int,
    is_warm: bool,
    clock: str,
    input_shapes: tuple[tuple[int, ...], ...],
    gpu: GpuState | None,
) -> LatencyMeasurement:
    p10_ms, median_ms, p90_ms = _percentiles(times_ms)
    return LatencyMeasurement(
        conditions=conditions,
        median_ms=median_ms,
        p10_ms=p10_ms,
        p90_ms=p90_ms,
        n=len(times_ms),
        num_warmup=num_warmup,
        is_warm=is_warm,
        clock=clock,
        input_shapes=input_shapes,
        gpu=gpu,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_runtime(runtime: str, device: torch.device, clock_ns: Callable[[], int] | None) -> None:
    if runtime not in TORCH_RUNTIMES:
        raise LatencyError(f"runtime {runtime!r} is not one of PyTorch's; expected one of {', '.join(TORCH_RUNTIMES)}")
    if device.type not in ("cpu", "cuda"):
        raise LatencyError(f"the model is on {device}, which has no known clock; move model and inputs to cpu or cuda")
    if runtime == "cuda_graph" and device.type != "cuda":
        raise LatencyError(
            f"runtime 'cuda_graph' needs model and inputs on a CUDA device, they are on {device}; use 'eager' or 'compile'"
        )
    if clock_ns is not None and device.type != "cpu":
        raise LatencyError(f"clock_ns replaces the clock of a CPU only; on {device} CUDA events are read")


def _check_counts(**counts: tuple[int, int]) -> None:
    """Raise LatencyError for a (value, least value) that is too small."""
    for name, (value, least) in counts.items():
        if value < least:
            raise LatencyError(f"{name} is {value}, expected at least {least}")


def _shared_device(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.device:
    """Return the one device that holds the inputs, the parameters and the buffers."""
    if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
        found = ", ".join(type(value).__name__ for value in inputs) or "nothing"
        raise LatencyError(f"example_inputs holds {found}, expected a tensor or a tuple of tensors")
    devices = {tensor.device for tensor in (*inputs, *model.parameters(), *model.buffers())}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise LatencyError(f"model and example_inputs are on {names}, expected one device; move both with .to(device)")
    return devices.pop()


@contextmanager
def _measuring(model: nn.Module, num_threads: int) -> Iterator[None]:
    """Set eval mode, inference mode and the thread count; restore the flags and the count afterwards."""
    was_training = {module: module.training for module in model.modules()}
    threads_before = torch.get_num_threads()
    model.eval()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads_before)
        for module, training in was_training.items():
            module.training = training


def _folded(model: nn.Module) -> nn.Module:
    """Return a copy with each batch normalisation folded into the convolution before it."""
    try:
        return fuse(model)
    except Exception as error:  # torch.fx raises from many families
        raise LatencyError(
            f"torch.fx cannot follow {type(model).__name__}, so its batch normalisation cannot be folded: {error}; "
            f"time it as it is, with fold_batchnorm=False"
        ) from error


# --- one timed call ---------------------------------------------------------------------------------------------------


def _calls(
    model: nn.Module, copies: Sequence[tuple[Tensor, ...]], runtime: Runtime, *, is_part: bool
) -> list[Callable[[], object]]:
    """Return what the repeats call, in turns: one for each copy of the inputs."""
    if runtime == "cuda_graph" and is_part:
        return [_graph(model, inputs).replay for inputs in copies]
    call: Callable[..., object] = model
    if runtime == "cuda_graph":
        call = _graphed(model, copies[0])
    elif runtime == "compile" and not isinstance(model, Compiled):
        call = Compiled(model)
    return [partial(call, *inputs) for inputs in copies]


class Compiled(nn.Module):
    """A network under torch.compile, compiled at its first call and not again in later timings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def call(*inputs: Tensor) -> object:
            return model(*inputs)

        # torch counts the compilations of one code object, tries those before in each call, and continues in eager mode after
        # eight: the ninth network of a search would be timed uncompiled. So each network gets a code object of its own.
        call.__code__ = call.__code__.replace(co_name=f"call_{id(self)}")
        self._call = torch.compile(call, dynamic=False)

    def forward(self, *inputs: Tensor) -> object:
        """Return the network's output."""
        return self._call(*inputs)


def _cpu_clock(num_threads: int, clock_ns: Callable[[], int] | None) -> tuple[str, Callable[[], int]]:
    if clock_ns is not None:
        return "custom", clock_ns
    return ("process_cpu", time.process_time_ns) if num_threads == 1 else ("wall", time.perf_counter_ns)


def _cpu_sampler(call: Callable[[], object], clock_ns: Callable[[], int]) -> Sampler:
    def sample() -> float:
        start = clock_ns()
        call()
        return (clock_ns() - start) / 1e6

    return sample


def _cuda_sampler(calls: Sequence[Callable[[], object]], device: torch.device, watch: GpuWatch) -> Sampler:
    rotation = itertools.cycle(calls)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        """Return the milliseconds of one call between two CUDA events."""
        with torch.cuda.device(device):
            call = next(rotation)
            torch.cuda.synchronize()  # an idle device at the start: the time of one request, not of a full queue
            start.record()
            call()
            end.record()
            watch.look()  # while the kernels run
            end.synchronize()
        return start.elapsed_time(end)

    return sample


def _copies_beyond_l2(inputs: tuple[Tensor, ...], device: torch.device, num_calls: int) -> list[tuple[Tensor, ...]]:
    """Return enough copies of the inputs that reading all of them evicts the first from the L2 cache, at most one a call."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    input_bytes = max(1, sum(tensor.nbytes for tensor in inputs))
    return [tuple(tensor.clone() for tensor in inputs) for _ in range(min(cache_bytes // input_bytes + 2, num_calls))]


def _graphed(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., object]:
    """Return a function that copies its arguments into fixed inputs and replays the model's kernels on them."""
    fixed = tuple(tensor.clone() for tensor in inputs)
    graph = _graph(model, fixed)

    def replay(*arguments: Tensor) -> None:
        for target, source in zip(fixed, arguments, strict=True):
            target.copy_(source)
        graph.replay()

    return replay


def _graph(model: nn.Module, fixed: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
    """Return the model's kernels on these inputs, captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries allocate their workspaces on first calls, which must not happen while capturing
            model(*fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*fixed)
    return graph


# --- many timed calls -------------------------------------------------------------------------------------------------


def _warm_up(sample: Sampler, max_warmup: int, least_s: float) -> tuple[int, bool]:
    """Call for least_s, unless max_warmup is 0, then until two windows agree.

    Returns the number of calls, and whether two windows agreed.
    """
    previous_ms, num_calls = float("inf"), 0
    until_s = time.perf_counter() + least_s
    while max_warmup and time.perf_counter() < until_s:
        sample()
        num_calls += 1
    max_warmup += num_calls
    while num_calls + WARMUP_WINDOW <= max_warmup:
        window_ms = statistics.median(sample() for _ in range(WARMUP_WINDOW))
        num_calls += WARMUP_WINDOW
        if abs(window_ms - previous_ms) <= WARMUP_TOLERANCE * window_ms:
            return num_calls, True
        previous_ms = window_ms
    return num_calls, False


def _percentiles(times_ms: list[float]) -> tuple[float, float, float]:
    """Return the 10th, 50th and 90th percentile, linear between neighbours."""
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10_ms, median_ms, p90_ms = torch.tensor(times_ms, dtype=torch.float64).quantile(levels).tolist()
    return p10_ms, median_ms, p90_ms


# --- conditions -------------------------------------------------------------------------------------------------------


def _layout(tensors: Iterable[Tensor]) -> str:
    has_channels_last = any(
        tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in tensors
    )
    return "channels_last" if has_channels_last else "contiguous"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    # platform.processor() is empty or just "x86_64" on Linux.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def conditions_on(device: torch.device, *, versions: Mapping[str, str] | None = None, **settings: Any) -> Conditions:
    """Return the conditions of a measurement on this device, in this process.

    settings: the fields of Conditions that the device and the process do not decide; driver is None by default.
    versions: of libraries other than PyTorch.
    """
    return Conditions(
        device=device_name(device),
        device_type=device.type,
        allocator=" ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR_VARIABLES if os.environ.get(name)),
        versions=_versions(device) | dict(versions or {}),
        **{"driver": None, "float32": _float32(device), **settings},
    )


def _float32(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    backends: Any = torch.backends
    convolutions, matrices = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    return f"convolutions {convolutions}, matrices {matrices}"


def _versions(device: torch.device) -> dict[str, str]:
    on_gpu = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"torch": torch.__version__} | (on_gpu if device.type == "cuda" else {})
