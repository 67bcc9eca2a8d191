"""The verb `describe`: show what can be removed from a network. It needs no data, no weights and no cluster.

    python -m orchestrator.describe resnet50
    python -m orchestrator.describe resnet20_cifar --kwargs width=8
    python -m orchestrator.describe vit_b_16 --image-size 384 --kwargs image_size=384
    python -m orchestrator.describe my_package.networks:tiny --image-size 64 --num-classes 10
    python -m orchestrator.describe resnet50 --latency runs/latency/resnet50_224px_b1_float32_eager_....parquet

Prints the channel groups with their members, their multiply-adds and parameters, the share of the network that pruning can
reach, and what is locked and why; with a latency table also which groups take more time than their multiply-adds say.
Exit 0: done. 2: a mistake in the command, or a network that cannot be traced.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import OrchestratorError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        print(
            describe(
                arguments.model, arguments.image_size, arguments.num_classes, dict(arguments.kwargs), arguments.latency
            )
        )
    except OrchestratorError as error:
        print(f"describe: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def describe(
    name: str, image_size: int | None, num_classes: int | None, kwargs: dict[str, Any], latency: Path | None = None
) -> str:
    """Return the text about the network of this name; None takes what its data sets are usually like.

    latency: file of a latency table that adds which groups take the time.

    Raises: ConfigError for a name, a number of classes or an argument that does not fit; UserError for a network that cannot
    be traced at this image size; LatencyTableError for a table that cannot be read or lacks layers of the network.
    """
    # Late: torch takes seconds to import, and --help should not wait for it.
    import torch

    import gator
    from orchestrator import models
    from orchestrator.config import ModelConfig
    from orchestrator.yaml_files import validate

    is_cifar = models.CIFAR_NAME.fullmatch(name) is not None
    size, classes = image_size or (32 if is_cifar else 224), num_classes or (10 if is_cifar else 1000)
    model = validate(ModelConfig, {"name": name, "num_classes": classes, "kwargs": kwargs}, "command line")
    # What a function of the user's does on the meta device, nobody knows.
    network = models.build(model) if ":" in name else models.skeleton(lambda: models.build(model))
    device = "cpu" if ":" in name else "meta"
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # torch prints its half-made graph; our message says it better
            graph = gator.trace(network, torch.zeros(1, 3, size, size, device=device))
    except gator.TraceError as error:
        raise UserError(f"{name} at --image-size {size}: {error}") from error
    if latency is None:
        return f"{name}: {graph}"
    from orchestrator.latency_files import read_table, table_text

    return f"{name}: {graph}\n\n{table_text(graph, read_table(latency))}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return number


def _keyword(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if equals and key:
            return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"the value of {text!r} is no YAML") from error
    raise argparse.ArgumentTypeError(f"found {text!r}, expected KEY=VALUE, such as width=8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orchestrator describe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a torchvision classifier, resnet<6n+2>_cifar, or package.module:function"
    )
    parser.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="height and width of an image (224; CIFAR ResNets 32)"
    )
    parser.add_argument(
        "--num-classes", type=_positive, metavar="N", help="outputs of the classifier (1000; CIFAR ResNets 10)"
    )
    parser.add_argument(
        "--kwargs",
        type=_keyword,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further argument of the network's function; may be given several times",
    )
    parser.add_argument(
        "--latency", type=Path, metavar="TABLE", help="a table of `orchestrator measure`: which groups take the time"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
