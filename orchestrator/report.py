"""The command `report`: show the results of a search, from its run directory alone.

    python -m orchestrator.report runs/digits                                 the table
    python -m orchestrator.report runs/digits --best-under latency_ms=4       the most accurate network within 4 ms
    python -m orchestrator.report runs/resnet50 --against paper                 next to the rows of Gator's paper
    python -m orchestrator.report runs/digits --importance                    how much each searched parameter matters
    python -m orchestrator.report runs/digits --format csv > digits.csv
    python -m orchestrator.report s3://bucket/runs/digits                     of a search in an object store
    python -m orchestrator.report runs/digits --format html                   writes runs/digits/report.html again

Exit codes: 0 success; 1 no network within the limits, or too few finished trials for --importance; 2 invalid run directory
or argument.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.cli import fail, find_run, run_command
from orchestrator.config.metrics import NETWORK_METRICS
from orchestrator.errors import UserError, did_you_mean
from orchestrator.masking import MaskingParser, printable
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.page import write_report
from orchestrator.reporting.paper import comparison_text
from orchestrator.reporting.table import csv_text, print_table, sentence, summary_text
from orchestrator.storage.addresses import is_address, joined
from orchestrator.storage.fetching import fetched
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import latency_columns


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command("report", argv, lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> int:
    if not is_address(arguments.run_dir):
        return _report_on(find_run(Path(arguments.run_dir)), arguments)
    if arguments.format == "html":
        raise UserError(
            f"--format html writes the page into the run directory; open {joined(arguments.run_dir, 'report.html')}, which the search "
            "has written, or copy the run directory to a disk"
        )
    with fetched(arguments.run_dir, "*.json", "*.parquet", "*.csv") as folder:
        return _report_on(RunPaths(folder), arguments)


def _report_on(run: RunPaths, arguments: argparse.Namespace) -> int:
    outcome = Outcome.load(run)
    if arguments.best_under:
        return _show_best_under(outcome, arguments.format, dict(arguments.best_under))
    if arguments.importance:
        return _show_importance(outcome)
    if arguments.against:
        print(printable(comparison_text(outcome, run)))
    else:
        _show(outcome, run, arguments.format)
    return 0


def _show(outcome: Outcome, run: RunPaths, form: str) -> None:
    if form == "html":
        write_report(run)
        print(run.report)
    elif form == "csv":
        print(csv_text(outcome), end="")
    else:
        print_table(outcome)
        print(f"\n{summary_text(outcome)}")


def _show_best_under(outcome: Outcome, form: str, limits: Mapping[str, float]) -> int:
    _check_limits(outcome, form, limits)
    bounds = " and ".join(f"{name} <= {limit:g}" for name, limit in limits.items())
    best = outcome.best_under(limits)
    if best is None:
        fail("report", f"no finished trial has {bounds} (sought: {outcome.question})")
        return 1
    if form == "csv":
        print(csv_text(outcome, [best]), end="")
        return 0
    shown = tuple(row for row in outcome.rows if row is best or row is outcome.unpruned)
    print_table(dataclasses.replace(outcome, rows=shown))
    print(f"\nbest {outcome.config.objectives[0].metric} with {bounds}: {sentence(best, outcome)}")
    return 0


def _show_importance(outcome: Outcome) -> int:
    from orchestrator.reporting.importance import MIN_TRIALS, importances

    shares = importances(outcome)
    if not shares:
        needed = f"--importance needs {MIN_TRIALS} finished trials that differ in two searched parameters"
        found = f"found {outcome.counts}; searched parameters: {', '.join(outcome.config.params) or 'none'}"
        fail("report", f"{needed}; {found}")
        return 1
    for metric, by_param in shares.items():
        print(printable(f"{metric}: {', '.join(f'{name} {share:.0%}' for name, share in by_param.items())}"))
    return 0


def _check_limits(outcome: Outcome, form: str, limits: Mapping[str, float]) -> None:
    if form == "html":
        raise UserError("--best-under goes with --format table or csv; the page always shows the whole search")
    known = list(dict.fromkeys([*latency_columns(outcome.rows), *NETWORK_METRICS]))
    for name in limits:
        if name not in known:
            raise UserError(f"--best-under: {name} is not a metric of this search{did_you_mean(name, known)}")


def _limit(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError as error:
        message = f"found {text!r}, expected METRIC=LIMIT with a number, such as latency_ms=4"
        raise argparse.ArgumentTypeError(message) from error


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(prog="orchestrator report", description="Show what a search has found.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory of a search, its name or address")
    parser.add_argument(
        "--format",
        choices=("table", "csv", "html"),
        default="table",
        help="how to show it (default: %(default)s); html rewrites RUN_DIR/report.html",
    )
    parser.add_argument(
        "--best-under",
        type=_limit,
        action="append",
        default=[],
        metavar="METRIC=LIMIT",
        help="show only the best network with METRIC <= LIMIT; may be repeated",
    )
    parser.add_argument("--against", choices=("paper",), help="compare Gator's paper with the trials nearest in MACs")
    parser.add_argument(
        "--importance",
        action="store_true",
        help="show only each parameter's share of the objectives' variance (fANOVA)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
