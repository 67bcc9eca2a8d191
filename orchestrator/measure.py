"""How fast a network is: one interface, three clocks; and the verb `measure`, which builds latency tables.

    python -m orchestrator.measure --model resnet50 --batch 1,32 --dtype fp16 --mode cuda_graph
    python -m orchestrator.measure --model resnet18 --image-size 96 --method halving

DeviceClock   times the network where it lies. On a GPU the worker does so where it trained, while the other ranks wait.
CurveClock    CPU: reads a latency off a curve over multiply-adds that was taken before the first trial.
ModelClock    no clock: so many multiply-adds per millisecond. For runs that must give the same numbers twice.

Cores share caches and memory with whatever trains beside them: on 2 cores the same network took up to twice as long while
another trial trained, also by the CPU time of a process of its own. So nothing is timed on a CPU while anything trains.
Trials estimate from the curve, and when the last one has ended all finished networks are timed in turns (remeasure.py).
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import ray
import torch
from rich.console import Console
from torch import Tensor, nn

import gator
from gator.latency import Conditions
from orchestrator import models
from orchestrator.cluster import ClusterConfig
from orchestrator.config import ModelConfig, ProfileConfig, TrialConfig
from orchestrator.errors import LatencyTableError

CURVE_VERSION = 1
MODEL_CLOCK_MACS_PER_MS = 1e7
NUM_REPEATS_OF_ESTIMATE = 20
CURVE_WIDTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of every group's channels that the networks of a curve keep."""
MIN_TURNS, MAX_TURNS = 5, 15
"""In turns, every network is timed so many times, each time after all the others: more often until all are settled."""
SETTLED = 0.05
"""A network is settled when its two fastest turns lie within this share of each other."""

# glibc gives large blocks back to the kernel when they are freed, and asks for them again in the next forward pass:
# page faults in the timing. 32 MiB is the largest threshold that every glibc accepts.
TIMING_ENV = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

MAX_ATTEMPTS = 3
"""A measurement that was disturbed is made again, so often at most."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of the forward pass of one batch: median and spread over the repeats."""

    median_ms: float
    p10_ms: float | None = None
    p90_ms: float | None = None
    device: str | None = None
    """None, like the spread, for an estimate."""
    noisy: bool | None = None
    """Whether the measurement was disturbed, however often it was made again; over turns, whether no two of them agree on the least."""
    conditions: str | None = None
    """JSON of gator.latency.Conditions with its fingerprint: what another latency must share to compare."""


@dataclass(frozen=True)
class Curve:
    """Latency over multiply-adds, of a network that was narrowed evenly."""

    points: Mapping[int, tuple[Sequence[float], Sequence[float]]]
    """Batch size -> multiply-adds per image and milliseconds, both rising."""

    def at(self, macs: float, batch_size: int) -> float:
        """Return milliseconds, linear between the points."""
        return float(np.interp(macs, *self.points[batch_size]))

    def to_json(self) -> str:
        """Return the points as JSON text."""
        points = {str(size): [list(line) for line in lines] for size, lines in self.points.items()}
        return json.dumps({"version": CURVE_VERSION, "points": points}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what to_json returned. Raises: LatencyTableError if it is damaged, or of another version."""
        try:
            content = json.loads(text)
            version, points = content["version"], content["points"]
            curve = cls({int(size): (macs, times_ms) for size, (macs, times_ms) in points.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LatencyTableError(
                f"the latency curve is damaged ({error}); restore it from a copy, or start the search under another name"
            ) from error
        if version != CURVE_VERSION:
            raise LatencyTableError(
                f"the latency curve has version {version}, this program reads {CURVE_VERSION}; use the release that wrote it"
            )
        return curve


class Clock(Protocol):
    """What tells the latency of a pruned network."""

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return the latency of `network`, which is the trial's model cut to `architecture`."""

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Return what a scheduler may compare networks by that are not done; with a spread where it was timed."""


class ModelClock:
    """Latency from the multiply-adds: exact, repeatable, and true of no device."""

    def __init__(self, macs: gator.MacsCost) -> None:
        self._macs = macs

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return multiply-adds over MODEL_CLOCK_MACS_PER_MS, without spread."""
        latency_ms = self._macs(architecture) * batch_size / MODEL_CLOCK_MACS_PER_MS
        return Latency(median_ms=latency_ms, p10_ms=latency_ms, p90_ms=latency_ms, device="model")

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Return what measure() does."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=1)


class DeviceClock:
    """Latency on the device that holds the network, in this process."""

    def __init__(self, input_shape: tuple[int, ...], num_threads: int) -> None:
        self._input_shape = input_shape
        self._num_threads = num_threads

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Time the network itself."""
        device = next(network.parameters()).device
        images = example_images(self._input_shape, batch_size).to(device)
        with device_lock(device):
            measured = time_calmly(network, images, num_repeats=num_repeats, num_threads=self._num_threads)
        return _latency(measured, noisy=measured.is_noisy)

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Time a few repeats: nothing else runs on the device."""
        return self.measure(network, architecture, batch_size=batch_size, num_repeats=NUM_REPEATS_OF_ESTIMATE)


class CurveClock:
    """Latency off a curve: the same for all trials, whatever runs beside them."""

    def __init__(self, curve: Curve, macs: gator.MacsCost) -> None:
        self._curve = curve
        self._macs = macs

    def measure(
        self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
    ) -> Latency:
        """Return the estimate; what is measured comes from remeasure.py."""
        return self.estimate(network, architecture, batch_size=batch_size)

    def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
        """Return the milliseconds at the architecture's multiply-adds."""
        return Latency(median_ms=self._curve.at(self._macs(architecture), batch_size))


def make_clock(
    config: TrialConfig, input_shape: tuple[int, ...], macs: gator.MacsCost, device: torch.device, curve: Curve | None
) -> Clock:
    """Return the clock for networks that were trained on the device: profile.clock decides, then where they run.

    curve: where networks run on CPUs beside trials; None elsewhere.
    """
    if config.profile.clock == "model":
        return ModelClock(macs)
    if device.type == "cpu" and curve is not None:
        return CurveClock(curve, macs)
    return DeviceClock(input_shape, config.profile.num_threads)


def measure_latencies(
    clock: Clock, network: nn.Module, architecture: gator.Architecture, profile: ProfileConfig
) -> dict[str, Any]:
    """Return the latency columns of results.parquet: the first batch size with its conditions, others with their spread."""
    return _columns(
        {
            size: vars(clock.measure(network, architecture, batch_size=size, num_repeats=profile.num_repeats))
            for size in profile.batch_sizes
        }
    )


def measure_in_turns(
    networks: Sequence[tuple[nn.Module, gator.Architecture]], profile: ProfileConfig
) -> list[dict[str, Any]]:
    """Return the latency columns of each network, all timed in this process."""
    by_size = {
        size: time_in_turns(networks, size, profile.num_repeats, profile.num_threads) for size in profile.batch_sizes
    }
    return [
        _columns({size: vars(latencies[place]) for size, latencies in by_size.items()})
        for place in range(len(networks))
    ]


def time_in_turns(
    networks: Sequence[tuple[nn.Module, gator.Architecture]], batch_size: int, num_repeats: int, num_threads: int
) -> list[Latency]:
    """Return the latency of each network, that of its fastest turn; num_repeats: of each, over the least number of turns."""
    images = example_images(networks[0][1].input_shapes[0][1:], batch_size)
    with device_lock(torch.device("cpu")):
        measured = time_networks(
            [network for network, _ in networks],
            images,
            num_repeats=math.ceil(num_repeats / MIN_TURNS),
            num_threads=num_threads,
        )
    return [_latency(one, noisy=not is_settled) for one, is_settled in measured]


def time_calmly(network: nn.Module, images: Tensor, **settings: Any) -> gator.LatencyMeasurement:
    """Return the calmest of up to MAX_ATTEMPTS measurements: the first that is not noisy, else the one of least spread."""
    attempts: list[gator.LatencyMeasurement] = []
    while len(attempts) < MAX_ATTEMPTS:
        attempts.append(gator.time_forward(network, images, **settings))
        if not attempts[-1].is_noisy:
            return attempts[-1]
    return min(attempts, key=lambda measured: measured.spread)


def time_networks(
    networks: Sequence[nn.Module], images: Tensor, *, num_repeats: int = NUM_REPEATS_OF_ESTIMATE, **settings: Any
) -> list[tuple[gator.LatencyMeasurement, bool]]:
    """Return each network's fastest turn, and whether it is settled; num_repeats: in a turn.

    Whatever else runs can only add time, for as long as it runs: beside six busy processes on 2 cores the turns of one
    network lay between 0.85 and 1.7 ms, and the fastest of 5 between 0.79 and 0.95 (16 copies of it, 14 of them so).
    """
    turns: list[list[gator.LatencyMeasurement]] = [[] for _ in networks]
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and all(map(_is_settled, turns)):
            break
        for network, done in zip(networks, turns, strict=True):
            done.append(gator.time_forward(network, images, num_repeats=num_repeats, **settings))
    return [(_fastest(done), _is_settled(done)) for done in turns]


def _fastest(turns: Sequence[gator.LatencyMeasurement]) -> gator.LatencyMeasurement:
    return min(turns, key=lambda measured: measured.median_ms)


def _is_settled(turns: Sequence[gator.LatencyMeasurement]) -> bool:
    fastest_ms, second_ms = sorted(measured.median_ms for measured in turns)[:2]
    return second_ms <= (1 + SETTLED) * fastest_ms


@contextmanager
def device_lock(device: torch.device) -> Iterator[None]:
    """Hold a device of this node while measuring: of all processes of this user that ask, one does at a time.

    A file lock, which the system takes back from a process that dies. A GPU goes by its UUID: cuda:0 is another one in
    each process that Ray gave one to.
    """
    which = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
    name = re.sub(r"\W", "_", f"gator_measure_{os.getuid()}_{which}")
    with open(Path(tempfile.gettempdir()) / f"{name}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take_curve(network: nn.Module, graph: gator.ChannelGraph, profile: ProfileConfig) -> Curve:
    """Return the curve of the network, timed in this process."""
    macs = gator.MacsCost(graph)
    narrowed = [
        gator.Architecture.from_keep(
            graph, {group.name: range(math.ceil(share * group.num_channels)) for group in graph.groups}
        )
        for share in CURVE_WIDTHS
    ]
    networks = [(gator.prune(network, graph, architecture), architecture) for architecture in narrowed]
    points = {}
    for size in profile.batch_sizes:
        latencies = time_in_turns(networks, size, MIN_TURNS * NUM_REPEATS_OF_ESTIMATE, profile.num_threads)
        medians_ms = np.maximum.accumulate([latency.median_ms for latency in latencies])
        points[size] = [macs(architecture) for architecture in narrowed], medians_ms.tolist()
    return Curve(points)


def _latency(measured: gator.LatencyMeasurement, *, noisy: bool) -> Latency:
    return Latency(
        median_ms=measured.median_ms,
        p10_ms=measured.p10_ms,
        p90_ms=measured.p90_ms,
        device=measured.device,
        noisy=noisy,
        conditions=_conditions_json(measured.conditions),
    )


def _conditions_json(conditions: Conditions) -> str:
    return json.dumps({**asdict(conditions), "fingerprint": conditions.fingerprint})


def _columns(by_size: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """by_size: the fields of a Latency per batch size, the first of profile.batch_sizes first."""
    first, *others = by_size.items()
    latency = first[1]
    return {
        "latency_ms": latency["median_ms"],
        "latency_p10_ms": latency["p10_ms"],
        "latency_p90_ms": latency["p90_ms"],
        "latency_device": latency["device"],
        "latency_noisy": latency["noisy"],
        "latency_conditions": latency["conditions"],
        **{
            f"latency_{kind}_b{size}": other[f"{name}_ms"]
            for size, other in others
            for kind, name in (("ms", "median"), ("p10_ms", "p10"), ("p90_ms", "p90"))
        },
    }


def in_own_process(
    function: Callable[..., T], *arguments: Any, profile: ProfileConfig, cluster: ClusterConfig, num_gpus: float = 0
) -> T:
    """Return what the function returns in a new process, on a node where networks are measured; here without Ray.

    A process that has trained is no place to time a network: its heap is in pieces, and its allocator set otherwise.
    arguments: plain values. Raises: what the function raises; ray.exceptions.RayError if the process dies twice.
    """
    if not ray.is_initialized():
        return function(*arguments)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus, "max_calls": 1, "max_retries": 1}
    if cluster.measure_on is not None:
        options["resources"] = {cluster.measure_on: 0.001}
    options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(profile.num_threads), **TIMING_ENV}}
    task = ray.remote(**options)(function)
    try:
        result: T = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return result


def example_images(input_shape: tuple[int, ...], batch_size: int) -> Tensor:
    """Return random images, (batch_size, 3, H, W), without touching the global generator."""
    return torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))


def build_traced(model: ModelConfig, input_shape: tuple[int, ...]) -> tuple[nn.Module, gator.ChannelGraph]:
    """Build the unpruned network, its weights still random, and trace it as every process does: architectures fit."""
    network = models.build(model.model_copy(update={"weights": None}))
    return network, gator.trace(network, example_images(input_shape, 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code."""
    arguments = _parser().parse_args(argv)
    # Late: they import this module.
    from orchestrator import latency_build
    from orchestrator.build_progress import shown_on
    from orchestrator.cluster import connect, load_cluster
    from orchestrator.errors import OrchestratorError

    try:
        cluster = load_cluster(arguments.cluster)
        tasks = _tasks(arguments)
        connect(cluster)
        with shown_on(Console(stderr=True)) as steps:
            paths = latency_build.build_everywhere(tasks, Path(arguments.out), cluster.measure_on, steps)
        for path, task in zip(paths, itertools.cycle(tasks), strict=False):
            print(latency_build.result_text(path, task))
    except OrchestratorError as error:
        print(f"measure: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        ray.shutdown()
    return 0


def _tasks(arguments: argparse.Namespace) -> list[Any]:
    """Return a latency_build.Task for each batch size. Raises: ConfigError for a model that cannot be built."""
    from orchestrator.latency_build import DTYPES, Task
    from orchestrator.yaml_files import validate

    is_cifar = models.CIFAR_NAME.fullmatch(arguments.model) is not None
    num_classes = arguments.num_classes or (10 if is_cifar else 1000)
    model = validate(ModelConfig, {"name": arguments.model, "num_classes": num_classes}, "command line")
    models.check(model)
    return [
        Task(
            model=model,
            image_size=arguments.image_size or (32 if is_cifar else 224),
            batch_size=batch_size,
            dtype=DTYPES[arguments.dtype],
            mode=arguments.mode,
            num_threads=arguments.threads,
            method=arguments.method,
        )
        for batch_size in arguments.batch
    ]


def _sizes(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected batch sizes such as 1,32")
    return [int(size) for size in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orchestrator measure",
        description="Build a latency table of a network on every kind of accelerator of the cluster, or go on with one.",
    )
    parser.add_argument(
        "--model", required=True, help="a torchvision classifier, resnet<6n+2>_cifar, or package.module:function"
    )
    parser.add_argument("--batch", type=_sizes, default=[1], metavar="N,N", help="batch sizes, a table for each (1)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16", "fp64"), default="fp32")
    parser.add_argument("--mode", choices=("eager", "cuda_graph", "compile"), default="eager")
    parser.add_argument(
        "--method",
        choices=("table", "halving"),
        default="table",
        help="single calls, or whole networks with one group halved",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width (224; CIFAR ResNets 32)")
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="outputs of the classifier (1000; CIFAR ResNets 10)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a forward pass on a CPU (1)")
    parser.add_argument("--out", default="runs/latency", metavar="DIR", help="folder of the tables (runs/latency)")
    parser.add_argument("--cluster", default="local", metavar="NAME", help="a name in clusters/ or a YAML file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
