"""The verb `search`: find the networks worth having among the many ways to prune one.

    python -m orchestrator.search                              the digits space on this machine
    python -m orchestrator.search fashion_mnist --set search.num_trials=32
    python -m orchestrator.search imagenet_resnet50_macs --cluster aws --dry-run
    python -m orchestrator.search --from-run 5f0c...           one trial again, from its record in MLflow alone

The same command goes on with a search that was stopped, and shows the table of one that is done.
Exit 0: done. 1: it failed, or every trial did. 2: a mistake in the command, a YAML file or the run directory, told in one
message. 130 after Ctrl-C, 143 after SIGTERM: what was done is kept.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

# Ray, MLflow and torch take seconds to import and are left to the functions that need them: --help, a typo in a YAML
# file and the table of a finished search answer at once.
from rich.console import Console
from rich.logging import RichHandler

from orchestrator.cluster import ClusterConfig, load_cluster, locate_storage
from orchestrator.config import SearchConfig
from orchestrator.errors import ClusterError, OrchestratorError, TrackingError, UserError
from orchestrator.interrupts import Interrupted
from orchestrator.outcome import Outcome
from orchestrator.paths import RunPaths, StoragePaths
from orchestrator.plan import Plan
from orchestrator.progress import make_progress
from orchestrator.records import read_metrics, read_results
from orchestrator.report import print_table, summary_text
from orchestrator.run_dir import check_run_dir, claim, ended_trials, have_all_failed, missing_baselines
from orchestrator.space import load_space

DEFAULT_SPACE = "digits"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    _configure_logging(console)
    try:
        plan = _make_plan(arguments)
        check_run_dir(plan.run, plan.config, must_exist=arguments.resume)
        if arguments.dry_run:
            print(plan.text(_num_ended(plan), _seconds_per_epoch(plan)))
            return 0
        with claim(plan.run, plan.config):
            return _search(plan, console)
    except OrchestratorError as error:
        print(f"search: {error}", file=sys.stderr)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as interrupt:
        command = shlex.join(["python", "-m", "orchestrator.search", *(sys.argv[1:] if argv is None else argv)])
        print(f"search: stopped; what is done is kept, and the same command goes on: {command}", file=sys.stderr)
        return interrupt.exit_code if isinstance(interrupt, Interrupted) else 130


def _make_plan(arguments: argparse.Namespace) -> Plan:
    cluster = load_cluster(arguments.cluster)
    if arguments.run_dir is not None:
        cluster = cluster.model_copy(update={"storage": arguments.run_dir})
    if "://" in cluster.storage:
        raise ClusterError(
            f"storage {cluster.storage} is a URI, expected a folder that every node mounts; give --run-dir, or storage "
            "in the cluster's YAML"
        )
    cluster = locate_storage(cluster)
    config = _config(arguments, cluster)
    folder = Path(cluster.storage)
    run = StoragePaths(folder).run(config.name)
    if arguments.run_dir is not None and (folder.name == config.name or RunPaths(folder).config.is_file()):
        run = RunPaths(folder)
        cluster = cluster.model_copy(update={"storage": str(folder.parent)})
    return Plan(config=config, cluster=cluster, storage=StoragePaths(Path(cluster.storage)), run=run)


def _config(arguments: argparse.Namespace, cluster: ClusterConfig) -> SearchConfig:
    if arguments.from_run is None:
        return load_space(arguments.space or DEFAULT_SPACE, arguments.set)
    if arguments.space is not None or arguments.set:
        raise UserError("--from-run repeats a trial as it was; leave SPACE and --set out, or the other way round")
    from orchestrator.mlflow_replay import recorded_trial  # late: MLflow takes seconds to import

    return recorded_trial(arguments.from_run, cluster)


def _search(plan: Plan, console: Console) -> int:
    """Run the search unless it is done, print what it has found, and return the exit code."""
    is_done = _is_done(plan)
    if is_done and plan.run.recorded.exists():
        return _show(Outcome.load(plan.run), how_to_open=plan.run.recorded.read_text().strip())
    from orchestrator.driver import run_search

    try:
        # stdout is for results; the warnings of Ray's daemons would go there too
        with redirect_stdout(sys.stderr), make_progress(plan.config, console) as progress:
            outcome, how_to_open = run_search(plan, progress)
    except TrackingError as error:
        if not is_done:
            raise
        print(f"search: MLflow still lacks a part of this search: {error}", file=sys.stderr)
        return _show(Outcome.load(plan.run), how_to_open=None)
    return _show(outcome, how_to_open)


def _is_done(plan: Plan) -> bool:
    """Return whether all is trained and measured; what MLflow has of it is another question."""
    rows = read_results(plan.run.results) if plan.run.results.exists() else []
    has_all = len(ended_trials(rows)) >= plan.config.search.num_trials and not missing_baselines(plan.config, rows)
    return has_all and plan.run.report.exists()


def _num_ended(plan: Plan) -> int:
    return len(ended_trials(read_results(plan.run.results))) if plan.run.results.exists() else 0


def _seconds_per_epoch(plan: Plan) -> float | None:
    """Return the mean of the epochs that the run directory holds; None if it holds none."""
    files = [plan.run.trial(trial_id).metrics for trial_id in plan.run.trial_ids()]
    epochs = [epoch for file in files if file.exists() for epoch in read_metrics(file)]
    num = sum(not epoch["final"] for epoch in epochs)
    return sum(epoch["train_s"] + epoch["eval_s"] + epoch["measure_s"] for epoch in epochs) / num if num else None


def _show(outcome: Outcome, how_to_open: str | None) -> int:
    """Print what the search has found; return 1 if every trial failed."""
    print_table(outcome)
    print(f"\n{summary_text(outcome)}\n\nreport: {outcome.run.report.absolute()}")
    if how_to_open is not None:
        print(f"MLflow:\n{how_to_open}")
    return 1 if have_all_failed(outcome.rows) else 0


def _configure_logging(console: Console) -> None:
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)  # prints above the live table instead of into it
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)  # they would be printed into the live table
    logging.getLogger("orchestrator").setLevel(logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orchestrator search", description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("space", nargs="?", metavar="SPACE", help="a name in search_spaces/ or a YAML file (digits)")
    parser.add_argument(
        "--cluster", default="local", metavar="NAME", help="a name in clusters/ or a YAML file (local: this machine)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a key of the space, such as search.num_trials=4; may be given several times",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a search, and fail if there is none")
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="take DIR for the cluster's storage: the search writes DIR/NAME/, with NAME from its space. DIR may also be "
        "the run directory itself, if a search is there or DIR ends in NAME",
    )
    parser.add_argument(
        "--from-run", metavar="RUN_ID", help="repeat the trial that MLflow recorded as this run, in a search of its own"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; start and write nothing")
    return parser


class _KeepLines(argparse.RawDescriptionHelpFormatter):
    """Prints the module's docstring as it stands."""


if __name__ == "__main__":
    sys.exit(main())
