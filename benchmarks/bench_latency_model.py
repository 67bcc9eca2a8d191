"""How well is the latency of a pruned network predicted, without timing it?

    python -m benchmarks.bench_latency_model --seconds 200      what the results file lacks; start nothing after 200 s
    python -m benchmarks.bench_latency_model --render           write the table and the plot

40 random architectures of each network, 96 px, batch 1, eager, one thread; or --runtime onnxruntime, whose widths are multiples of 8;
or --device cuda --runtime cuda_graph. A network keeps
0.3 to 1.0 of each group: a range within these bounds is drawn for each architecture and every group within that, as searches at
different budgets leave them; each removable block is gone with a probability of up to 0.3. Every architecture is timed in turns
over all of them, and its fastest turn is the truth, for what disturbs only adds time; the noise floor is the error of every other
turn's fastest against that of the rest.

    MACs alone                  scaled to the unpruned network
    MACs, fitted                a + b * MACs, fitted to the same whole networks that calibrate ours
    paper's multipliers         every group halved and timed; its share of the time saved over its share of the MACs saved
                                (not in onnxruntime)
    convolutions of the table   HALP's way: sum of the table's convolutions, scaled to the unpruned network
    ours                        gator.LatencyCost: all calls of the table, calibrated by the networks that `measure` times

Times are the process's CPU time, which programs beside it disturb least.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torchvision import models

import gator
from benchmarks.row_file import PROJECT, RESULTS
from gator.graph.graph import full_widths
from gator.graph.ops import CONVOLUTIONS
from gator.latency.measurement import Runtime
from gator.latency.op_timing import completed, time_op, time_points
from gator.latency.table import CALL_RUNTIMES, LatencyTable, NetworkTime
from orchestrator.config.trial import ProfileConfig
from orchestrator.latency.onnx_layers import time_layer
from orchestrator.latency.runtimes import Timer, Timing
from orchestrator.latency.table_build import calibration_widths, in_steps, own_calls, with_calls_of
from orchestrator.latency.tables import read_table, write_table

# Fixed before torch starts its allocator: see docs/latency.md.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "OMP_NUM_THREADS": "1"}

NETWORKS = ("resnet50", "mobilenet_v2")
IMAGE_SIZE = 96
NUM_ARCHITECTURES = 40
NUM_TURNS = {"calibration": 8, "test": 16, "halved": 5}
"""Of each architecture; those of the test in two series of half as many."""
REPEATS = 8
FOLDER = RESULTS / "latency_model"
FILES = Path(tempfile.gettempdir()) / "bench_latency_model"
"""Exported networks, which take longer to write than to time."""
PLOT = PROJECT / "docs" / "images" / "latency_model.png"


class Network:
    """One network with its architectures and the files that hold what was timed."""

    def __init__(self, name: str, device: str, runtime: Runtime) -> None:
        torch.manual_seed(0)
        self.name, self.runtime = name, runtime
        self.model = models.get_model(name).eval().to(device)
        self.images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        self.graph = gator.trace(self.model, self.images)
        self.macs = gator.MacsCost(self.graph)
        self.shape = (3, IMAGE_SIZE, IMAGE_SIZE)
        profile = ProfileConfig(runtime=runtime, dtype="float32", layout="contiguous")
        self.timing = Timing.on(torch.device(device), profile)
        self.table_file = FOLDER / f"{name}_{place(device, runtime)}.parquet"
        self.calls_file = FOLDER / f"{name}_{place(device, 'eager')}.parquet"
        self.turns_file = FOLDER / f"{name}_{place(device, runtime)}.json"
        generator = torch.Generator().manual_seed(1)
        full, step = gator.Architecture.full(self.graph), self.table().width_step
        self.sets = {
            "test": [random_architecture(self.graph, generator, step) for _ in range(NUM_ARCHITECTURES)],
            "calibration": [of_widths(self.graph, widths) for widths in calibration_widths(self.graph, step)],
        }
        if runtime in CALL_RUNTIMES:
            self.sets["halved"] = [full, *halved_architectures(self.graph)]

    def table(self) -> LatencyTable:
        """Return what the file holds; at the start a table without own times."""
        if self.table_file.exists():
            return read_table(self.table_file)
        table = LatencyTable(self.timing.conditions(self.shape, 1))
        return table if self.runtime in CALL_RUNTIMES else with_calls_of(table, read_table(self.calls_file))

    def turns(self) -> dict[str, list[list[float]]]:
        """Return for each set its turns, each with the milliseconds of all its architectures; and the seconds of the work."""
        turns: dict[str, list[list[float]]] = {"test": [], "calibration": [], "halved": [], "seconds": []}
        return turns | (json.loads(self.turns_file.read_text()) if self.turns_file.exists() else {})

    def timers(self, name: str) -> list[Timer]:
        """Return the networks of a set, ready to be timed."""
        timers = []
        for number, one in enumerate(self.sets[name]):
            file = FILES / f"{self.name}_{name}_{number}.onnx"
            if self.runtime not in CALL_RUNTIMES and file.exists():
                timers.append(self.timing.file_timer(file, self.shape, 1))
            else:
                pruned = gator.prune(self.model, self.graph, one)
                timers.append(self.timing.timers(pruned, self.shape, [1], file)[1])
        return timers

    def take_turn(self, name: str, timers: list[Timer]) -> None:
        """Time every network of a set once more."""
        began = time.process_time()
        times_ms = [timer.time(num_repeats=REPEATS, max_warmup=5).median_ms for timer in timers]
        turns = self.turns()
        turns[name].append(times_ms)
        turns["seconds"].append([list(self.sets).index(name), time.process_time() - began])
        write_text(self.turns_file, json.dumps(turns))

    def times_ms(self, name: str) -> Tensor:
        """Return the fastest turn of each architecture of a set."""
        return torch.tensor(self.turns()[name], dtype=torch.float64).min(dim=0).values

    def work(self, until: float) -> bool:
        """Do what is missing, starting nothing after `until`; return whether all is done."""
        table = self.table()
        began = time.process_time()
        time_one = time_layer if self.runtime == "onnxruntime" else time_op
        timer = functools.partial(time_one, conditions=table.conditions)
        calls = own_calls(table, self.graph)
        for grown in completed(table, calls, functools.partial(time_points, timer=timer)):
            write_table(self.table_file, grown)
            turns = self.turns()
            turns["seconds"].append([-1, time.process_time() - began])
            write_text(self.turns_file, json.dumps(turns))
            began = time.process_time()
            print(f"{self.name}: {len(grown.ops)} points, {grown.turns_to_go(calls)} timings to go", flush=True)
            if time.monotonic() > until:
                return False
        # Turns of the sets follow each other, so that a machine that drifts does so for all of them.
        timers = {name: self.timers(name) for name in self.sets}
        for number in range(max(NUM_TURNS.values())):
            for name in self.sets:
                if not len(self.turns()[name]) <= number < NUM_TURNS[name]:
                    continue
                if time.monotonic() > until:
                    return False
                self.take_turn(name, timers[name])
                print(f"{self.name}: {name} turn {number + 1} of {NUM_TURNS[name]}", flush=True)
        return True


def of_widths(graph: gator.ChannelGraph, widths: Mapping[str, int]) -> gator.Architecture:
    """Return the architecture that keeps the first channels of each group."""
    return gator.Architecture.from_keep(graph, {name: range(width) for name, width in widths.items()})


def place(device: str, runtime: Runtime) -> str:
    """Return what tells result files of one device and runtime from another's: cpu, cuda, cuda_cuda_graph."""
    return device if runtime == "eager" else f"{device}_{runtime}"


def random_architecture(graph: gator.ChannelGraph, generator: torch.Generator, step: int) -> gator.Architecture:
    """Return an architecture as the text above says, of widths that are multiples of step."""

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    low, high = sorted(0.3 + 0.7 * uniform() for _ in range(2))
    keep: dict[str, range | tuple[()]] = {
        group.name: range(in_steps((low + (high - low) * uniform()) * group.num_channels, group, step))
        for group in graph.groups
    }
    probability = 0.3 * uniform()
    keep.update({block.groups[0]: () for block in graph.blocks if uniform() < probability})
    return gator.Architecture.from_keep(graph, keep)


def halved_architectures(graph: gator.ChannelGraph) -> list[gator.Architecture]:
    """Return one architecture for each group: that group alone halved."""
    return [
        gator.Architecture.from_keep(graph, {group.name: range(max(1, group.num_channels // 2))})
        for group in graph.groups
    ]


# --- predictions ------------------------------------------------------------------------------------------------------


def predictions(network: Network) -> dict[str, tuple[Tensor, int]]:
    """Return for each way the (N,) milliseconds of the test set, and how many timings it needs."""
    test, calibration = network.sets["test"], network.sets["calibration"]
    calibration_ms = network.times_ms("calibration")
    full_ms = float(calibration_ms[0])
    macs = torch.tensor([network.macs(one) for one in test], dtype=torch.float64) / network.macs.full
    table = network.table()
    cost = latency_cost(network)
    columns = torch.tensor([[1.0, network.macs(one) / network.macs.full] for one in calibration], dtype=torch.float64)
    weights = 1 / calibration_ms[:, None]
    fitted = torch.linalg.lstsq(columns * weights, torch.ones(len(calibration), 1, dtype=torch.float64)).solution[:, 0]
    num_convolutions = sum(time.kind.name in CONVOLUTIONS for time in table.ops)
    ways = {"MACs alone": (full_ms * macs, 1), "MACs, fitted": (fitted[0] + fitted[1] * macs, len(calibration))}
    if "halved" in network.sets:
        ways["paper's multipliers"] = (by_multipliers(network), len(network.sets["halved"]))
    return ways | {
        "convolutions of the table": (full_ms * convolutions_only(network), num_convolutions + 1),
        "ours": (torch.tensor([cost(one) for one in test], dtype=torch.float64), len(table.ops) + len(calibration)),
    }


def latency_cost(network: Network) -> gator.LatencyCost:
    """Return ours, calibrated with the calibration set."""
    times_ms = network.times_ms("calibration").tolist()
    known = [
        NetworkTime(
            fingerprint=network.graph.fingerprint,
            input_shape=(3, IMAGE_SIZE, IMAGE_SIZE),
            widths=one.widths,
            median_ms=median_ms,
            p10_ms=median_ms,
            p90_ms=median_ms,
            n=NUM_TURNS["calibration"] * REPEATS,
        )
        for one, median_ms in zip(network.sets["calibration"], times_ms, strict=True)
    ]
    return gator.LatencyCost(network.graph, network.table().with_networks(known))


def by_multipliers(network: Network) -> Tensor:
    """Return (N,) milliseconds when each group's share of the MACs counts its multiplier times.

    dT = T * sum of multiplier_g * dMACs/dn_g * dn_g / MACs, summed along the straight line from the unpruned widths. Two
    points of Gauss's quadrature are exact for MACs, a product of two widths.
    """
    full_ms, *halved_ms = network.times_ms("halved").tolist()
    saved_macs = [1 - network.macs(one) / network.macs.full for one in network.sets["halved"][1:]]
    multipliers = torch.tensor(
        [(1 - ms / full_ms) / max(saved, 1e-12) for ms, saved in zip(halved_ms, saved_macs, strict=True)]
    ).double()
    full = full_widths(network.graph)
    predicted = []
    for architecture in network.sets["test"]:
        widths = torch.tensor(list(architecture.widths.values()), dtype=torch.float64)
        lost = sum(
            0.5 * multipliers * network.macs.relative_gradient(full + (0.5 + side * 0.75**0.5 / 3) * (widths - full))
            for side in (-1, 1)
        )
        predicted.append(full_ms * (1 + float((lost * (widths - full)).sum())))
    return torch.tensor(predicted, dtype=torch.float64)


def convolutions_only(network: Network) -> Tensor:
    """Return (N,) the table's convolutions of each architecture, over those of the unpruned network."""
    convolutions = tuple(op for op in network.graph.ops if op.kind.name in CONVOLUTIONS)
    table = network.table()
    cost = gator.LatencyCost(
        dataclasses.replace(network.graph, ops=convolutions), LatencyTable(table.conditions, table.ops)
    )
    return torch.tensor([cost(one) for one in network.sets["test"]], dtype=torch.float64) / cost.full


# --- results ----------------------------------------------------------------------------------------------------------


def render(device: str, runtime: Runtime) -> None:
    """Write the table of the networks that are measured, and for a CPU the plot."""
    networks = [
        network
        for network in (Network(name, device, runtime) for name in NETWORKS)
        if all(network.turns()[name] for name in network.sets)
    ]
    conditions, is_plain = networks[0].table().conditions, (device, runtime) == ("cpu", "eager")
    machine = f"{conditions.device}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
    parts = [
        HEADER.format(
            day=date.today().isoformat(), machine=machine, versions=versions, runtime=runtime, clock=CLOCKS[device]
        )
    ]
    parts += [section(network) for network in networks]
    write_text(
        RESULTS / ("latency_model.md" if is_plain else f"latency_model_{place(device, runtime)}.md"),
        "\n".join(parts),
    )
    if is_plain:
        plot(networks)


CLOCKS = {"cpu": "one thread, process CPU time, malloc thresholds fixed", "cuda": "CUDA events"}
HEADER = """# Latency of pruned networks, predicted and timed

Written by `python -m benchmarks.bench_latency_model --render`, whose docstring says how the architectures are drawn and what
the ways are. {day}, {machine}, {versions}, float32, batch 1, 96 px, {runtime}, {clock}. Other
programs ran on the machine: read each error against the noise floor.
"""


def section(network: Network) -> str:
    """Return the Markdown of one network."""
    turns = torch.tensor(network.turns()["test"], dtype=torch.float64)
    first, second = turns[::2].min(dim=0).values, turns[1::2].min(dim=0).values
    measured_ms = network.times_ms("test")
    cost = latency_cost(network)
    lines = [
        f"\n## {network.name}\n",
        f"{NUM_ARCHITECTURES} architectures, {float(measured_ms.min()):.2f} to {float(measured_ms.max()):.2f} ms; the "
        f"unpruned network takes {float(network.times_ms('calibration')[0]):.2f} ms. Ours states: {cost.calibration}.\n",
        "| way | mean error | p90 error | rank correlation | timings |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, (predicted_ms, num_timings) in predictions(network).items():
        lines.append(f"| {way} | {scores(predicted_ms, measured_ms)} | {num_timings} |")
    lines.append(f"| noise floor: one series against the other | {scores(first, second)} | - |")
    seconds = network.turns()["seconds"]
    spent = {which: sum(s for place, s in seconds if place == which) for which in (-1, 1, 2)}
    lines.append(
        f"\nCPU seconds: table {spent[-1]:.0f}, whole networks for the calibration {spent[1]:.0f}, networks with one group "
        f"halved {spent[2]:.0f}.\n"
    )
    return "\n".join(lines)


def scores(predicted_ms: Tensor, measured_ms: Tensor) -> str:
    """Return "mean error | p90 error | rank correlation" as cells of a Markdown table."""
    errors = (predicted_ms / measured_ms - 1).abs()
    ranks = torch.stack([predicted_ms.argsort().argsort(), measured_ms.argsort().argsort()]).double()
    return f"{float(errors.mean()):.1%} | {float(errors.quantile(0.9)):.1%} | {float(torch.corrcoef(ranks)[0, 1]):.3f}"


def plot(networks: list[Network]) -> None:
    """Draw predicted against measured milliseconds, ours and the MACs alone."""
    from matplotlib.figure import Figure  # late: only this needs it

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        measured_ms = network.times_ms("test")
        ways = predictions(network)
        for way, marker in (("MACs alone", "x"), ("paper's multipliers", "+"), ("ours", "o")):
            axes.scatter(measured_ms, ways[way][0], marker=marker, s=22, label=way, alpha=0.8)
        ends = [0.0, 1.05 * float(measured_ms.max())]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set(title=f"{network.name}, {IMAGE_SIZE} px, batch 1", xlabel="measured ms", ylabel="predicted ms")
        axes.legend(frameon=False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def write_text(path: Path, text: str) -> None:
    """Replace a file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runtime", default="eager", choices=("eager", "cuda_graph", "onnxruntime"))
    parser.add_argument("--render", action="store_true", help="write the table and the plot")
    arguments = parser.parse_args()
    if arguments.render:
        render(arguments.device, arguments.runtime)
        return 0
    if not MALLOC.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.bench_latency_model", *sys.argv[1:]], os.environ | MALLOC
        )
    until = time.monotonic() + arguments.seconds
    done = [
        Network(name, arguments.device, arguments.runtime).work(until) for name in NETWORKS if time.monotonic() < until
    ]
    print("all done" if len(done) == len(NETWORKS) and all(done) else "more to do: run it again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
