"""The command `measure`: build latency tables of a network on every kind of accelerator of the cluster.

    python -m orchestrator.measure --model resnet50 --batch 1,32 --dtype float16 --runtime cuda_graph
    python -m orchestrator.measure --model resnet50 --runtime onnxruntime
    python -m orchestrator.measure --model resnet20_cifar --kwargs width=8 --image-size 8

The table is saved after every batch of measurements. Rerun the command to resume, or to add missing layers after the model
changed.
Exit codes: 0 success; 1 a device or its process failed; 2 invalid command, or a damaged table; 130 after Ctrl-C, 143 after
SIGTERM.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from orchestrator.cli import (
    MODEL_HELP,
    KeepLines,
    add_model_options,
    chosen_model,
    configure_logging,
    located,
    positive,
    run_command,
)
from orchestrator.config.base import with_home
from orchestrator.config.messages import validate
from orchestrator.config.trial import ProfileConfig
from orchestrator.masking import MaskingParser

if TYPE_CHECKING:
    from orchestrator.latency.measurers import Task

AUTO = {
    "runtime": ("what runs the network", "cuda_graph on GPUs, else eager"),
    "dtype": ("precision", "float16 on GPUs, else float32"),
    "layout": ("memory layout of images and weights", "channels_last on GPUs, else contiguous"),
}
"""Option -> what it sets, and what auto is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command("measure", argv, lambda: _build(arguments))


def _build(arguments: argparse.Namespace) -> int:
    # Late: torch and Ray take seconds to import, and --help should not wait for them.
    from orchestrator.cluster.connection import session
    from orchestrator.config.cluster import load_cluster
    from orchestrator.latency.build_progress import BuildProgress
    from orchestrator.latency.table_build import build_everywhere, result_text

    console = Console(stderr=True)
    configure_logging(console)
    cluster = load_cluster(arguments.cluster)
    tasks = _tasks(arguments)
    with session(cluster), BuildProgress(console) as progress:
        built = build_everywhere(tasks, located(arguments.out), cluster.measure_on, progress)
    for path, task in built:
        print(result_text(path, task))
    return 0


def _tasks(arguments: argparse.Namespace) -> "list[Task]":
    """Return what to measure for each batch size. Raises: ConfigError for a model that cannot be built."""
    from orchestrator.latency.measurers import Task
    from orchestrator.models import networks as models

    model, image_size = chosen_model(arguments)
    models.check(model)
    settings = {name: getattr(arguments, name) for name in ("runtime", "dtype", "layout", "num_threads")}
    return [
        Task(
            model=model,
            image_size=image_size,
            profile=validate(ProfileConfig, {**settings, "batch_sizes": [batch_size]}, "measure"),
        )
        for batch_size in arguments.batch
    ]


def _sizes(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected batch sizes such as 1,32")
    return [int(size) for size in text.split(",")]


def _folder(text: str) -> str:
    try:
        return with_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}, {error}") from error


def _old_name_of_runtime(text: str) -> str:
    raise argparse.ArgumentTypeError(f"the option is now --runtime: use --runtime {text}")


def _choices(option: str) -> tuple[str, ...]:
    return get_args(ProfileConfig.model_fields[option].annotation)


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(prog="orchestrator measure", description=__doc__, formatter_class=KeepLines)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_model_options(parser)
    parser.add_argument(
        "--batch",
        type=_sizes,
        default=[1],
        metavar="N,N",
        help="batch sizes, in images, a table for each (default: 1)",
    )
    for option, (what, auto) in AUTO.items():
        parser.add_argument(
            f"--{option}",
            choices=_choices(option),
            default="auto",
            help=f"{what}, as profile.{option} of a space (default: auto, which is {auto})",
        )
    parser.add_argument("--mode", type=_old_name_of_runtime, help=argparse.SUPPRESS)
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        dest="num_threads",
        help="CPU threads of a forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=_folder,
        default="runs/latency",
        metavar="DIR",
        help="folder of the tables (default: %(default)s)",
    )
    parser.add_argument(
        "--cluster", default="local", metavar="NAME", help="clusters/ name or YAML file (default: local, this machine)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
