"""`python -m orchestrator`, also installed as `orchestrator`: runs one of the verbs, each a module with a main()."""

import importlib
import sys
from collections.abc import Sequence

from orchestrator.errors import did_you_mean
from orchestrator.masking import masked

VERBS = {
    "search": "search for the best pruned networks (Pareto front)",
    "train": "prune one network over all workers, without a search",
    "measure": "build latency tables on every kind of accelerator of a cluster",
    "report": "show what a search has found",
    "describe": "show what can be removed from a network",
    "data": "pack images into Parquet shards, and check shards",
    "export": "write the network of a trial as ONNX or as a torch.export program",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first argument names and return its exit code; without one, list the verbs."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"orchestrator: {masked(verb)} is no verb{did_you_mean(verb, tuple(VERBS))}", file=sys.stderr)
        return 2
    # only the verb that was asked for: each brings its own heavy imports
    exit_code: int = importlib.import_module(f"orchestrator.{verb}").main(rest)
    return exit_code


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {summary}" for verb, summary in VERBS.items()]
    return "usage: orchestrator VERB ...      orchestrator VERB --help\n\n" + "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
