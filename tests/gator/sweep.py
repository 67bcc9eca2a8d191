"""The laws of tests/gator/pruning/test_pruning.py on all 80 classifiers of torchvision, and how much of each can be reached.

    python -m tests.gator.sweep resnet18 swin_t       check these now, in this process; prints a line each
    python -m tests.gator.sweep --all                 check what the results file lacks, each in a process of its own
    python -m tests.gator.sweep --all --seconds 200   the same in pieces: start none after 200 s
    python -m tests.gator.sweep --render              write the table, benchmarks/results/classifiers.md

A result belongs to the source of gator and of this file: after a change of either, --all starts over.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torchvision import models

import gator
from benchmarks.row_file import RESULTS, RowFile, escaped, json_of_process, source_hash
from gator.costs.counter import count_macs
from gator.costs.summary import summarise
from orchestrator.models.registry import skeleton

ROWS = RowFile(RESULTS / "classifiers.jsonl")
TABLE = RESULTS / "classifiers.md"
NAMES = models.list_models(module=models)

TOLERANCE = 1e-10  # float64, relative to the largest output
NATIVE_SIZE = 224
TIMEOUT_S = 900

# Height and width of the images on which the laws are checked: the smallest that leave every stage something to do.
SMALL_SIZE = {"alexnet": 64, "inception_v3": 299, "swin": 64, "maxvit": 224}
OTHER_SMALL_SIZE = 32


@dataclass
class Row:
    """What was found for one network. `failures` is empty when every law holds."""

    model: str
    source: str
    torch: str = torch.__version__
    image_size: int = 0
    failures: list[str] = field(default_factory=list)
    num_groups: int = 0
    num_channels: int = 0
    num_blocks: int = 0
    locked: list[tuple[str, int, str]] = field(default_factory=list)
    """Name, channels and reason of each locked group."""
    macs: float = 0.0
    """All MACs for one image of NATIVE_SIZE (Inception: 299)."""
    reach: float = 0.0
    """1 - C(every group at one unit) / C(full), C being those MACs."""
    attention_share: float = 0.0
    """Share of products without a layer, such as attention's, in all MACs of the small image."""
    error: float = 0.0
    """Largest difference of pruned and masked outputs, over the largest output."""
    trace_s: float = 0.0
    """Seconds to trace at NATIVE_SIZE on the meta device."""
    seconds: float = 0.0
    peak_gib: float = 0.0
    """Largest resident size of the process."""


def check(name: str) -> Row:
    """Check every law on one network. An exception is a failure too; its traceback goes to stderr."""
    torch.set_num_threads(1)
    row, began = Row(name, source_hash(__file__)), time.perf_counter()
    try:
        native = _trace_native(name, row)
        _check_laws(name, native, row)
    except Exception as error:
        traceback.print_exc()
        row.failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    row.seconds = round(time.perf_counter() - began, 1)
    row.peak_gib = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def _trace_native(name: str, row: Row) -> gator.ChannelGraph:
    """Trace the network as it is used, on the meta device, and say how much of it can be reached."""
    model = skeleton(lambda: models.get_model(name, weights=None))
    size = 299 if name == "inception_v3" else NATIVE_SIZE
    began = time.perf_counter()
    graph = gator.trace(model, torch.zeros(1, 3, size, size, device="meta"))
    row.trace_s = round(time.perf_counter() - began, 2)
    macs = summarise(graph).macs
    row.macs, row.reach = macs.full, round(macs.reachable, 4)
    row.num_groups, row.num_channels, row.num_blocks = len(graph.groups), graph.num_channels, len(graph.blocks)
    row.locked = [(group.name, group.num_channels, group.reason) for group in graph.locked]
    return graph


def _check_laws(name: str, native: gator.ChannelGraph, row: Row) -> None:
    row.image_size = size = small_size(name)
    model = lively(_small(name)().double().eval())
    inputs = torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(model, inputs)
    if graph.fingerprint != native.fingerprint:
        row.failures.append(f"other groups at {size} px than at {NATIVE_SIZE} px")
    gated = gator.GatedModel(model, graph).eval()
    with torch.inference_mode():
        output = model(inputs)
        for empty in (0.2, 0.0):  # the last one is saved
            architecture = gator.Architecture.from_keep(graph, random_half(graph, empty))
            gated.load_architecture(architecture)
            masked = gated(inputs)
            if not is_alive(masked, output):
                row.failures.append("the cut cannot be seen in the output: the check would prove nothing")
            pruned = gator.prune(model, graph, architecture)
            error = relative_error(pruned(inputs), masked)
            row.error = max(row.error, error)
            if not error <= TOLERANCE:
                row.failures.append(f"pruned differs from masked by {error:.1e} with {empty:.0%} of the blocks gone")
            _check_costs(pruned, graph, architecture, inputs, row)
        del model, gated
        _check_artifact(name, pruned.float(), architecture, inputs.float(), row)


def _check_costs(
    pruned: nn.Module, graph: gator.ChannelGraph, architecture: gator.Architecture, inputs: Tensor, row: Row
) -> None:
    counted = sum(count_macs(pruned, inputs)[""].values())
    layers, products = gator.MacsCost(graph)(architecture), gator.AttentionCost(graph)(architecture)
    if layers + products != counted:
        row.failures.append(f"MacsCost and AttentionCost say {layers:,.0f} + {products:,.0f}, the counter {counted:,}")
    num_params = sum(parameter.numel() for parameter in pruned.parameters())
    if (params := gator.ParamsCost(graph)(architecture)) != num_params:
        row.failures.append(f"ParamsCost says {params:,.0f}, the network has {num_params:,}")
    row.attention_share = round(products / counted, 4)


def _check_artifact(name: str, pruned: nn.Module, architecture: gator.Architecture, inputs: Tensor, row: Row) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gator.save_pruned(pruned, architecture, folder)
        loaded = gator.load_pruned(folder, build=_small(name))
    state, loaded_state = pruned.state_dict(), loaded.state_dict()
    if list(state) != list(loaded_state) or not all(torch.equal(state[key], loaded_state[key]) for key in state):
        row.failures.append("the loaded network has other weights than the saved one")
    elif not torch.equal(loaded(inputs), pruned(inputs)):
        row.failures.append("the loaded network gives other outputs than the saved one")


def small_size(name: str) -> int:
    """Return the height and width of the images for the laws."""
    if name.startswith("vit"):
        return 2 * int(name.rpartition("_")[2])  # two by two patches
    return next((size for prefix, size in SMALL_SIZE.items() if name.startswith(prefix)), OTHER_SMALL_SIZE)


def _small(name: str) -> Callable[[], nn.Module]:
    sized = {"image_size": small_size(name)} if name.startswith("vit") else {}
    return lambda: models.get_model(name, weights=None, **sized)


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model with nothing left at a constant: such as zero heads, or layer scales of 1e-6 that hide a block."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        low, high = parameter.aminmax()
        if low == high == 0:
            parameter.normal_(0, 0.1, generator=generator)
        elif low == high:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return model


def random_half(graph: gator.ChannelGraph, empty: float, seed: int = 0) -> dict[str, list[int]]:
    """Return half of every group's channels, rounded up; a share `empty` of the removable groups keeps none."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        order = torch.randperm(group.num_channels, generator=generator)
        is_empty = group.block is not None and bool(torch.rand((), generator=generator) < empty)
        keep[group.name] = [] if is_empty else order[group.num_channels // 2 :].tolist()
    return keep


def relative_error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest value; nan when a value is."""
    return float((one - other).abs().max() / other.abs().max())


def is_alive(masked: Tensor, output: Tensor) -> bool:
    """Whether both outputs are finite numbers and differ visibly."""
    return bool(masked.isfinite().all() and output.isfinite().all()) and relative_error(masked, output) > 1e-3


# --- one process each ---------------------------------------------------------------------------------------------------


def run_missing(seconds: float) -> None:
    """Check every network that has no row of this source yet, one process each; start none after `seconds`."""
    missing = ROWS.missing(NAMES, source_hash(__file__))
    ROWS.fill(missing, seconds, lambda name: asdict(in_own_process(name)), lambda row: line_of(Row(**row)))


def in_own_process(name: str) -> Row:
    """Check one network in a process of its own, which ends with its memory."""
    found = json_of_process("tests.gator.sweep", name, TIMEOUT_S)
    return Row(name, source_hash(__file__), failures=[found]) if isinstance(found, str) else Row(**found)


def line_of(row: Row) -> str:
    """Return a row as one line for the terminal."""
    verdict = "passes" if not row.failures else "FAILS: " + "; ".join(row.failures)
    return f"{row.model:20} {row.num_groups:4} groups  reach {row.reach:7.2%}  {row.seconds:6.1f} s  {verdict}"


# --- the table ----------------------------------------------------------------------------------------------------------


def table_text() -> str:
    """Return the results as a Markdown page."""
    rows = [Row(**row) for row in ROWS.read().values()]
    num_passed = sum(not row.failures for row in rows)
    lines = [
        f"# torchvision's classifiers: {num_passed} of {len(NAMES)} pass",
        "",
        "Written by `python -m tests.gator.sweep --render`; what is checked stands in [sweep.py](../../tests/gator/sweep.py).",
        "",
        "- passes: half of every group cut at random, once with a fifth of the removable groups empty: the pruned network equals",
        "  the gated one in eval mode to 1e-10 in float64 (*error*: the largest difference over the largest output); `MacsCost` +",
        "  `AttentionCost` and `ParamsCost` equal what is counted on it, exactly; saved and loaded, it is the same bit for bit; the",
        f"  groups at *px* are those at {NATIVE_SIZE} px (Inception: 299).",
        f"- reach: 1 - C(every group at one unit) / C(full), C being the MACs at {NATIVE_SIZE} px.",
        "- attention: share of products without a layer, such as attention's two, in all MACs at *px*.",
        "- trace s: on the meta device at full size, one thread, on a shared machine; `bench_trace.py` times it properly.",
        "",
        f"torch {', '.join(sorted({row.torch for row in rows}))}; source {', '.join(sorted({row.source for row in rows}))}.",
        "",
        "| network | px | groups | channels | blocks | GMACs | reach | attention | error | trace s | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_table_line, rows),
        "",
        "## What is locked",
        "",
        "| network | locked groups | channels | reason |",
        "| --- | --- | --- | --- |",
        *(line for row in rows for line in _locked_lines(row)),
    ]
    return "\n".join(lines) + "\n"


def _table_line(row: Row) -> str:
    cells = (
        *(row.model, row.image_size, row.num_groups, row.num_channels, row.num_blocks),
        *(f"{row.macs / 1e9:.3f}", f"{row.reach:.2%}", f"{row.attention_share:.1%}", f"{row.error:.0e}", row.trace_s),
        "passes" if not row.failures else "**fails**: " + escaped("; ".join(row.failures)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _locked_lines(row: Row) -> list[str]:
    """Return a line per reason, save the classifier's output, which every network has."""
    groups, channels = Counter[str](), Counter[str]()
    for _, num_channels, reason in row.locked:
        groups[reason] += 1
        channels[reason] += num_channels
    return [
        f"| {row.model} | {groups[reason]} | {channels[reason]} | {escaped(reason)} |"
        for reason in groups
        if (groups[reason], reason) != (1, "output of the model")
    ]


def main() -> int:
    """Run the command line; exit code 1 if a network that was named fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of torchvision classifiers")
    parser.add_argument("--all", action="store_true", help="every network without a result of this source")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="with --all: start none after this time")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, the last line of stdout")
    arguments = parser.parse_args()
    rows = [check(name) for name in arguments.models]
    for row in rows:
        print(json.dumps(asdict(row)) if arguments.json else line_of(row))
    if arguments.all:
        run_missing(arguments.seconds)
    if arguments.render:
        TABLE.write_text(table_text())
    return 0 if arguments.json else int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
