"""The process that runs a search: Ray Tune around the trials, their records, and what is shown at the end.

    connect -> MLflow -> base and unpruned network -> trials, then baselines under Tune -> latencies side by side -> report, the table

Every step that is complete is skipped, so running the same search again resumes it. Tune starts afresh each time: its own
snapshots hold pickled objects of the program that wrote them. What carries over is the study's journal, results.parquet, the
recorded epochs, and the Train checkpoints, which a trial finds again by its id.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from orchestrator.cluster.capacity import capacity, shape
from orchestrator.cluster.connection import session
from orchestrator.cluster.interrupts import Interrupted, run_in_thread, saved_if_interrupted, unwrapped
from orchestrator.cluster.processes import in_own_process
from orchestrator.config.metrics import REFERENCE, UNPRUNED
from orchestrator.errors import MeasurerError
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.page import write_report
from orchestrator.reporting.progress import Progress
from orchestrator.tracking.packaging import package
from orchestrator.tracking.tracker import Tracker
from orchestrator.trial.base_network import ensure_base
from orchestrator.trial.feasibility import check_start
from orchestrator.trial.fixed_networks import curve_error, measure_fixed
from orchestrator.trial.remeasure import remeasure
from orchestrator.trial.train_runs import TrainRuns
from orchestrator.tuning import estimates
from orchestrator.tuning.baselines import run_baselines
from orchestrator.tuning.budget import Budget
from orchestrator.tuning.monitoring import Monitor
from orchestrator.tuning.recorder import Recorder
from orchestrator.tuning.steering import Steering
from orchestrator.tuning.trainable import Trainable, run_or_report
from orchestrator.tuning.trials import run_trials
from orchestrator.tuning.tuner import Tuning


def run_search(plan: SearchPlan, progress: Progress, trainable: Trainable = run_or_report) -> tuple[Outcome, str]:
    """Run what is left of the search; return what it has found and how to open it in MLflow.

    The caller holds the run directory (see run_dir.claim). trainable: what Tune runs for each trial.
    Raises: OrchestratorError when the search itself cannot continue; Interrupted after Ctrl-C or SIGTERM.
    """
    plan.run.recorded.unlink(missing_ok=True)  # of an earlier process; MLflow lacks what is found from here on
    outcome = Outcome.so_far(plan.config, plan.run)
    progress.earlier(outcome)
    train_runs = TrainRuns(plan.storage.place(plan.run.train))
    train_runs.remove_leftovers({row["trial_id"] for row in outcome.rows})
    if not plan.cluster.is_elastic:
        train_runs.check_world_size(plan.cluster.workers_per_trial)
    if not outcome.is_done:
        plan.run.report.unlink(missing_ok=True)  # of a search that got more trials since: its end is to come again
        check_start(plan.config, plan.cluster)  # first: what is refused leaves no trace in MLflow
        curve_error(
            plan.run.latency_curve, plan.config.base.profile
        )  # damage is reported here, once, and fails no trial
    # else MLflow alone lacks something
    has_work_left = not outcome.is_done or not plan.run.report.exists() or estimates.are_left(plan, outcome)
    needs_ray = not outcome.is_done or (has_work_left and plan.measures_apart)
    if needs_ray:
        progress.say("Connecting to Ray")
    with session(plan.cluster if needs_ray else None, plan.storage.shared) as interrupts, _tracker(plan) as tracker:
        monitor = Monitor(plan.config.name, Budget.of(plan.config.search, plan.cluster).num_gpus)
        recorder = Recorder(plan.run, plan.config, tracker, progress, monitor, train_runs, plan.mirror)
        if needs_ray:
            tracker.describe_cluster(shape(), plan.cluster)
        if not outcome.is_done:
            capacity(plan.cluster)  # raises on a cluster without room: the workers would wait forever
            base_weights = _train_base(plan, progress)
            _measure_unpruned(plan, base_weights, recorder)
            _measure_references(plan, recorder)
            tuning = Tuning(plan, recorder, interrupts, trainable, Steering(plan, progress))
            run_trials(tuning, base_weights)
            run_baselines(tuning, base_weights)
        if has_work_left and plan.measures_apart:
            _remeasure(plan, recorder)
        outcome = write_report(plan.run)
        _register_front(plan, outcome, recorder)
        tracker.search_ended(lambda: outcome, "FAILED" if outcome.have_all_failed else "FINISHED")
    return outcome, tracker.how_to_open()


def _train_base(plan: SearchPlan, progress: Progress) -> Path:
    """Train the base network unless the storage holds it, and return its weights."""
    progress.say("Preparing the base network (trained now, or reused if already in the storage)")
    # In the main thread Ray Train would take SIGINT for itself and end the process with 0.
    stop_files: list[Path] = []
    training = run_in_thread(
        lambda: ensure_base(plan.config.base, plan.storage, plan.cluster, stop_files), "base network"
    )
    with saved_if_interrupted(training, stop_files):
        return training.result()


def _measure_unpruned(plan: SearchPlan, base_weights: Path, recorder: Recorder) -> None:
    """Measure and record the unpruned network, unless that is done."""
    base = plan.config.base
    if Outcome.so_far(plan.config, plan.run).unpruned is not None:
        return
    recorder.started(UNPRUNED, base, kind=UNPRUNED)
    curve = plan.run.latency_curve
    weights = plan.storage.place(base_weights)
    row = measure_fixed(UNPRUNED, base.model, base, plan.cluster, base_weights=weights, curve_file=curve)
    if (error := curve_error(curve, base.profile)) is not None:
        recorder.progress.say(
            "Latency during the search is estimated from MACs (5 measured networks, leave-one-out error "
            f"{error:.0%}); finished networks are measured at the end."
        )
    recorder.ended(row)


def _measure_references(plan: SearchPlan, recorder: Recorder) -> None:
    """Measure and record the networks that the space names, except those that are done; nothing trains meanwhile."""
    for reference in Outcome.so_far(plan.config, plan.run).missing_references:
        config = plan.config.base.model_copy(update={"model": reference.model})
        recorder.started(reference.name, config, kind=REFERENCE)
        base, widths = plan.config.base, reference.widths
        recorder.ended(measure_fixed(reference.name, reference.model, base, plan.cluster, widths=widths))


def _remeasure(plan: SearchPlan, recorder: Recorder) -> None:
    """Replace the estimates of the finished networks, now that nothing trains at the same time."""
    recorder.progress.say("Measuring all finished networks in turns")
    try:
        rows = remeasure(plan.run, plan.config, plan.cluster, plan.storage.place(plan.run.root))
    except MeasurerError as error:
        recorder.progress.say(f"Latencies stay estimates: {error}")
        return
    for row in rows:
        recorder.tracker.remeasured(row)


def _register_front(plan: SearchPlan, outcome: Outcome, recorder: Recorder) -> None:
    """Put the networks of the front into MLflow's registry."""

    def package_elsewhere(trial_ids: list[str], folder: str) -> dict[str, str]:
        """Export in a process of its own, which gives its memory back."""
        arguments = (str(plan.run.root.resolve()), trial_ids, folder)
        profile, is_on_head = plan.config.base.profile, plan.storage.shared is None
        return in_own_process(package, *arguments, profile=profile, cluster=plan.cluster, is_on_head=is_on_head)

    if not outcome.front or plan.cluster.mlflow_model is None:
        return
    recorder.progress.say("Registering the front in MLflow")
    try:
        kept = recorder.tracker.register_front(outcome, package_elsewhere, promotes=plan.promotes)
    except MeasurerError as error:
        recorder.progress.say(f"The front is not in MLflow's registry: {error}")
        return
    if kept:
        recorder.progress.say(
            f"MLflow's aliases {', '.join(kept)} stay with another search's networks; to move them to this search, rerun the same "
            "command with --promote"
        )


@contextmanager
def _tracker(plan: SearchPlan) -> Iterator[Tracker]:
    """Open MLflow for the search, and leave no run in it that says RUNNING forever."""
    _quieten()
    tracker = Tracker.open(plan.config, plan.run, plan.storage, plan.cluster)
    try:
        with _recorded_system(plan, tracker), unwrapped():
            yield tracker
    except Interrupted:
        tracker.search_ended(lambda: Outcome.so_far(plan.config, plan.run), "KILLED")
        raise
    except Exception:
        tracker.search_ended(lambda: Outcome.so_far(plan.config, plan.run), "FAILED")
        raise


def _recorded_system(plan: SearchPlan, tracker: Tracker) -> AbstractContextManager[None]:
    if not plan.cluster.system_metrics:
        return nullcontext()
    from orchestrator.tracking.system_metrics import system_metrics  # late: only needed where system_metrics is on

    return system_metrics(tracker.parent_id, tracker.uri)


def _quieten() -> None:
    """Keep Ray's loggers out of the progress; after ray.init(), which sets their levels."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its errors are trials that failed, which have their row
