"""The plan of a search, as --dry-run prints it: where it runs, how many trials and epochs, how many at once."""

import math
import os
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.rungs import (
    expected_num_epochs,
    max_num_epochs,
    num_concurrent,
    num_grace_epochs,
    order_decides,
    rungs_of,
)
from orchestrator.config.search import SearchConfig
from orchestrator.planning.forecast import gpu_hours_text
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.run_dir import read_config


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search, the cluster it runs on, and the folders it writes to."""

    config: SearchConfig
    cluster: ClusterConfig
    storage: StoragePaths
    run: RunPaths
    promotes: bool = False
    """Whether MLflow's aliases move to this search's networks, also those that name another search's."""
    mirror: Mirror | None = None
    """Keeps the copy of the run directory in an object store, if the storage is one."""

    def __post_init__(self) -> None:
        """Keep what the run of an earlier version continues with. Raises: RunDirError if its config cannot be read."""
        if self.run.config.is_file():
            self.run.refuse_links()
            config = self.config.resuming(read_config(SearchConfig, self.run.config))
            object.__setattr__(self, "config", config)  # frozen: only here, before anybody has seen it

    @property
    def measures_apart(self) -> bool:
        """Whether networks are timed after the trials instead of in them."""
        return self.config.base.profile.clock == "wall" and self.cluster.measures_apart

    def text(self, num_ended: int = 0, seconds_per_epoch: float | None = None) -> str:
        """Return the plan as text.

        num_ended: trials that have ended already.    seconds_per_epoch: mean of their epochs; None if they have none.
        """
        config = self.config
        return "\n".join(
            [
                f"config     {_indented(config.model_dump(mode='json'))}",
                f"cluster    {_indented(self.cluster.shown())}",
                f"run        {self.run.root.absolute()}" + self._so_far_text(num_ended),
                f"trials     {config.search.num_trials}, suggested by {config.search.algorithm}: {self._params_text()}",
                f"epochs     {self._epochs_text()}",
                f"stopping   {self._stopping_text()}",
                f"at once    {self._concurrency_text()}",
                f"budget     {self._budget_text()}",
                f"forecast   {self._forecast_text(num_ended, seconds_per_epoch)}",
                f"           {gpu_hours_text(self.config, expected_num_epochs(self.config))}",
            ]
        )

    def _so_far_text(self, num_ended: int) -> str:
        num_left = max(0, self.config.search.num_trials - num_ended)
        return f" ({num_ended} trials have ended; {num_left} more)" if num_ended else ""

    def _params_text(self) -> str:
        text = ", ".join(self.config.params) or "no parameter is searched, all trials are the same"
        search = self.config.search
        if len(search.points_to_evaluate) > search.num_trials:
            text += f"; the first {search.num_trials} of {len(search.points_to_evaluate)} points"
        if search.descend == "nearest":
            text += f"; each starts from the nearest under less pressure, for {search.descend_share:g} of the epochs"
        return text

    def _epochs_text(self) -> str:
        base = self.config.base
        stages = f"{base.gating.epochs} gating + {base.finetuning.epochs} fine-tuning"
        return f"{stages} a trial; {base.pretraining.epochs} for the base network, once, unless the storage holds it"

    def _stopping_text(self) -> str:
        scheduler = self.config.scheduler
        if scheduler.type == "none":
            return "none; every trial runs to its end"
        if scheduler.type == "median":
            return f"median, after each epoch from {num_grace_epochs(self.config)} on"
        first = num_grace_epochs(self.config)
        rungs = rungs_of(self.config)
        if not rungs:
            return f"{scheduler.type}, but no trial is longer than {first} epochs, after which one may be stopped"
        return f"{scheduler.type}, after epochs {', '.join(map(str, rungs))}; keeps 1 in {scheduler.reduction_factor}"

    def _concurrency_text(self) -> str:
        num = num_concurrent(self.config, self._capacity)
        workers = f"{self.cluster.workers_per_trial} workers each"
        if self.config.search.descend == "chain":
            return f"1 trial, {workers}: each starts from the one before it"
        if order_decides(self.config) and self._capacity > 1:
            return f"{num} trial, {workers}: profile.clock is model, and the same seed must give the same table"
        if self.cluster.grows_to is not None:
            return f"at most {num} trials, {workers}; nodes are added when trials ask for them (grows_to)"
        return f"{num} trials, {workers}" if self.cluster.address is None else f"at most {num} trials, {workers}"

    @property
    def _capacity(self) -> int:
        """Trials at once, estimated without Ray: from the CPUs of this machine if it is the cluster."""
        cluster = self.cluster
        fits = cluster.grows_to or self.config.search.num_trials
        num_cpus = cluster.workers_per_trial * cluster.resources_per_worker.get("CPU", 0)
        if cluster.address is None and cluster.grows_to is None and num_cpus:
            fits = max(1, int((os.cpu_count() or 1) / num_cpus + 1e-9))
        return min(fits, cluster.max_concurrent or fits)

    def _forecast_text(self, num_ended: int, seconds_per_epoch: float | None) -> str:
        num_left = max(0, self.config.search.num_trials - num_ended)
        num_at_once = num_concurrent(self.config, self._capacity)
        longest, expected = num_left * max_num_epochs(self.config), round(num_left * expected_num_epochs(self.config))
        epochs = f"{longest} epochs" if expected == longest else f"about {expected} epochs, at most {longest},"
        text = f"{num_left} trials, {epochs} in {math.ceil(num_left / num_at_once)} rounds of trials or more"
        if seconds_per_epoch is None:
            return f"{text}; wall time: unknown until the first epoch has run"
        hours = expected * seconds_per_epoch / num_at_once / 3600
        return f"{text}; about {hours:.2g} hours, at {seconds_per_epoch:.1f} s per epoch so far"

    def _budget_text(self) -> str:
        search = self.config.search
        limits = [f"{search.max_hours:g} hours"] if search.max_hours is not None else []
        limits += [f"{search.max_gpu_hours:g} GPU hours"] if search.max_gpu_hours is not None else []
        return f"no trial starts after {' or '.join(limits)}" if limits else "all trials"


def _indented(values: dict[str, Any]) -> str:
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    return text.rstrip().replace("\n", "\n           ")
