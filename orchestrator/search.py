"""The command `search`: search for the best pruned networks (Pareto front).

    python -m orchestrator.search                              the digits space on this machine
    python -m orchestrator.search fashion_mnist --set search.num_trials=32
    python -m orchestrator.search imagenet_resnet50_macs --cluster aws --dry-run
    python -m orchestrator.search --from-run 5f0c...           repeat one trial from its record in MLflow

Rerun the command to resume a search that was stopped, or to print the table of a finished one.
Exit codes: 0 success; 1 the search or every trial failed; 2 invalid command, YAML file or run directory, reported as one
error; 130 after Ctrl-C, 143 after SIGTERM: finished work is kept.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from rich.console import Console

from orchestrator.cli import (
    DEFAULT_SPACE,
    KeepLines,
    add_arguments,
    chosen_cluster,
    fail,
    mirror_of,
    run_folder,
    run_plan,
)
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.search import SearchConfig
from orchestrator.errors import ConfigError, RunDirError, TrackingError, UserError
from orchestrator.masking import MaskingParser, masked, printable
from orchestrator.planning.plan import SearchPlan
from orchestrator.planning.space import load_space
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.progress import Progress
from orchestrator.reporting.table import print_table, summary_text
from orchestrator.storage.files import read_text
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_metrics
from orchestrator.tuning import estimates
from orchestrator.tuning.budget import Budget


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_plan(_parser(), argv, _make_plan, _plan_text, _search)


def _make_plan(arguments: argparse.Namespace) -> SearchPlan:
    cluster = chosen_cluster(arguments)
    config = _config(arguments, cluster)
    if not config.params and config.search.num_trials > 1:
        raise ConfigError(
            f"space {config.name}: params is empty, so all {config.search.num_trials} trials would be the same; add parameters "
            "under params, give --set search.num_trials=1, or use python -m orchestrator.train"
        )
    Budget.of(config.search, cluster)  # refuses GPU hours without GPUs
    storage, folder = run_folder(cluster, arguments, config.name, RunPaths.CONFIG)
    cluster, run = cluster.model_copy(update={"storage": str(storage.root)}), RunPaths(folder)
    return SearchPlan(
        config=config,
        cluster=cluster,
        storage=storage,
        run=run,
        promotes=arguments.promote,
        mirror=mirror_of(storage, run, arguments),
    )


def _config(arguments: argparse.Namespace, cluster: ClusterConfig) -> SearchConfig:
    if arguments.from_run is None:
        return load_space(arguments.space or DEFAULT_SPACE, arguments.set)
    if arguments.space is not None or arguments.set:
        raise UserError("--from-run repeats a trial as it was; it cannot be combined with SPACE or --set")
    from orchestrator.tracking.replay import recorded_trial  # late: MLflow takes seconds to import

    return recorded_trial(arguments.from_run, cluster, arguments.trust)


def _plan_text(plan: SearchPlan) -> str:
    return plan.text(len(Outcome.so_far(plan.config, plan.run).trials), _seconds_per_epoch(plan))


def _search(plan: SearchPlan, console: Console) -> int:
    """Run the search unless it is done, print what it has found, and return the exit code."""
    outcome = Outcome.so_far(plan.config, plan.run)
    # what MLflow has of it is checked below
    is_done = outcome.is_done and plan.run.report.exists() and not estimates.are_left(plan, outcome)
    if is_done and plan.run.recorded.exists() and not plan.promotes:
        text = read_text(plan.run.recorded, RunDirError, "delete it, then rerun the same command to write it again")
        return _show(outcome, plan, how_to_open=text.strip())
    from orchestrator.tuning.driver import run_search

    try:
        # stdout is for results; the warnings of Ray's daemons would go there too
        with redirect_stdout(sys.stderr), Progress(plan.config, console) as progress:
            found, how_to_open = run_search(plan, progress)
    except TrackingError as error:
        if not is_done:
            raise
        print(f"search: MLflow still lacks a part of this search: {error}", file=sys.stderr)
        return _show(outcome, plan, how_to_open=None)
    return _show(found, plan, how_to_open)


def _seconds_per_epoch(plan: SearchPlan) -> float | None:
    """Return the mean of the epochs that the run directory holds; None if it holds none."""
    files = [plan.run.trial(trial_id).metrics for trial_id in plan.run.trial_ids()]
    epochs = [epoch for file in files if file.exists() for epoch in read_metrics(file)]
    num = sum(not epoch["final"] for epoch in epochs)
    return sum(epoch["train_s"] + epoch["eval_s"] + epoch["measure_s"] for epoch in epochs) / num if num else None


def _show(outcome: Outcome, plan: SearchPlan, how_to_open: str | None) -> int:
    """Print what the search has found; return 1, saying why, if every trial failed."""
    print_table(outcome)
    page = plan.run.report
    report = page.absolute() if plan.storage.address is None else masked(plan.storage.place(page))
    print(f"\n{summary_text(outcome)}\n\nreport: {report}")
    if how_to_open is not None:
        print(printable(f"MLflow:\n{how_to_open}"))
    if not outcome.have_all_failed:
        return 0
    fail("search", f"every trial failed, the last one with: {outcome.trials[-1]['error']}")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(prog="orchestrator search", description=__doc__, formatter_class=KeepLines)
    add_arguments(parser, noun="search", folder="NAME")
    parser.add_argument(
        "--from-run", metavar="RUN_ID", help="repeat the trial of this MLflow run, in a search of its own"
    )
    parser.add_argument(
        "--trust",
        metavar="MODULE",
        action="append",
        default=[],
        help="with --from-run: a module whose functions the record may name as its network; repeatable",
    )
    parser.add_argument(
        "--promote",
        action="store_true",
        help="move MLflow's aliases here, also those that name another search's networks",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
