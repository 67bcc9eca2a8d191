"""time_forward: the statistics, the clocks, and that it leaves no trace."""

import contextlib
import dataclasses
import functools
import shutil
import time
import types
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from gator.errors import GatorError, LatencyError
from gator.latency import forward
from gator.latency.forward import _calls, _copies_beyond_l2, time_forward
from gator.latency.gpu_state import GpuState

IMAGE = torch.zeros(2, 3, 8, 8)
GPU = GpuState(
    driver="580.1", sm_mhz=1980, memory_mhz=2619, power_w=310.5, temperature_c=51, slowed_by=(), num_others=0
)


class StepClock:
    """A clock that stands still until a network advances it."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class Scripted(nn.Module):
    """A network whose n-th forward pass takes duration_ms(n) on the given clock."""

    def __init__(self, clock: StepClock, duration_ms: Callable[[int], float]) -> None:
        super().__init__()
        self.clock, self.duration_ms, self.num_calls = clock, duration_ms, 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now_ns += round(1e6 * self.duration_ms(self.num_calls))
        self.num_calls += 1
        return x


class Sleeper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x


class Witness(nn.Module):
    """Records what holds during its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.seen: set[tuple[bool, bool, bool, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        state = (self.training, self.dropout.training, torch.is_inference_mode_enabled(), torch.get_num_threads())
        self.seen.add(state)
        return x


def scripted(duration_ms: Callable[[int], float]) -> tuple[Scripted, StepClock]:
    clock = StepClock()
    return Scripted(clock, duration_ms), clock


def test_percentiles_are_those_of_the_repeats() -> None:
    model, clock = scripted(lambda call: call + 1)  # without a warm-up the repeats take 1, 2, ..., 11 ms
    measured = time_forward(model, IMAGE, num_repeats=11, max_warmup=0, clock_ns=clock)
    assert (measured.p10_ms, measured.median_ms, measured.p90_ms, measured.n) == (2.0, 6.0, 10.0, 11)


def test_warmup_ends_when_two_windows_agree_and_is_not_counted() -> None:
    model, clock = scripted(lambda call: 50 if call < 5 else 2)  # windows of 5: 50 ms, 2 ms, 2 ms
    measured = time_forward(model, IMAGE, num_repeats=3, clock_ns=clock)
    assert (measured.num_warmup, measured.is_warm, measured.p90_ms) == (15, True, 2.0)
    assert model.num_calls == 15 + 3


def test_warmup_that_never_settles_is_bounded_and_told() -> None:
    model, clock = scripted(lambda call: 2**call)
    measured = time_forward(model, IMAGE, num_repeats=1, max_warmup=12, clock_ns=clock)
    assert (measured.num_warmup, measured.is_warm) == (10, False)


@pytest.mark.parametrize(("num_threads", "clock"), [(1, "process_cpu"), (2, "wall")])
def test_one_thread_reads_cpu_time_and_several_the_wall_clock(num_threads: int, clock: str) -> None:
    measured = time_forward(Sleeper(), IMAGE, num_repeats=5, max_warmup=0, num_threads=num_threads)
    assert measured.clock == clock
    assert (measured.median_ms >= 20) == (clock == "wall")  # sleeping takes no CPU time


def test_runs_in_eval_and_inference_mode_on_the_pinned_threads() -> None:
    model = Witness()
    time_forward(model, IMAGE, num_repeats=2, num_threads=2)
    assert model.seen == {(False, False, True, 2)}


def test_training_flags_and_threads_come_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Conv2d(3, 4, 1))
    model[0].eval()
    threads_before = torch.get_num_threads()
    time_forward(model, IMAGE, num_repeats=1, num_threads=threads_before + 1)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert torch.get_num_threads() == threads_before


def test_flags_come_back_when_the_model_raises() -> None:
    model = nn.Linear(5, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        time_forward(model, torch.zeros(1, 4), num_threads=torch.get_num_threads() + 1)
    assert model.training


def test_measurement_names_its_circumstances() -> None:
    model = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    measured = time_forward(model, IMAGE.double(), num_repeats=1)
    conditions = measured.conditions
    assert (conditions.batch_size, measured.input_shapes, conditions.dtype) == (2, ((2, 3, 8, 8),), "float64")
    assert (conditions.layout, conditions.runtime, conditions.num_threads) == ("channels_last", "eager", 1)
    assert conditions.versions["torch"] == torch.__version__
    assert conditions.device


def test_plain_layout_is_contiguous() -> None:
    assert time_forward(nn.Conv2d(3, 4, 3), IMAGE, num_repeats=1).conditions.layout == "contiguous"


def test_a_spread_beyond_the_limit_is_noisy() -> None:
    calm, clock = scripted(lambda _: 4)
    assert not time_forward(calm, IMAGE, clock_ns=clock).is_noisy
    unsteady, clock = scripted(lambda call: 4 if call % 3 else 6)
    measured = time_forward(unsteady, IMAGE, clock_ns=clock)
    assert (measured.spread, measured.is_noisy) == (0.5, True)


def test_a_gpu_that_throttles_or_is_shared_is_noisy() -> None:
    measured = dataclasses.replace(time_forward(nn.Identity(), IMAGE, num_repeats=1), is_warm=True, p10_ms=1, p90_ms=1)
    measured = dataclasses.replace(measured, median_ms=1.0)
    idle = dataclasses.replace(measured, gpu=GPU)
    capped = dataclasses.replace(measured, gpu=dataclasses.replace(GPU, slowed_by=("power cap",)))
    shared = dataclasses.replace(measured, gpu=dataclasses.replace(GPU, num_others=1))
    assert [(one.is_throttled, one.is_noisy) for one in (idle, capped, shared)] == [
        (False, False),
        (True, True),
        (False, True),
    ]


def test_measurements_of_other_conditions_do_not_compare() -> None:
    one = time_forward(nn.Identity(), IMAGE, num_repeats=1)
    other = time_forward(nn.Identity(), IMAGE[:1].double(), num_repeats=1, num_threads=2)
    one.conditions.check_same(time_forward(nn.ReLU(), IMAGE, num_repeats=3).conditions, "a third")
    assert one.conditions.fingerprint != other.conditions.fingerprint
    with pytest.raises(
        LatencyError,
        match="dtype is float32 here but float64 in the base, batch_size is 2 here but 1 in the base, num_threads is 1 here but 2 in",
    ):
        one.conditions.check_same(other.conditions, "the base")
    in_tf32 = dataclasses.replace(one.conditions, float32="convolutions tf32, matrices tf32")
    with pytest.raises(LatencyError, match="float32 is None here but convolutions tf32, matrices tf32 in the base"):
        one.conditions.check_same(in_tf32, "the base")


def test_batchnorm_is_folded_into_a_copy() -> None:
    norm = nn.BatchNorm2d(4)
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    assert time_forward(model, IMAGE, num_repeats=2, fold_batchnorm=True).conditions.is_folded
    assert (calls, model[1]) == ([], norm)


def test_a_model_that_cannot_be_folded_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(LatencyError, match=r"torch.fx cannot follow Branching"):
        time_forward(Branching(), IMAGE, fold_batchnorm=True)


def test_several_inputs_are_passed_in_order() -> None:
    class Difference(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            assert first.sum() > second.sum()
            return first - second

    measured = time_forward(Difference(), (torch.ones(4), torch.zeros(4)), num_repeats=1)
    assert measured.input_shapes == ((4,), (4,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "graph"}, "runtime 'graph' is not one of PyTorch's; expected one of eager, compile, cuda_graph"),
        ({"runtime": "cuda_graph"}, "needs model and inputs on a CUDA device, they are on cpu"),
        ({"num_repeats": 0}, "num_repeats is 0, expected at least 1"),
        ({"num_threads": 0}, "num_threads is 0, expected at least 1"),
        ({"max_warmup": -1}, "max_warmup is -1, expected at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(LatencyError, match=message):
        time_forward(nn.Identity(), IMAGE, **settings)


def test_model_and_inputs_on_two_devices_are_refused() -> None:
    with pytest.raises(LatencyError, match="are on cpu, meta, expected one device"):
        time_forward(nn.Conv2d(3, 4, 3, device="meta"), IMAGE)


@pytest.mark.parametrize("inputs", [(), ("image",)], ids=["empty", "text"])
def test_inputs_that_are_no_tensors_are_refused(inputs: tuple) -> None:
    with pytest.raises(GatorError, match="expected a tensor or a tuple of tensors"):
        time_forward(nn.Identity(), inputs)


def test_every_network_of_one_class_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_graphs = []

    def backend(graph_module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        compiled_graphs.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for width in range(1, 11):  # after eight of one code object dynamo gives up
        time_forward(nn.Sequential(nn.Conv2d(3, width, 3)), IMAGE, runtime="compile", num_repeats=1, max_warmup=0)
    assert len(compiled_graphs) == 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compile_mode_runs_on_a_cpu() -> None:
    measured = time_forward(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGE, runtime="compile", num_repeats=3)
    assert (measured.conditions.runtime, measured.n) == ("compile", 3)


class Graph:
    """Stands in for torch.cuda.CUDAGraph: keeps the inputs that were captured, and notes what it reads in a replay."""

    replayed: ClassVar[list[float]] = []

    def capture(self, inputs: tuple[Tensor]) -> None:
        (self.input,) = inputs

    def replay(self) -> None:
        self.replayed.append(float(self.input))


@pytest.mark.parametrize(("is_part", "num_graphs"), [(False, 1), (True, 3)], ids=["network", "part"])
def test_a_part_replays_a_graph_for_each_copy_of_its_inputs(
    is_part: bool, num_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network copies what is requested into one graph's inputs; a part finds its inputs on the device."""
    graphs = []

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        graphs.append(graph)
        handle = model.register_forward_pre_hook(lambda _, inputs: graph.capture(inputs))
        yield
        handle.remove()

    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    stands_in = {"Stream": lambda: stream, "current_stream": lambda: stream, "graph": capture, "CUDAGraph": Graph}
    for name, value in (stands_in | {"stream": contextlib.nullcontext}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    model, copies = nn.Identity(), [(torch.tensor(float(number)),) for number in range(3)]
    Graph.replayed.clear()
    for call in _calls(model, copies, "cuda_graph", is_part=is_part):
        call()
    assert (len(graphs), Graph.replayed) == (num_graphs, [0.0, 1.0, 2.0])
    assert [any(graph.input is copy for (copy,) in copies) for graph in graphs] == [is_part] * num_graphs


def test_a_gpu_works_for_a_while_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def sample() -> float:
        nonlocal now_s
        now_s += 0.002
        return 2.0

    monkeypatch.setattr(forward, "time", types.SimpleNamespace(perf_counter=lambda: now_s))
    assert forward._warm_up(sample, 50, least_s=0.3) == (150 + 10, True)
    assert forward._warm_up(sample, 0, least_s=0.3) == (
        0,
        False,
    )  # single calls of a table, after a warm-up of the device


def test_conditions_of_a_gpu_name_how_float32_is_multiplied() -> None:
    """TensorFloat-32 changes the time and, in three digits, the result."""
    gpu, matrices = torch.device("cuda"), torch.backends.cuda.matmul
    before = matrices.fp32_precision
    assert forward._float32(gpu) == f"convolutions tf32, matrices {before}"  # as torch begins
    try:
        matrices.fp32_precision = "tf32"
        assert forward._float32(gpu) == "convolutions tf32, matrices tf32"
    finally:
        matrices.fp32_precision = before
    assert time_forward(nn.Identity(), IMAGE, num_repeats=1).conditions.float32 is None  # on a CPU


def test_tiny_inputs_are_copied_once_a_call_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """An L2 cache of 50 MiB holds 13 million inputs of 4 bytes."""
    properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = torch.device("cuda")
    assert len(_copies_beyond_l2((torch.zeros(1),), device, num_calls=55)) == 55
    assert len(_copies_beyond_l2((torch.zeros(2**20, 10),), device, num_calls=55)) == 3  # of 40 MiB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", ["eager", "compile", "cuda_graph"])
def test_cuda_events_time_every_runtime(runtime: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).cuda()
    measured = time_forward(model, torch.randn(8, 3, 32, 32, device="cuda"), runtime=runtime, num_repeats=20)
    assert measured.clock == "cuda_events"
    assert 0 < measured.p10_ms <= measured.median_ms <= measured.p90_ms
    assert measured.conditions.versions.keys() >= {"cuda", "cudnn"}
