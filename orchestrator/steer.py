"""The command `steer`: change a search while it runs, through its run directory.

    python -m orchestrator.steer runs/digits --end trial_0007         this trial is stopped; the search continues
    python -m orchestrator.steer runs/digits --drain                  no further trial starts; running ones finish
    python -m orchestrator.steer runs/digits --max-concurrent 4       so many trials at once from now on

Works on every machine that mounts the storage. The search reads requests every two seconds and logs each. A trial that was
ended counts as stopped, or as failed before its first epoch. What --drain leaves out, the search's command runs later.
Exit codes: 0 the search was asked; 2 invalid run directory or argument, or no search runs there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli import KeepLines, find_run, positive, run_command
from orchestrator.errors import UserError
from orchestrator.masking import MaskingParser
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.requests import Request, Requests
from orchestrator.storage.run_dir import is_claimed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command("steer", argv, lambda: _steer(arguments))


def _steer(arguments: argparse.Namespace) -> int:
    run = find_run(arguments.run_dir)
    outcome = Outcome.load(run)
    if not is_claimed(run):
        raise UserError(
            f"no search runs in {run.root}; start it with its own command, or name the folder of a running one"
        )
    if arguments.end is not None:
        _check_runs(arguments.end, run, outcome)
    Requests(run).add(Request(end=arguments.end, drain=arguments.drain, max_concurrent=arguments.max_concurrent))
    print(f"asked the search in {run.root}; it answers in its log")
    return 0


def _check_runs(trial_id: str, run: RunPaths, outcome: Outcome) -> None:
    """Raise UserError unless the trial has started and has no result."""
    running = [name for name in run.trial_ids() if name not in {row["trial_id"] for row in outcome.rows}]
    if trial_id not in running:
        raise UserError(f"{trial_id} does not run in {run.root}; expected one of: {', '.join(running) or 'none runs'}")


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(prog="orchestrator steer", description=__doc__, formatter_class=KeepLines)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="run directory of a running search, or its name in runs/"
    )
    request = parser.add_mutually_exclusive_group(required=True)
    request.add_argument("--end", metavar="TRIAL", help="stop this trial or baseline")
    request.add_argument("--drain", action="store_true", help="start no further trial")
    request.add_argument(
        "--max-concurrent", type=positive, metavar="N", help="most trials at once, as far as the cluster allows"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
