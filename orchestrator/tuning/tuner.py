"""Ray Tune around a source of trials and a scheduler."""

import os
import shutil
from dataclasses import dataclass

from ray import tune

from orchestrator.cluster.interrupts import Interrupts
from orchestrator.errors import OrchestratorError
from orchestrator.planning.plan import SearchPlan
from orchestrator.tuning.recorder import Recorder, TuneListener
from orchestrator.tuning.schedulers import RuleScheduler
from orchestrator.tuning.searchers import TrialSource
from orchestrator.tuning.steering import Steering
from orchestrator.tuning.trainable import Trainable

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # cluster/interrupts.py handles Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its snapshots are never read
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a trial that fails has its row and its line
}
MAX_DRIVER_FAILURES = 1
"""How often a trial's driver that died is started again; the trial resumes from its checkpoint."""


@dataclass(frozen=True)
class Tuning:
    """What Tune needs in addition to the trials themselves."""

    plan: SearchPlan
    recorder: Recorder
    interrupts: Interrupts
    trainable: Trainable
    steering: Steering

    def run(self, searcher: TrialSource, scheduler: RuleScheduler) -> None:
        """Run the searcher's trials to their rows."""
        plan = self.plan
        self.steering.take(searcher, scheduler)
        self.recorder.progress.trials_begin(searcher.num_left, searcher.num_at_once)
        # Of an earlier process, or of the trials before the baselines; see the module's docstring.
        shutil.rmtree(plan.run.tune, ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(self.trainable, driver_resources()),
            tune_config=tune.TuneConfig(
                # no metric here: it would turn the search into one for that metric
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=searcher.num_left,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=plan.run.tune.name,
                storage_path=str(plan.run.ray.resolve()),
                verbose=0,
                callbacks=[TuneListener(self.recorder, searcher, scheduler, plan.cluster), self.steering],
                failure_config=tune.FailureConfig(max_failures=MAX_DRIVER_FAILURES),
            ),
        )
        os.environ.update(TUNE_ENVIRONMENT)
        with self.interrupts.left_to_tune():
            try:
                tuner.fit()
            except tune.TuneError as error:
                raise own_error(error) from None


def own_error(error: tune.TuneError) -> Exception:
    """Return what Tune has wrapped, if that is an error of this project or of the operating system, such as a full disk; else Tune's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (OrchestratorError, OSError)):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def driver_resources() -> tune.PlacementGroupFactory:
    """Return what a trial's driver asks for: a place on the head, which stays, and no CPU, which a head may not have.

    It only waits for its workers. With Tune's default of 1 CPU the drivers would hold what their own workers wait for.
    """
    return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])


def _trial_name(trial: tune.experiment.Trial) -> str:
    return str(trial.config["trial_id"])
