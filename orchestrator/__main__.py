"""`python -m orchestrator`, also installed as `orchestrator`: runs one of the commands, each a module with a main()."""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from orchestrator.errors import did_you_mean
from orchestrator.masking import masked

COMMANDS = {
    "search": "search for the best pruned networks (Pareto front)",
    "steer": "change a search while it runs: end a trial, start no further one, run more or fewer at once",
    "train": "prune one network over all workers, without a search",
    "measure": "build a latency table on every kind of accelerator of a cluster; needed for target_ms",
    "report": "show what a search has found",
    "describe": "list the prunable channels of a network, and explain what is locked",
    "data": "pack images into Parquet shards, and verify shards",
    "export": "write the network of a trial as ONNX or as a torch.export program",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names and return its exit code; without one, list the commands."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"gator-search {version('gator-search')}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(
            f"orchestrator: unknown command {masked(command)}{did_you_mean(command, tuple(COMMANDS))}", file=sys.stderr
        )
        return 2
    # only the command that was asked for: each has its own heavy imports
    exit_code: int = importlib.import_module(f"orchestrator.{command}").main(rest)
    return exit_code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command.ljust(width)}  {summary}" for command, summary in COMMANDS.items()]
    return (
        "usage: orchestrator COMMAND ...      orchestrator COMMAND --help      orchestrator --version\n\n"
        + "\n".join(lines)
    )


if __name__ == "__main__":
    sys.exit(main())
