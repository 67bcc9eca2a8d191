"""Seconds to trace all 80 classifiers of torchvision and to cut half of every group, beside Torch-Pruning.

    pip install torch-pruning==1.6.1                            (or pip install '.[bench]')
    python -m benchmarks.bench_trace resnet18 swin_t            these now, a process each; prints a line each
    python -m benchmarks.bench_trace --all --seconds 200        what the results file lacks; start none after 200 s
    python -m benchmarks.bench_trace --render                   write the table, benchmarks/results/trace.md

Both sides run in one process on one thread, turn by turn, on a fresh copy of the same network and the same image. Time is the
process's CPU time, which a busy machine disturbs least. Memory is the peak of the resident size over what it was before, in
multiples of the network's own size: gator's includes the second network that it returns, Torch-Pruning cuts in place.

    trace   gator.trace(model, images)                                  DependencyGraph().build_dependency(model, images)
    export  of this, inside torch.export
    cut     Architecture.from_keep + gator.prune, a random half         BasePruner(..., RandomImportance, pruning_ratio=0.5).step()

Each call of Torch-Pruning ends after CAP_S: on Swin and MaxViT it does not come back.
"""

import argparse
import copy
import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import gator
from benchmarks.row_file import RESULTS, RowFile, escaped, json_of_process, source_hash

ROWS = RowFile(RESULTS / "trace.jsonl")
TABLE = RESULTS / "trace.md"
NAMES = models.list_models(module=models)
NUM_TURNS = 3
CAP_S = 60
TIMEOUT_S = 1800


@dataclass
class Side:
    """One side's numbers for one network."""

    trace_s: list[float] = field(default_factory=list)
    export_s: list[float] = field(default_factory=list)
    """Of these, inside torch.export; gator only."""
    cut_s: list[float] = field(default_factory=list)
    trace_memory: float = 0.0
    """Peak over what was there before, in multiples of the network's size; the largest turn."""
    cut_memory: float = 0.0
    error: str = ""
    """Why there are no (more) numbers."""


@dataclass
class Row:
    """What was measured for one network."""

    model: str
    source: str
    model_mib: float = 0.0
    num_groups: int = 0
    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)
    machine: str = ""
    versions: str = ""
    day: str = ""


def measure(name: str) -> Row:
    """Measure both sides on one network, turn by turn."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row = Row(name, source_hash(__file__), machine=_machine(), versions=_versions(), day=date.today().isoformat())
    _turn(_ours, Side(), _tiny(), torch.zeros(1, 3, 8, 8))  # imports and first calls
    _turn(_theirs, Side(), _tiny(), torch.zeros(1, 3, 8, 8))
    size = 299 if name == "inception_v3" else 224
    model = models.get_model(name, weights=None).eval()
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    row.model_mib = round(sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20, 1)
    for _ in range(NUM_TURNS):
        row.num_groups = _turn(_ours, row.ours, model, images) or row.num_groups
        _turn(_theirs, row.theirs, copy.deepcopy(model), images)
    return row


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def _turn(side: Callable[[nn.Module, Tensor, "_Clock"], int], result: Side, model: nn.Module, images: Tensor) -> int:
    """Add one turn to a side's numbers, unless it has failed before; return its number of groups."""
    if result.error:
        return 0
    clock = _Clock(sum(t.numel() * t.element_size() for t in model.state_dict().values()))
    try:
        groups = side(model, images, clock)
    except Exception as error:
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        groups = 0
    if clock.export_s is not None:
        result.export_s.append(round(clock.export_s, 4))
    for part, (seconds, memory) in clock.parts.items():
        getattr(result, f"{part}_s").append(round(seconds, 4))
        setattr(result, f"{part}_memory", round(max(memory, getattr(result, f"{part}_memory")), 2))
    return groups


def _ours(model: nn.Module, images: Tensor, clock: "_Clock") -> int:
    with clock("trace"), clock.of_export():
        graph = gator.trace(model, images)
    generator = torch.Generator().manual_seed(0)
    with clock("cut"):
        half = {
            group.name: torch.randperm(group.num_channels, generator=generator)[group.num_channels // 2 :].tolist()
            for group in graph.groups
        }
        pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, half))
    with torch.inference_mode():
        pruned(images)
    return len(graph.groups)


def _theirs(model: nn.Module, images: Tensor, clock: "_Clock") -> int:
    import torch_pruning

    with clock("trace"):
        torch_pruning.DependencyGraph().build_dependency(model, images)
    importance = torch_pruning.importance.RandomImportance()
    classifier = [layer for layer in model.modules() if getattr(layer, "out_features", None) == 1000]
    classifier += [layer for layer in model.modules() if getattr(layer, "out_channels", None) == 1000]
    with _broken_off_after_cap():
        pruner = torch_pruning.pruner.BasePruner(
            model, images, importance=importance, pruning_ratio=0.5, ignored_layers=classifier
        )
    with clock("cut"):
        pruner.step()
    with torch.inference_mode():
        pruned_output = model(images)
    assert pruned_output.shape[-1] == 1000, f"the output has lost classes: {tuple(pruned_output.shape)}"
    return 0


class _Clock:
    """Times parts of a turn: CPU seconds, and the peak of the resident size over what it was before."""

    def __init__(self, model_bytes: int) -> None:
        self.model_bytes = model_bytes
        self.parts: dict[str, tuple[float, float]] = {}
        self.export_s: float | None = None

    @contextmanager
    def of_export(self) -> Iterator[None]:
        """Add up the CPU seconds of the calls of torch.export."""
        export = torch.export.export
        self.export_s = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            """Export, and add the time."""
            began = time.process_time()
            try:
                return export(*args, **kwargs)
            finally:
                self.export_s = (self.export_s or 0.0) + time.process_time() - began

        torch.export.export = timed
        try:
            yield
        finally:
            torch.export.export = export

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a part; after CAP_S it is broken off with TimeoutError."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status_bytes("VmRSS")
        began = time.process_time()
        with _broken_off_after_cap():
            yield
        seconds = time.process_time() - began
        self.parts[part] = seconds, (_status_bytes("VmHWM") - before) / self.model_bytes


@contextmanager
def _broken_off_after_cap() -> Iterator[None]:
    signal.signal(signal.SIGPROF, _break_off)
    signal.setitimer(signal.ITIMER_PROF, CAP_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _break_off(signum: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {CAP_S} s of CPU time")


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _machine() -> str:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _versions() -> str:
    packages = ("torch", "torchvision", "torch-pruning")
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)


# --- one process each, and the table ------------------------------------------------------------------------------------


def run(names: list[str], seconds: float) -> None:
    """Measure networks, one process each, and write their rows; start none after `seconds`."""
    ROWS.fill(names, seconds, lambda name: asdict(_in_own_process(name)), lambda data: _table_line(_row(data)))


def _in_own_process(name: str) -> Row:
    found = json_of_process("benchmarks.bench_trace", name, TIMEOUT_S)
    if isinstance(found, str):
        return Row(name, source_hash(__file__), ours=Side(error=found), theirs=Side(error=found))
    return _row(found)


def _row(data: dict[str, Any]) -> Row:
    return Row(**data | {"ours": Side(**data["ours"]), "theirs": Side(**data["theirs"])})


def table_text() -> str:
    """Return the results as a Markdown page."""
    rows = [_row(data) for data in ROWS.read().values()]
    page = [
        "# Tracing and cutting torchvision's classifiers, beside Torch-Pruning",
        "",
        "Written by `python -m benchmarks.bench_trace --render`; what is timed stands in [bench_trace.py](../bench_trace.py).",
        "",
        *_findings(rows),
        "",
        f"Machine: {_each(row.machine for row in rows)}, one thread, shared with other jobs. {_each(row.versions for row in rows)}.",
        f"float32, batch 1, 224 px (Inception 299). CPU seconds: median of n = {NUM_TURNS} turns (least-most).",
        f"{_each(row.day for row in rows)}; source {_each(row.source for row in rows)}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
        *map(_table_line, rows),
    ]
    return "\n".join(page) + "\n"


COLUMNS = (
    *("network", "MiB", "groups", "trace s, gator", "of this torch.export", "trace s, Torch-Pruning", "ratio"),
    *("cut s, gator", "cut s, Torch-Pruning", "ratio"),
    *("memory, gator: trace, cut", "memory, Torch-Pruning: trace, cut", "remarks"),
)


def _findings(rows: list[Row]) -> list[str]:
    """Return what the table says in a few lines."""
    done = [row for row in rows if not row.ours.error]
    slowest = max(done, key=lambda row: statistics.median(row.ours.trace_s))
    slowest_cut = max(done, key=lambda row: statistics.median(row.ours.cut_s))
    largest = max(done, key=lambda row: row.ours.cut_memory)
    medians = [statistics.median(row.ours.trace_s) for row in done]
    own = [
        statistics.median(row.ours.trace_s) - statistics.median(row.ours.export_s) for row in done if row.ours.export_s
    ]
    traced_by_both = [(row.ours.trace_s, row.theirs.trace_s) for row in done if row.theirs.trace_s]
    cut_by_both = [(row.ours.cut_s, row.theirs.cut_s) for row in done if row.theirs.cut_s]
    return [
        f"- {len(rows)} of {len(NAMES)} networks: gator traces, cuts and runs {len(done)}; Torch-Pruning, with its defaults, no hints",
        f"  written by hand and {CAP_S} s of CPU time a call, {sum(not row.theirs.error for row in rows)}.",
        f"- trace, gator / Torch-Pruning: {_ratios(traced_by_both)}; gator's median {statistics.median(medians):.2f} s, its slowest "
        f"{slowest.model} with {max(medians):.2f} s.",
        f"- trace without torch.export: median {statistics.median(own):.2f} s, at most {max(own):.2f} s ({len(own)} networks).",
        f"- cut, gator / Torch-Pruning: {_ratios(cut_by_both)}; gator's slowest {slowest_cut.model} with "
        f"{statistics.median(slowest_cut.ours.cut_s):.2f} s.",
        f"- memory that gator.prune adds, the new network included: at most {largest.ours.cut_memory:.2f} times the network "
        f"({largest.model}, {largest.model_mib:.0f} MiB).",
    ]


def _ratios(pairs: list[tuple[list[float], list[float]]]) -> str:
    ratios = [_ratio(ours, theirs) for ours, theirs in pairs]
    return f"median {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}, {len(ratios)} networks)"


def _each(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values) - {""}))


def _table_line(row: Row) -> str:
    remarks = [
        f"{side}: {result.error}"
        for side, result in (("gator", row.ours), ("Torch-Pruning", row.theirs))
        if result.error
    ]
    cells = (
        *(row.model, f"{row.model_mib:.0f}", row.num_groups),
        *(_spread(row.ours.trace_s), _spread(row.ours.export_s), _spread(row.theirs.trace_s)),
        _ratio_text(row.ours.trace_s, row.theirs.trace_s),
        *(_spread(row.ours.cut_s), _spread(row.theirs.cut_s), _ratio_text(row.ours.cut_s, row.theirs.cut_s)),
        *(f"{side.trace_memory:.2f}, {side.cut_memory:.2f}" for side in (row.ours, row.theirs)),
        escaped("; ".join(remarks)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})" if seconds else "-"


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def _ratio_text(ours: list[float], theirs: list[float]) -> str:
    return f"{_ratio(ours, theirs):.2f}" if ours and theirs else "-"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of torchvision classifiers")
    parser.add_argument("--all", action="store_true", help="every network without a result of this source")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no network after this time")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    parser.add_argument("--json", metavar="MODEL", help="measure one network in this process; print it as JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(asdict(measure(arguments.json))))
    if arguments.models:
        run(arguments.models, arguments.seconds)
    if arguments.all:
        run(ROWS.missing(NAMES, source_hash(__file__)), arguments.seconds)
    if arguments.render:
        TABLE.write_text(table_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
