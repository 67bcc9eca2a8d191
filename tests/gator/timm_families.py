"""The law of pruning on 48 networks of timm, chosen before any was tried: half of every group cut at random.

    python -m tests.gator.timm_families                  check those without a result of this source; prints a line each
    python -m tests.gator.timm_families --seconds 200    the same in pieces: start none after 200 s
    python -m tests.gator.timm_families repvgg_a0        these, whether or not they have a result
    python -m tests.gator.timm_families --render         write the table, benchmarks/results/timm.md

An earlier check: tests.gator.survey has a network of each of timm's modules.
"""

import argparse
import math
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch

import gator
from benchmarks.row_file import RESULTS, RowFile, escaped, source_hash
from gator.costs.counter import count_macs
from gator.costs.summary import summarise
from tests.gator.sweep import TOLERANCE, is_alive, lively, random_half, relative_error

ROWS = RowFile(RESULTS / "timm.jsonl")
TABLE = RESULTS / "timm.md"
TIMEOUT_S = 300
IMAGE_SIZE = 64
OTHER_IMAGE_SIZE = {"inception_v4": 96, "efficientformerv2_s0": 224}  # the smallest these take

# Chosen before any was tried: the smallest network of its kind; not every module of timm has one here.
CONVOLUTIONAL = (
    *("resnet10t", "seresnext26d_32x4d", "eca_resnet33ts", "skresnet18", "resnest14d", "res2net50_14w_8s", "vgg11_bn"),
    *(
        "densenet121",
        "dpn48b",
        "dla46_c",
        "hrnet_w18_small",
        "inception_v4",
        "xception41",
        "selecsls42",
        "cspdarknet53",
    ),
    *("ese_vovnet19b_slim", "hgnetv2_b0", "gernet_s", "repvgg_a0", "mobileone_s0", "repvit_m0_9", "starnet_s1"),
    *(
        "mobilenetv2_035",
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small_035",
        "mnasnet_small",
        "tf_efficientnet_lite0",
    ),
    *("efficientnetv2_rw_t", "mixnet_s", "ghostnet_050", "lcnet_035", "rexnetr_200", "regnetx_002", "regnety_002"),
    *("regnetz_005", "nf_regnet_b0", "inception_next_atto", "convnext_atto", "convnextv2_atto", "poolformer_s12"),
)
ATTENDING = ("edgenext_xx_small", "fastvit_t8", "mobilevit_xxs", "efficientformerv2_s0")
OF_TOKENS: dict[str, dict[str, Any]] = {  # they read the image size when they are built
    "vit_tiny_patch16_224": {"img_size": IMAGE_SIZE},
    "mixer_s32_224": {"img_size": IMAGE_SIZE},
    "resmlp_12_224": {"img_size": IMAGE_SIZE},
    "swin_tiny_patch4_window7_224": {"img_size": IMAGE_SIZE, "window_size": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {**{name: {} for name in CONVOLUTIONAL + ATTENDING}, **OF_TOKENS}


@dataclass
class Row:
    """What was found for one network. `failure` is empty when the law holds."""

    model: str
    source: str
    versions: str = f"timm {timm.__version__}, torch {torch.__version__}"
    failure: str = ""
    num_groups: int = 0
    reach: float = 0.0
    """1 - C(every group at one unit) / C(full), C being the MACs of convolutions and linear layers."""


def check(name: str) -> Row:
    """Check one network. An exception is a failure too."""
    row = Row(name, source_hash(__file__))
    try:
        with _time_limit(), torch.inference_mode():
            assert_law(name, row)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    return row


def assert_law(name: str, row: Row) -> None:
    """Trace and cut one network; assert that masked and cut outputs agree and that costs are those of the cut network."""
    torch.manual_seed(0)
    model = lively(timm.create_model(name, pretrained=False, num_classes=10, **FAMILIES[name]).double().eval())
    size = OTHER_IMAGE_SIZE.get(name, IMAGE_SIZE)
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    graph = gator.trace(model, images)
    row.num_groups, row.reach = len(graph.groups), round(summarise(graph).macs.reachable, 4)
    assert row.num_groups > 0, "nothing can be cut"
    architecture = gator.Architecture.from_keep(graph, random_half(graph, empty=0.2))
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    masked, pruned = gated(images), gator.prune(model, graph, architecture)
    error = relative_error(pruned(images), masked)
    assert is_alive(masked, model(images)), "the cut cannot be seen in the output: the check would prove nothing"
    assert error <= TOLERANCE, f"pruned differs from masked by {error:.1e}"
    macs = gator.MacsCost(graph)(architecture) + gator.AttentionCost(graph)(architecture)
    counted = sum(count_macs(pruned, images)[""].values())
    assert math.isclose(macs, counted, rel_tol=1e-12), (
        f"MacsCost and AttentionCost say {macs:,.0f}, the counter {counted:,.0f}"
    )
    assert gator.ParamsCost(graph)(architecture) == sum(p.numel() for p in pruned.parameters()), (
        "ParamsCost is not what is there"
    )


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not done in {TIMEOUT_S} s of CPU time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def line_of(row: Row) -> str:
    """Return a row as one line for the terminal."""
    return f"{row.model:30} {row.num_groups:4} groups  reach {row.reach:7.2%}  {row.failure or 'passes'}"


def table_text() -> str:
    """Return the results as a Markdown page."""
    rows = [Row(**row) for row in ROWS.read().values()]
    passed = [row for row in rows if not row.failure]
    return "\n".join(
        [
            f"# timm: {len(passed)} of {len(rows)} networks pass",
            "",
            "Written by `python -m tests.gator.timm_families --render`; what is checked, and how the networks were chosen, stands in",
            "[timm_families.py](../../tests/gator/timm_families.py): half of every group cut at random, a fifth of the removable",
            "groups empty; pruned equals gated in eval mode to 1e-10 in float64; MACs and parameters are as counted.",
            "",
            "An earlier table: [networks.md](networks.md) has a network of each of timm's modules, by later code.",
            "",
            f"{IMAGE_SIZE} px ({', '.join(f'{name} {size}' for name, size in OTHER_IMAGE_SIZE.items())}), 10 classes. "
            f"{', '.join(sorted({row.versions for row in rows}))}; "
            f"source {', '.join(sorted({row.source for row in rows}))}.",
            "",
            "| network | groups | reach | verdict |",
            "| --- | --- | --- | --- |",
            *map(_table_line, rows),
            "",
        ]
    )


def _table_line(row: Row) -> str:
    verdict = f"**fails**: {escaped(row.failure)}" if row.failure else "passes"
    return f"| {escaped(row.model)} | {row.num_groups} | {row.reach:.1%} | {verdict} |"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names in FAMILIES")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no network after this time")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide the projections from the counter
    warnings.simplefilter("ignore")
    if not arguments.render:
        names = arguments.models or ROWS.missing(list(FAMILIES), source_hash(__file__))
        ROWS.fill(names, arguments.seconds, lambda name: asdict(check(name)), lambda row: line_of(Row(**row)))
    else:
        TABLE.write_text(table_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
