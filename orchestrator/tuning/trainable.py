"""A trial as Tune sees it: its request, and the function that runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.cluster.interrupts import run_in_thread
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.errors import OrchestratorError
from orchestrator.storage.files import wait_until_reachable
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import EpochMetrics, NewEpochs
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.train_run import TRAIN_FOLDER, fit

Trainable = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """What run_trial needs to know, as the plain dict that Tune passes on."""

    trial_id: str
    config: TrialConfig
    run: RunPaths
    base_weights: Path
    """From ensure_base."""
    cluster: ClusterConfig
    keeps_cut: bool = False
    """See Assignment."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the paths absolute: trials run in another working directory."""
        return {
            "trial_id": self.trial_id,
            "trial_config": self.config.model_dump_json(),
            "run_dir": str(self.run.root.resolve()),
            "base_weights": str(self.base_weights.resolve()),
            "keeps_cut": self.keeps_cut,
            "cluster": self.cluster.model_dump_json(exclude={"mlflow_uri", "env_vars"}),  # Tune writes it to disk
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "TrialRequest":
        """Read what to_dict returned."""
        return cls(
            trial_id=plain["trial_id"],
            config=TrialConfig.model_validate_json(plain["trial_config"]),
            run=RunPaths(Path(plain["run_dir"])),
            base_weights=Path(plain["base_weights"]),
            keeps_cut=plain["keeps_cut"],
            cluster=ClusterConfig.model_validate_json(plain["cluster"]),
        )


def run_or_report(config: dict[str, Any], run: Trainable | None = None) -> None:
    """Run one trial: a Tune function trainable. run: run_trial, unless another is given.

    What the trial itself found wrong is reported, not raised: Tune tries again whatever is raised, and a NaN loss would
    come again. What is left to raise is a bug or a driver that died.
    """
    try:
        if "error" in config:
            raise OrchestratorError(config["error"])
        (run or run_trial)(config)
    except OrchestratorError as error:
        tune.report({"error": str(error), "final": True})


def run_trial(config: dict[str, Any]) -> None:
    """Run one trial: a Tune function trainable. config: TrialRequest.to_dict().

    Reports to Tune the metrics of every epoch and, exactly once, the final ones (final=True), also when the trial was
    done before. Raises: TrialError, UserError.
    """
    request = TrialRequest.from_dict(config)
    training = run_in_thread(lambda: train_trial(request), request.trial_id)
    for metrics in NewEpochs(request.run.trial(request.trial_id).metrics).until(training):
        tune.report(metrics)
    tune.report(training.result())


def train_trial(request: TrialRequest) -> EpochMetrics:
    """Run all stages of a trial that are not complete yet, and return its final metrics; needs Ray, but no Tune.

    Raises: TrialError, UserError; StorageError if the storage is away for too long.
    """
    wait_until_reachable(request.base_weights)  # else the trial's folder would be created again under the mount point
    assignment = Assignment(
        name=request.trial_id,
        config=request.config,
        folder=request.run.trial(request.trial_id).root,
        base_weights=request.base_weights,
        keeps_cut=request.keeps_cut,
        latency_curve=request.run.latency_curve if request.run.latency_curve.exists() else None,
    )
    return fit(assignment, request.cluster, request.run.ray / TRAIN_FOLDER)
