"""What a search is about to do, before anything starts: where, how many trials and epochs, how many at once."""

import math
import os
from dataclasses import dataclass

import yaml

from orchestrator.cluster import TRIAL_DRIVER_CPU, ClusterConfig
from orchestrator.config import Config, SearchConfig
from orchestrator.pareto_asha import rung_epochs
from orchestrator.paths import RunPaths, StoragePaths


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search, the cluster it runs on, and the folders it writes to."""

    config: SearchConfig
    cluster: ClusterConfig
    storage: StoragePaths
    run: RunPaths

    def text(self, num_ended: int = 0) -> str:
        """Return the plan for a person to read; num_ended: trials that the run directory already holds."""
        config = self.config
        return "\n".join(
            [
                f"config     {_indented(config)}",
                f"cluster    {_indented(self.cluster)}",
                f"run        {self.run.root.absolute()}" + (f" ({num_ended} trials have ended)" if num_ended else ""),
                f"trials     {config.search.num_trials}, suggested by {config.search.algorithm}: {self._params_text()}",
                f"epochs     {self._epochs_text()}",
                f"stopping   {self._stopping_text()}",
                f"at once    {self._concurrency_text()}",
                f"forecast   {self._forecast_text(num_ended)}",
            ]
        )

    def _params_text(self) -> str:
        return ", ".join(self.config.params) or "no parameter is searched, all trials are the same"

    def _epochs_text(self) -> str:
        base = self.config.base
        stages = f"{base.gating.epochs} gating + {base.finetuning.epochs} fine-tuning"
        return f"{stages} a trial; {base.pretraining.epochs} for the base network, once, unless the storage holds it"

    def _stopping_text(self) -> str:
        scheduler = self.config.scheduler
        if scheduler.type == "none":
            return "none; every trial runs to its end"
        if scheduler.type == "median":
            return f"median, after each epoch from {scheduler.grace_epochs} on"
        rungs = rung_epochs(scheduler.grace_epochs, scheduler.reduction_factor, max_num_epochs(self.config))
        if not rungs:
            return f"{scheduler.type}, but no trial is longer than scheduler.grace_epochs {scheduler.grace_epochs}"
        return f"{scheduler.type}, after epochs {', '.join(map(str, rungs))}; keeps 1 in {scheduler.reduction_factor}"

    def _concurrency_text(self) -> str:
        num = num_concurrent(self.config, self._capacity)
        workers = f"{self.cluster.workers_per_trial} workers each"
        if order_decides(self.config) and self._capacity > 1:
            return f"{num} trial, {workers}: profile.clock is model, and the same seed must give the same table"
        return f"{num} trials, {workers}" if self.cluster.address is None else f"at most {num} trials, {workers}"

    @property
    def _capacity(self) -> int:
        """Trials at once as far as one can tell without Ray: by this machine's CPUs if it is the cluster."""
        cluster = self.cluster
        fits = self.config.search.num_trials
        if cluster.address is None:
            num_cpus = cluster.workers_per_trial * cluster.resources_per_worker.get("CPU", 0) + TRIAL_DRIVER_CPU
            fits = max(1, int((os.cpu_count() or 1) / num_cpus + 1e-9))
        return min(fits, cluster.max_concurrent or fits)

    def _forecast_text(self, num_ended: int) -> str:
        num_left = max(0, self.config.search.num_trials - num_ended)
        num_epochs = num_left * max_num_epochs(self.config)
        num_rounds = math.ceil(num_left / num_concurrent(self.config, self._capacity))
        at_most = "" if self.config.scheduler.type == "none" else "at most "
        return (
            f"{at_most}{num_epochs} epochs in {num_rounds} rounds of trials; the progress shows the time left as soon "
            "as an epoch was timed"
        )


def max_num_epochs(config: SearchConfig) -> int:
    """Return the epochs of the search's longest trial, gating and fine-tuning together."""

    def longest(stage: str, epochs: int) -> int:
        domain = config.params.get(f"{stage}.epochs")
        return epochs if domain is None else max(int(value) for value in domain.corners() if value is not None)

    return longest("gating", config.base.gating.epochs) + longest("finetuning", config.base.finetuning.epochs)


def order_decides(config: SearchConfig) -> bool:
    """Return whether the order in which concurrent trials report would change a table that is promised to be repeatable.

    profile.clock "model" promises the same table for the same seed. What is stopped and what TPE suggests depend on
    which trial was first, and that is a clock too.
    """
    is_sensitive = config.scheduler.type != "none" or config.search.algorithm in ("optuna", "nsga2")
    return config.base.profile.clock == "model" and is_sensitive


def num_concurrent(config: SearchConfig, capacity: int) -> int:
    """Return how many trials run at once; capacity: as many as the cluster holds."""
    if order_decides(config):
        return 1
    return min(capacity, config.search.max_concurrent or capacity, config.search.num_trials)


def _indented(config: Config) -> str:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)
    return text.rstrip().replace("\n", "\n           ")
