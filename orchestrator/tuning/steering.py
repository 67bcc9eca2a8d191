"""How a person steers a running search: one trial is ended, no further one starts, or another number runs at once."""

import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from orchestrator.cluster.capacity import capacity
from orchestrator.config.rungs import num_concurrent
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.progress import Progress
from orchestrator.storage.requests import Request, Requests
from orchestrator.tuning.schedulers import RuleScheduler
from orchestrator.tuning.searchers import TrialSource

CHECK_S = 2.0
"""How often the search looks for requests."""


class Steering(tune.Callback):
    """Reads requests from the run directory while Tune runs, and passes them on; made once for trials and baselines."""

    def __init__(self, plan: SearchPlan, progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._requests = Requests(plan.run)
        self._search = plan.config.search
        """With the number of trials at once that was asked for last."""
        self._is_draining = False
        self._check_due = 0.0

    def take(self, searcher: TrialSource, scheduler: RuleScheduler) -> None:
        """Steer these trials from now on."""
        self._searcher, self._scheduler = searcher, scheduler
        self._set()

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called by Tune many times a second."""
        if time.monotonic() < self._check_due:
            return
        self._check_due = time.monotonic() + CHECK_S
        for request in self._requests.read():
            self._progress.say(f"Asked for: {self._fulfil(request)}")

    def _fulfil(self, request: Request) -> str:
        """Do what is asked for, and return it in words."""
        if request.end is not None:
            self._scheduler.end(request.end)
            return f"{request.end} ends"
        if request.max_concurrent is not None:
            self._search = self._search.model_copy(update={"max_concurrent": request.max_concurrent})
        self._is_draining |= request.drain
        self._set()
        if request.drain:
            return "no further trial starts; rerun the same command to run the rest"
        return f"{request.max_concurrent} trials at once; the cluster and the search allow {self._searcher.num_at_once}"

    def _set(self) -> None:
        config = self._plan.config.model_copy(update={"search": self._search})
        self._searcher.num_at_once = num_concurrent(config, capacity(self._plan.cluster))
        self._searcher.is_draining = self._is_draining

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its parts into tuner.pkl, which this project never reads
