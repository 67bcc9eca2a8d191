"""The process that runs a search: Ray Tune around the trials, their records, and what is shown at the end.

    connect -> MLflow -> base and unpruned network -> trials, then baselines under Tune -> latencies side by side -> report, the table

Every step that is complete is skipped, so running the same search again is how it is continued. Tune starts afresh each
time: its own snapshots hold pickled objects of the program that wrote them. What carries over is the study's journal,
results.parquet, the recorded epochs, and the Train checkpoints, which a trial finds again by its id.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.cluster.capacity import shape
from orchestrator.cluster.connection import session
from orchestrator.cluster.interrupts import Interrupted, run_in_thread, saved_if_interrupted
from orchestrator.cluster.processes import in_own_process
from orchestrator.config.metrics import FINISHED, REFERENCE, UNPRUNED
from orchestrator.config.trial import with_values
from orchestrator.errors import MeasurerError
from orchestrator.latency.curve import Curve
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.files import write_report
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.progress import Progress
from orchestrator.storage.files import write_atomic
from orchestrator.storage.records import append_result, read_metrics, seconds_columns
from orchestrator.tracking.packaging import package
from orchestrator.tracking.tracker import Tracker
from orchestrator.trial.base_network import ensure_base
from orchestrator.trial.feasibility import check_start
from orchestrator.trial.fixed_networks import measure_reference, measure_unpruned
from orchestrator.trial.remeasure import remeasure
from orchestrator.trial.train_run import TRAIN_FOLDER, check_world_size
from orchestrator.tuning.baselines import run_baselines
from orchestrator.tuning.budget import Budget
from orchestrator.tuning.descend import descended, parent_chooser
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.schedulers import make_scheduler, replay
from orchestrator.tuning.searchers import OptunaSearcher
from orchestrator.tuning.trainable import Trainable, TrialRequest, run_or_report
from orchestrator.tuning.tuner import Tuning


def run_search(plan: SearchPlan, progress: Progress, trainable: Trainable = run_or_report) -> tuple[Outcome, str]:
    """Run what is left of the search; return what it has found and how to open it in MLflow.

    The caller holds the run directory (see run_dir.claim). trainable: what Tune runs for each trial.
    Raises: OrchestratorError when the search itself cannot go on; Interrupted after Ctrl-C or SIGTERM.
    """
    outcome = Outcome.so_far(plan.config, plan.run)
    progress.earlier(outcome)
    if not plan.cluster.is_elastic:
        check_world_size(plan.run.ray / TRAIN_FOLDER, plan.cluster.workers_per_trial)
    if not outcome.is_done:
        check_start(plan.config, plan.cluster)  # first: what is refused leaves no trace in MLflow
    # a report is written when all is measured: then MLflow alone lacks something
    has_work_left = not outcome.is_done or not plan.run.report.exists()
    needs_ray = not outcome.is_done or (has_work_left and _measures_apart(plan))
    if needs_ray:
        progress.say("connects to Ray")
    with session(plan.cluster if needs_ray else None, plan.storage.root) as interrupts, _tracker(plan) as tracker:
        if needs_ray:
            tracker.describe_cluster(shape(), plan.cluster)
        if not outcome.is_done:
            base_weights = _measure_unpruned(plan, progress, tracker)
            _measure_references(plan, progress, tracker)
            tuning = Tuning(plan, progress, tracker, interrupts, trainable)
            _run_trials(tuning, base_weights)
            run_baselines(tuning, base_weights)
        if has_work_left and _measures_apart(plan):
            _remeasure(plan, progress, tracker)
        outcome = write_report(plan.run)
        _register_front(plan, progress, tracker, outcome)
        tracker.search_ended(outcome, "FAILED" if outcome.have_all_failed else "FINISHED")
    return outcome, tracker.how_to_open()


def _measures_apart(plan: SearchPlan) -> bool:
    """Return whether networks are timed at the end, elsewhere than in their trials."""
    return plan.config.base.profile.clock == "wall" and plan.cluster.measures_apart


def _measure_unpruned(plan: SearchPlan, progress: Progress, tracker: Tracker) -> Path:
    """Train the base network and record the unpruned one, as far as that is not done; return the base weights."""
    base = plan.config.base
    if plan.run.latency_curve.exists():
        Curve.from_json(plan.run.latency_curve.read_bytes())  # damage is told here, once, and fails no trial
    progress.say("base network: trained unless the storage holds it")
    # In the main thread Ray Train would take SIGINT for itself and end the process with 0.
    stop_files: list[Path] = []
    training = run_in_thread(lambda: ensure_base(base, plan.storage, plan.cluster, stop_files), "base network")
    with saved_if_interrupted(training, stop_files):
        base_weights = training.result()
    if Outcome.so_far(plan.config, plan.run).unpruned is None:
        run_id = tracker.trial_started(UNPRUNED, {}, base, kind=UNPRUNED)
        measured, curve = measure_unpruned(base, base_weights, plan.cluster)
        row = {**measured, "mlflow_run_id": run_id}
        if curve is not None:
            write_atomic(plan.run.latency_curve, curve.to_json())
            progress.say(
                "latencies are predicted until the end from the multiply-adds of five networks, each of which the others miss by "
                f"{curve.error(base.profile.batch_sizes[0]):.0%} on average"
            )
        append_result(plan.run.results, row)
        tracker.trial_ended(UNPRUNED, row, FINISHED)
        progress.unpruned(row)
    return base_weights


def _measure_references(plan: SearchPlan, progress: Progress, tracker: Tracker) -> None:
    """Measure and record the networks that the space names, as far as that is not done; nothing trains meanwhile."""
    for reference in Outcome.so_far(plan.config, plan.run).missing_references:
        progress.say(f"measures {reference.name}")
        config = plan.config.base.model_copy(update={"model": reference.model})
        run_id = tracker.trial_started(reference.name, {}, config, kind=REFERENCE)
        row = {**measure_reference(reference, plan.config.base, plan.cluster), "mlflow_run_id": run_id}
        append_result(plan.run.results, row)
        tracker.trial_ended(reference.name, row, FINISHED)


def _remeasure(plan: SearchPlan, progress: Progress, tracker: Tracker) -> None:
    """Replace the estimates of the finished networks, now that nothing trains beside them."""
    progress.say("measures all finished networks side by side")
    try:
        rows = remeasure(plan.run, plan.config, plan.cluster)
    except MeasurerError as error:
        progress.say(f"latencies stay estimates: {error}")
        return
    for row in rows:
        tracker.remeasured(row)


def _register_front(plan: SearchPlan, progress: Progress, tracker: Tracker, outcome: Outcome) -> None:
    """Put the networks of the front into MLflow's registry."""

    def package_elsewhere(trial_ids: list[str], folder: str) -> dict[str, str]:
        """Export in a process of its own, which gives its memory back."""
        arguments = (str(plan.run.root.resolve()), trial_ids, folder)
        return in_own_process(package, *arguments, profile=plan.config.base.profile, cluster=plan.cluster)

    if not outcome.front:
        return
    progress.say("registers the front in MLflow")
    try:
        tracker.register_front(outcome, package_elsewhere)
    except MeasurerError as error:
        progress.say(f"the front is not in MLflow's registry: {error}")


def _run_trials(tuning: Tuning, base_weights: Path) -> None:
    """Run the trials that have no result."""
    plan = tuning.plan
    outcome = Outcome.so_far(plan.config, plan.run)
    if outcome.missing_trials == 0:
        return
    decisions = ReportLog(plan.run.decisions, marker=plan.run.config)
    scheduler = make_scheduler(plan.config, decisions)
    replay(plan, scheduler, decisions, outcome)
    searcher = OptunaSearcher(
        plan.config,
        plan.run.study,
        outcome.rows,
        _tune_config(plan, base_weights),
        may_start=_within(Budget.of(plan.config.search, plan.cluster), tuning),
        choose_parent=parent_chooser(plan, scheduler),
    )
    tuning.run(searcher, scheduler)


def _tune_config(plan: SearchPlan, base_weights: Path) -> Callable[[str, dict[str, Any], str | None], dict[str, Any]]:
    """Return the function that makes a trial's Tune config of its id, the values of its searched parameters and its parent."""

    def make(trial_id: str, params: dict[str, Any], parent: str | None) -> dict[str, Any]:
        """Return the TrialRequest, or why the values do not make one."""
        try:
            config = descended(with_values(plan.config.base, params), parent, plan)
        except ValidationError as error:  # values that fit their fields one by one, but not together
            return {"trial_id": trial_id, "error": f"{trial_id}: {'; '.join(item['msg'] for item in error.errors())}"}
        return TrialRequest(
            trial_id=trial_id,
            config=config,
            run=plan.run,
            base_weights=base_weights,
            cluster=plan.cluster,
            keeps_cut=plan.config.search.descend == "nearest",
        ).to_dict()

    return make


def _within(budget: Budget, tuning: Tuning) -> Callable[[], bool]:
    """Return the function that tells whether another trial may start, and says why the last one was."""
    said = False
    run = tuning.plan.run

    def may_start() -> bool:
        """Return whether the budget leaves room for another trial."""
        nonlocal said
        if not budget.is_limited:
            return True
        rows = Outcome.so_far(tuning.plan.config, run).rows
        under_way = set(run.trial_ids()) - {row["trial_id"] for row in rows}
        files = [path for trial_id in under_way if (path := run.trial(trial_id).metrics).exists()]
        reason = budget.why_spent([*rows, *(seconds_columns(read_metrics(path)) for path in files)], time.monotonic())
        if reason is not None and not said:
            tuning.progress.say(f"no further trial starts: {reason}; the same command goes on with the rest")
            said = True
        return reason is None

    return may_start


@contextmanager
def _tracker(plan: SearchPlan) -> Iterator[Tracker]:
    """Open MLflow for the search, and leave no run in it that says RUNNING forever."""
    _quieten()
    tracker = Tracker.open(plan.config, plan.run, plan.storage, plan.cluster.mlflow_uri)
    try:
        with _recorded_system(plan, tracker):
            yield tracker
    except Interrupted:
        tracker.search_ended(Outcome.so_far(plan.config, plan.run), "KILLED")
        raise
    except Exception:
        tracker.search_ended(Outcome.so_far(plan.config, plan.run), "FAILED")
        raise


def _recorded_system(plan: SearchPlan, tracker: Tracker) -> AbstractContextManager[None]:
    if not plan.cluster.system_metrics:
        return nullcontext()
    from orchestrator.tracking.system_metrics import system_metrics  # late: nobody else needs it

    return system_metrics(tracker.parent_id, tracker.uri)


def _quieten() -> None:
    """Keep Ray's loggers out of the progress; after ray.init(), which sets their levels."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its errors are trials that failed, which have their row
