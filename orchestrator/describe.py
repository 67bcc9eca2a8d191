"""The command `describe`: show what can be removed from a network. It needs no data, no weights and no cluster.

    python -m orchestrator.describe resnet50
    python -m orchestrator.describe resnet20_cifar --kwargs width=8
    python -m orchestrator.describe vit_b_16 --image-size 384 --kwargs image_size=384
    python -m orchestrator.describe my_package.networks:tiny --image-size 64 --num-classes 10
    python -m orchestrator.describe resnet50 --latency runs/latency/resnet50_224px_b1_float32_eager_....parquet

First cuts the network with random weights in two ways, and checks in float64 that the result is exact (seconds; --no-verify leaves this
out). Prints the channel groups with their members, MACs and parameters, the share of the network that can be pruned, and which
channels are locked and why; with a latency table also which groups take more time than their MACs suggest.
Exit codes: 0 success; 2 invalid command, or a network that cannot be traced or pruned exactly.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

from orchestrator.cli import MODEL_HELP, add_model_options, chosen_model, run_command
from orchestrator.config.trial import ModelConfig
from orchestrator.masking import MaskingParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)

    def body() -> int:
        """Return the exit code of the description, printed."""
        model, image_size = chosen_model(arguments)
        print(describe(model, image_size, arguments.latency, verify=not arguments.no_verify))
        return 0

    return run_command("describe", argv, body)


def describe(model: ModelConfig, image_size: int, latency: Path | None = None, verify: bool = True) -> str:
    """Return the text about the network.

    latency: file of a latency table, which adds the time that each group takes.    verify: check first that it is pruned exactly.

    Raises: ConfigError for a name, a number of classes or an argument that does not fit, or a network that cannot be traced at
    this image size or pruned exactly; LatencyTableError for a table that cannot be read or lacks layers of the network.
    """
    # Late: torch takes seconds to import, and --help should not wait for it.
    from orchestrator.models import networks as models

    logging.getLogger("torch").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):  # torch prints its partial graph; the ConfigError is clearer
        graph = models.trace_shapes(model, image_size, 1)
        if verify:
            models.verify(model, image_size)
    if latency is None:
        return f"{model.name}: {graph}"
    from orchestrator.latency.tables import read_table, table_text

    return f"{model.name}: {graph}\n\n{table_text(graph, read_table(latency))}"


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(
        prog="orchestrator describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_model_options(parser)
    parser.add_argument(
        "--latency", type=Path, metavar="TABLE", help="a table of `orchestrator measure`: which groups take the time"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="leave out the check that the network is pruned exactly"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
