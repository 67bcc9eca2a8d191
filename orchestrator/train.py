"""The command `train`: prune one network over all workers of a cluster, without a search.

    python -m orchestrator.train                                        the digits space on this machine
    python -m orchestrator.train digits --set base.gating.target_ratio=0.3
    python -m orchestrator.train imagenet_resnet50_macs --cluster aws --dry-run

It is one trial: gates are trained, closed channels are pruned, and the rest is fine-tuned and measured. Searched parameters are
fixed: to the value in base if given (--set base.gating.target_ratio=...), else to the first entry of search.points_to_evaluate, else to the
middle of the range. All files are in <storage>/NAME-train/. Rerun the command to resume from the last checkpoint, or to print
the result of a finished training.
Exit codes: 0 success; 1 the training failed; 2 invalid command, YAML file or run directory, reported as one error; 130 after
Ctrl-C, 143 after SIGTERM: finished work is saved.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from orchestrator.cli import DEFAULT_SPACE, KeepLines, add_arguments, chosen_cluster, mirror_of, run_folder, run_plan
from orchestrator.cluster.interrupts import run_in_thread, saved_if_interrupted
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import OBJECTIVE_METRICS, used_as
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import RunDirError
from orchestrator.masking import MaskingParser
from orchestrator.planning.space import load_space, one_trial
from orchestrator.reporting.table import metric_text
from orchestrator.storage.files import read_json, write_atomic
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import StoragePaths, TrainPaths

RESULT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One training, the cluster it runs on, and the folders it writes to."""

    name: str
    config: TrialConfig
    cluster: ClusterConfig
    storage: StoragePaths
    run: TrainPaths
    mirror: Mirror | None

    def text(self) -> str:
        """Return the plan as text."""
        config = yaml.safe_dump(
            self.config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100
        )
        stages = f"{self.config.gating_epochs} gating + {self.config.finetuning.epochs} fine-tuning"
        return "\n".join(
            [
                f"config     {config.rstrip()}".replace("\n", "\n           "),
                f"cluster    {self.cluster.shown()}",
                f"run        {self.run.root.absolute()}",
                f"epochs     {stages}; {self.config.pretraining.epochs} for the base network, unless the storage holds it",
                f"workers    {self.cluster.workers_per_trial}",
            ]
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_plan(_parser(), argv, _make_plan, TrainPlan.text, _result)


def _make_plan(arguments: argparse.Namespace) -> TrainPlan:
    cluster = chosen_cluster(arguments)
    space = load_space(arguments.space or DEFAULT_SPACE, arguments.set)
    name = f"{space.name}{TrainPaths.SUFFIX}"
    storage, folder = run_folder(cluster, arguments, name, TrainPaths.CONFIG)
    return TrainPlan(
        name=name,
        config=one_trial(space),
        cluster=cluster.model_copy(update={"storage": str(storage.root)}),
        storage=storage,
        run=TrainPaths(folder),
        mirror=mirror_of(storage, TrainPaths(folder), arguments),
    )


def _result(plan: TrainPlan, console: Console) -> int:
    """Train unless the result exists, print the result, and return the exit code."""
    if not plan.run.result.exists():
        with redirect_stdout(sys.stderr):  # stdout is for the result; the warnings of Ray's daemons would go there too
            _train(plan, console)
    metrics = _read_result(plan.run.result)
    print(f"{plan.name}: {_metrics_text(metrics, OBJECTIVE_METRICS)}\nrun: {plan.run.root.absolute()}")
    return 0


def _read_result(path: Path) -> Mapping[str, Any]:
    """Return the final metrics. Raises: RunDirError if the file is damaged, or of another version."""
    metrics = read_json(path, RunDirError, "restore it from a copy, or delete it and rerun the command")
    if (version := metrics.get("version")) != RESULT_VERSION:
        raise RunDirError(
            f"{path} has version {version!r}, this program reads version {RESULT_VERSION}; use the release that wrote it"
        )
    for name in OBJECTIVE_METRICS:
        if not isinstance(metrics.get(name), int | float | None):
            raise RunDirError(
                f"{path} is damaged: {name} is {metrics[name]!r:.60}, expected a number; restore it from a copy"
            )
    return metrics


def _train(plan: TrainPlan, console: Console) -> None:
    """Run the remaining part of the training, print a line per epoch on the console, and write the result."""
    from orchestrator.cluster.capacity import capacity
    from orchestrator.cluster.connection import session
    from orchestrator.storage.records import NewEpochs
    from orchestrator.trial.feasibility import check_start
    from orchestrator.trial.train_runs import TrainRuns  # late: torch and Ray, as above

    check_start(plan.config, plan.cluster)
    if not plan.cluster.is_elastic:
        TrainRuns(plan.storage.place(plan.run.ray)).check_world_size(plan.cluster.workers_per_trial)
    with session(plan.cluster, plan.storage.shared):
        capacity(plan.cluster)  # refuses a cluster without room: the workers would wait forever
        plan.run.stop.unlink(missing_ok=True)
        stop_files: list[Path] = []
        training = run_in_thread(lambda: _fit(plan, stop_files), plan.name)
        with saved_if_interrupted(training, stop_files):
            for metrics in NewEpochs(plan.run.metrics).until(training):
                place = f"epoch {metrics['epoch']}/{plan.config.num_epochs} {metrics['stage']}"
                text = f"{place} {_metrics_text(metrics, used_as('log'))}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        result = {"version": RESULT_VERSION, **training.result()}
        write_atomic(plan.run.result, json.dumps(result, indent=2) + "\n")


def _fit(plan: TrainPlan, stop_files: list[Path]) -> dict[str, Any]:
    """Train the base network unless the storage holds it, then the stages that no checkpoint shows as complete.

    stop_files: receives the stop file of each of the two trainings before it begins.
    """
    from orchestrator.trial.assignment import Assignment
    from orchestrator.trial.base_network import ensure_base
    from orchestrator.trial.exchange import storage_of
    from orchestrator.trial.train_run import fit_here

    base_weights = ensure_base(plan.config, plan.storage, plan.cluster, stop_files)
    stop_files.append(plan.run.stop)
    assignment = Assignment(
        name=plan.name,
        folder=plan.run.root.resolve(),
        base_weights=base_weights.resolve(),
        storage=storage_of(plan.storage),
    )
    return fit_here(assignment, plan.cluster, plan.storage.place(plan.run.ray))


def _metrics_text(metrics: Mapping[str, Any], names: Sequence[str]) -> str:
    return " ".join(f"{name} {metric_text(name, metrics[name])}" for name in names if metrics.get(name) is not None)


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(prog="orchestrator train", description=__doc__, formatter_class=KeepLines)
    add_arguments(parser, noun="training", folder=f"NAME{TrainPaths.SUFFIX}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
