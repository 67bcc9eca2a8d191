"""The verb `measure`: build latency tables of a network on every kind of accelerator of the cluster.

    python -m orchestrator.measure --model resnet50 --batch 1,32 --dtype fp16 --mode cuda_graph
    python -m orchestrator.measure --model resnet18 --image-size 96 --method halving
    python -m orchestrator.measure --model resnet20_cifar --kwargs width=8 --image-size 8

A table is complete after every portion of timings: stopped, or begun again for a changed network, the command goes on with
what its file lacks.
Exit 0: done. 1: a device or its process failed. 2: a mistake in the command, or a table that is damaged. 130, 143: stopped.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from orchestrator.cli import (
    MODEL_HELP,
    KeepLines,
    add_model_options,
    chosen_model,
    configure_logging,
    positive,
    run_verb,
)
from orchestrator.masking import MaskingParser

if TYPE_CHECKING:
    from orchestrator.latency.measurers import Task

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_verb("measure", argv, lambda: _build(arguments))


def _build(arguments: argparse.Namespace) -> int:
    # Late: torch and Ray take seconds to import, and --help should not wait for them.
    from orchestrator.cluster.connection import session
    from orchestrator.config.cluster import load_cluster
    from orchestrator.latency.build_progress import shown_on
    from orchestrator.latency.table_build import build_everywhere, result_text

    console = Console(stderr=True)
    configure_logging(console)
    cluster = load_cluster(arguments.cluster)
    tasks = _tasks(arguments)
    with session(cluster), shown_on(console) as steps:
        built = build_everywhere(tasks, Path(arguments.out), cluster.measure_on, steps)
    for path, task in built:
        print(result_text(path, task))
    return 0


def _tasks(arguments: argparse.Namespace) -> "list[Task]":
    """Return what to measure for each batch size. Raises: ConfigError for a model that cannot be built."""
    from orchestrator.latency.measurers import Task
    from orchestrator.models import networks as models

    model, image_size = chosen_model(arguments)
    models.check(model)
    return [
        Task(
            model=model,
            image_size=image_size,
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
    parser = MaskingParser(prog="orchestrator measure", description=__doc__, formatter_class=KeepLines)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_model_options(parser)
    parser.add_argument("--batch", type=_sizes, default=[1], metavar="N,N", help="batch sizes, a table for each (1)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--mode", choices=("eager", "cuda_graph", "compile"), default="eager")
    parser.add_argument(
        "--method",
        choices=("table", "halving"),
        default="table",
        help="single calls, or whole networks with one group halved",
    )
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="threads of a forward pass on a CPU (1)"
    )
    parser.add_argument("--out", default="runs/latency", metavar="DIR", help="folder of the tables (runs/latency)")
    parser.add_argument("--cluster", default="local", metavar="NAME", help="a name in clusters/ or a YAML file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
