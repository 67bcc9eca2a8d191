"""A trial as Tune sees it: its request, and the function that runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.cluster.interrupts import run_in_thread
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import DataError, OrchestratorError, StorageError, UserError
from orchestrator.planning.plan import SearchPlan
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import EpochMetrics, NewEpochs
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.exchange import storage_of
from orchestrator.trial.train_run import disk_failure, fit

Trainable = Callable[[dict[str, Any]], None]


def request_of(plan: SearchPlan, trial_id: str, config: TrialConfig, base_weights: Path) -> dict[str, Any]:
    """Write a trial's config.json, and return what run_trial needs: plain values, the paths absolute, as it runs elsewhere.

    base_weights: from ensure_base.
    """
    wait_until_reachable(plan.run.config)
    curve = plan.run.latency_curve.resolve()
    assignment = Assignment.of(
        config,
        name=trial_id,
        folder=plan.run.trial(trial_id).root.resolve(),
        base_weights=base_weights.resolve(),
        keeps_cut=plan.config.search.descend == "nearest",
        latency_curve=curve if curve.exists() else None,
        storage=storage_of(plan.storage),
    )
    if plan.mirror is not None:
        plan.mirror.save()  # the study knows of a trial before the store has a checkpoint of it
    return {
        "trial_id": trial_id,
        "assignment": assignment.to_dict(),
        "cluster": plan.cluster.model_dump_json(exclude={"mlflow_uri", "env_vars"}),  # Tune writes it to disk
        "train_folder": plan.storage.place(plan.run.train),
    }


def run_or_report(config: dict[str, Any], run: Trainable | None = None) -> None:
    """Run one trial: a Tune function trainable. run: run_trial, unless another is given.

    What the trial itself found wrong is reported, not raised: Tune tries again whatever is raised, and a NaN loss would
    come again. What is left to raise is a bug or a driver that died. Damaged data, and a storage
    or a driver's disk that is away or full, do not come from the trial. They end the search, and the same command resumes it.
    """
    try:
        if "error" in config:
            raise OrchestratorError(config["error"])
        (run or run_trial)(config)
    except (OrchestratorError, OSError) as error:
        found = error if isinstance(error, OrchestratorError) else disk_failure(error, config["trial_id"])
        if found is None:
            raise
        kind = {
            "is_outside": isinstance(found, (DataError, StorageError)),
            "is_user_error": isinstance(found, UserError),
        }
        tune.report({"error": str(found), "final": True, **kind})


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial: a Tune function trainable. config: from request_of.

    Reports to Tune the metrics of every epoch and, exactly once, the final ones (final=True), also when the trial was
    done before. Raises: TrialError, UserError.
    """
    training = run_in_thread(lambda: train_trial(config), config["trial_id"])
    paths = TrialPaths(Assignment.from_dict(config["assignment"]).folder)
    for metrics in NewEpochs(paths.metrics).until(training):
        tune.report(metrics)
    tune.report(training.result())


def train_trial(config: dict[str, Any]) -> EpochMetrics:
    """Run all stages of a trial that are not complete yet, and return its final metrics; needs Ray, but no Tune.

    Raises: TrialError, UserError; StorageError if the storage is unreachable for too long.
    """
    assignment = Assignment.from_dict(config["assignment"])
    wait_until_reachable(TrialPaths(assignment.folder).config)
    return fit(assignment, ClusterConfig.model_validate_json(config["cluster"]), config["train_folder"])
