"""The laws of pruning on the networks that people bring (networks.py), as one table: exact, refused with a reason, or wrong.

    python -m tests.gator.survey --all                       those without a result of this source, each in a process of its own
    python -m tests.gator.survey --all --seconds 200         the same in pieces: start none after 200 s
    python -m tests.gator.survey timm/swin_transformer       these now, in this process; prints a line each
    python -m tests.gator.survey --render                    write the table, benchmarks/results/networks.md

timm comes with the test extras. ultralytics and transformers are in no requirement of this project; into a folder of their own:
`pip install --target FOLDER ultralytics transformers`, then PYTHONPATH=FOLDER before the command. Without them their rows stay as they are.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import gator
from benchmarks.row_file import RESULTS, RowFile, escaped, json_of_process, source_hash
from gator.checking.comparing import TOLERANCE_OF_FLOAT32, rounds_inside
from gator.checking.verify import verify
from gator.costs.counter import count_macs
from gator.costs.summary import summarise
from gator.errors import GatorError, VerificationError
from tests.gator.law import tensors_of
from tests.gator.networks import NETWORKS
from tests.gator.sweep import TOLERANCE, lively, random_half

ROWS = RowFile(RESULTS / "networks.jsonl")
TABLE = RESULTS / "networks.md"
TIMEOUT_S = 900
OUTPUT = "output of the model"
EXACT, REFUSED, WRONG = "exact", "refused", "**wrong**"


@dataclass
class Row:
    """What was found for one network."""

    model: str
    source: str
    versions: str = ""
    result: str = WRONG
    reason: str = ""
    """Why it is refused, or what is wrong."""
    num_groups: int = 0
    num_channels: int = 0
    """Channels that can be cut."""
    locked: dict[str, int] = field(default_factory=dict)
    """Reason -> channels that cannot, without those of the network's outputs."""
    reach: float = 0.0
    """1 - C(every group at one unit) / C(full), C being the MACs of convolutions and linear layers."""
    error: float = 0.0
    """Largest difference of pruned and gated outputs, over the largest output."""
    costs: str = ""
    """"equal" if they are what torch counts, else both."""
    seconds: float = 0.0


def check(name: str) -> Row:
    """Check the laws on one network. An exception that is not gator's own is a failure too; its traceback goes to stderr."""
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide the projections from the counter
    warnings.simplefilter("ignore")
    row, began = (
        Row(name, source_hash(__file__, Path(__file__).with_name("networks.py")), _versions(name)),
        time.perf_counter(),
    )
    try:
        _check(name, row)
        row.result = EXACT
    except VerificationError as error:
        row.reason = _one_line(error)
    except GatorError as error:
        row.result, row.reason = REFUSED, _one_line(error)
    except Exception as error:
        traceback.print_exc()
        row.reason = f"{type(error).__name__}: {_one_line(error)}"
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _versions(name: str) -> str:
    return ", ".join(f"{package} {version(package)}" for package in dict.fromkeys((_package(name), "torch")))


def _package(name: str) -> str:
    package = name.partition("/")[0]
    return "torch" if package == "own" else package


def _check(name: str, row: Row) -> None:
    network = NETWORKS[name]

    def build() -> nn.Module:
        """Return the network, the same in each call."""
        torch.manual_seed(0)
        return lively(network.build().double().eval())

    model, inputs = build(), network.inputs(2)
    graph = gator.trace(model, network.inputs(1))
    row.num_groups, row.num_channels = len(graph.groups), graph.num_channels
    for locked in graph.locked:
        if locked.reason != OUTPUT:
            row.locked[locked.reason] = row.locked.get(locked.reason, 0) + locked.num_channels
    row.reach = round(summarise(graph).macs.reachable, 4)
    for empty in (0.2, 0.0):  # the last one is saved
        architecture = gator.Architecture.from_keep(graph, random_half(graph, empty))
        pruned = gator.prune(model, graph, architecture)
        row.error = max(row.error, _difference(model, pruned, architecture, graph, inputs))
    row.costs = _costs(pruned, graph, architecture, inputs)
    tolerance = TOLERANCE_OF_FLOAT32 if rounds_inside(pruned, inputs) else TOLERANCE
    assert row.error <= tolerance, f"pruned differs from gated by {row.error:.1e}"
    assert row.costs.startswith("equal"), row.costs
    _check_artifact(pruned, architecture, inputs, build)
    verify(model, graph, inputs)


@torch.no_grad()
def _difference(
    model: nn.Module,
    pruned: nn.Module,
    architecture: gator.Architecture,
    graph: gator.ChannelGraph,
    inputs: tuple[Tensor, ...],
) -> float:
    """Return how far the pruned network is from the gated one, relative to the largest value of each output."""
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    errors = []
    for one, other in zip(tensors_of(pruned(*inputs)), tensors_of(gated(*inputs)), strict=True):
        errors.append(float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)))
    return float(torch.tensor(errors).max())  # nan, if one is


def _costs(
    pruned: nn.Module, graph: gator.ChannelGraph, architecture: gator.Architecture, inputs: tuple[Tensor, ...]
) -> str:
    counted = sum(count_macs(pruned, *(x[:1] for x in inputs))[""].values())
    macs = gator.MacsCost(graph)(architecture) + gator.AttentionCost(graph)(architecture)
    num_params, params = sum(p.numel() for p in pruned.parameters()), gator.ParamsCost(graph)(architecture)
    if abs(macs - counted) > 1e-9 * counted and not graph.uncounted:
        return f"MACs: {macs:,.0f} said, {counted:,.0f} counted"
    equal = f"equal except {', '.join(sorted(set(graph.uncounted)))}" if graph.uncounted else "equal"
    return equal if params == num_params else f"parameters: {params:,.0f} said, {num_params:,} there"


def _check_artifact(
    pruned: nn.Module, architecture: gator.Architecture, inputs: tuple[Tensor, ...], build: Callable[[], nn.Module]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gator.save_pruned(pruned, architecture, folder)
        loaded = gator.load_pruned(folder, build=build)
    with torch.no_grad():
        pairs = zip(tensors_of(loaded(*inputs)), tensors_of(pruned(*inputs)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), "saved and loaded, it gives other outputs"


# --- one process each ---------------------------------------------------------------------------------------------------


def run_missing(seconds: float) -> None:
    """Check every network that has no row of this source yet, one process each; start none after `seconds`."""
    source = source_hash(__file__, Path(__file__).with_name("networks.py"))
    installed = [name for name in NETWORKS if importlib.util.find_spec(_package(name))]
    ROWS.fill(
        ROWS.missing(installed, source),
        seconds,
        lambda name: asdict(in_own_process(name)),
        lambda row: line_of(Row(**row)),
    )


def in_own_process(name: str) -> Row:
    """Check one network in a process of its own, which ends with its memory."""
    found = json_of_process("tests.gator.survey", name, TIMEOUT_S)
    source = source_hash(__file__, Path(__file__).with_name("networks.py"))
    return Row(name, source, _versions(name), reason=found) if isinstance(found, str) else Row(**found)


def line_of(row: Row) -> str:
    """Return a row as one line for the terminal."""
    numbers = f"{row.num_groups:4} groups  channels {_share(row):>6}  reach {row.reach:6.1%}  {row.seconds:5.1f} s"
    return f"{row.model:36} {numbers}  {row.result} {row.reason} {_locks(row)}".rstrip()


def _share(row: Row) -> str:
    total = row.num_channels + sum(row.locked.values())
    return f"{row.num_channels / total:.0%}" if total else "-"


def _locks(row: Row) -> str:
    return "; ".join(f"{channels}: {reason}" for reason, channels in Counter(row.locked).most_common(2))


# --- the table ----------------------------------------------------------------------------------------------------------


def table_text() -> str:
    """Return the results as a Markdown page."""
    rows = [Row(**row) for name, row in ROWS.read().items() if name in NETWORKS]
    results = Counter(row.result for row in rows)
    exact = [row for row in rows if row.result == EXACT]
    most = [row for row in exact if row.num_channels >= 0.8 * (row.num_channels + sum(row.locked.values()))]
    lines = [
        f"# Networks that people bring: {results[EXACT]} of {len(rows)} exact, {results[REFUSED]} refused, {results[WRONG]} wrong",
        "",
        "Written by `python -m tests.gator.survey --render`.",
        "What is checked is in [survey.py](../../tests/gator/survey.py), the networks are in [networks.py](../../tests/gator/networks.py).",
        "",
        f"{len(rows)} of {len(NETWORKS)} networks: one small network of each of timm's 98 module families, torchvision's 80 classifiers, "
        f"segmentation, detectors (backbone, pyramid, heads), video, YOLO, transformers, and three written here.",
        f"At least 80 % of the channels can be cut in {len(most)} of the {len(exact)} exact ones.",
        "",
        "- exact: half of every group cut at random, once with a fifth of the removable groups empty, the pruned network equals the",
        "  gated one in eval mode to 1e-10 in float64; it equals the unpruned one whose closed channels are silenced; training mode,",
        "  gradients and costs are right (`gator.verify`); saved and loaded, it gives the same outputs.",
        "- refused: gator raises an error of its own, before anything is trained. wrong: anything else.",
        "- channels: share that can be cut, of all except the network's outputs. reach: 1 - C(every group at one unit) / C(full).",
        "",
        f"{'; '.join(sorted({row.versions for row in rows}))}. Source {', '.join(sorted({row.source for row in rows}))}.",
        "",
        "| network | result | groups | channels | reach | error | costs | reason; most locked channels |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_table_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _table_line(row: Row) -> str:
    without = NETWORKS[row.model].without
    reasons = [row.reason, _locks(row), f"without {without}" if without else ""]
    cells = (
        *(escaped(row.model), row.result, row.num_groups, _share(row), f"{row.reach:.1%}", f"{row.error:.0e}"),
        *(escaped(row.costs), escaped("; ".join(filter(None, reasons)))),
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Run the command line; exit code 1 if a network that was named is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="SOURCE/NAME", help="names in NETWORKS")
    parser.add_argument("--all", action="store_true", help="every network without a result of this source")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="with --all: start none after this time")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, the last line of stdout")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        rows.append(row := check(name))
        print(json.dumps(asdict(row)) if arguments.json else line_of(row), flush=True)
    if arguments.all:
        run_missing(arguments.seconds)
    if arguments.render:
        TABLE.write_text(table_text())
    return 0 if arguments.json else int(any(row.result == WRONG for row in rows))


if __name__ == "__main__":
    sys.exit(main())
