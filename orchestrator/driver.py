"""The process that runs a search: Ray Tune around the trials, their records, and what is shown at the end.

    connect -> MLflow -> base and unpruned network -> trials, then baselines under Tune -> latencies side by side -> report, the table

Every step that is complete is skipped, so running the same search again is how it is continued. Tune starts afresh each
time: its own snapshots hold pickled objects of the program that wrote them. What carries over is the study's journal,
results.parquet, the recorded epochs, and the Train checkpoints, which a trial finds again by its id.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import tune

from orchestrator import baselines
from orchestrator.base import ensure_base, measure_unpruned
from orchestrator.budget import Budget
from orchestrator.checkpoint import check_world_size
from orchestrator.clocks import Curve
from orchestrator.cluster import capacity, connect, shape
from orchestrator.config import GatingConfig, TrialConfig, with_values
from orchestrator.decisions import Decisions
from orchestrator.errors import MeasurerError
from orchestrator.interrupts import Interrupted, Interrupts, saved_if_interrupted
from orchestrator.lineage import choose_parent, descend
from orchestrator.mlflow_models import package
from orchestrator.outcome import Outcome
from orchestrator.pareto import REFERENCE
from orchestrator.paths import write_atomic
from orchestrator.plan import Plan, num_concurrent, num_grace_epochs
from orchestrator.progress import Progress
from orchestrator.recorder import TrialRecorder, seconds_columns
from orchestrator.records import append_result, read_metrics, read_results
from orchestrator.references import measure_reference
from orchestrator.remeasure import remeasure
from orchestrator.report import write_report
from orchestrator.run_dir import ended_trials, have_all_failed, missing_baselines, missing_references
from orchestrator.schedulers import NoRule, RuleScheduler, make_scheduler
from orchestrator.searchers import GivenTrials, OptunaSearcher, make_trial_id, trial_number
from orchestrator.targets import check_start
from orchestrator.threads import run_in_thread
from orchestrator.timing import in_own_process
from orchestrator.tracking import Tracker
from orchestrator.trial import TRAIN_FOLDER, TRIAL_DRIVER_RESOURCES, Trainable, TrialRequest, run_or_report

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours, see interrupts.py
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its snapshots are never read
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a trial that fails has its row and its line
}
TUNE_FOLDER = "tune"
MAX_DRIVER_FAILURES = 1
"""How often a trial's driver that died is started again; the trial goes on from its checkpoint."""


def run_search(plan: Plan, progress: Progress, trainable: Trainable = run_or_report) -> tuple[Outcome, str]:
    """Run what is left of the search; return what it has found and how to open it in MLflow.

    The caller holds the run directory (see run_dir.claim). trainable: what Tune runs for each trial.
    Raises: OrchestratorError when the search itself cannot go on; Interrupted after Ctrl-C or SIGTERM.
    """
    interrupts = Interrupts()
    rows = _rows(plan)
    progress.earlier(rows)
    has_trials_left = num_missing(plan, rows) > 0 or bool(missing_baselines(plan.config, rows))
    has_trials_left = has_trials_left or bool(missing_references(plan.config, rows))
    if not plan.cluster.is_elastic:
        check_world_size(plan.run.ray / TRAIN_FOLDER, plan.cluster.workers_per_trial)
    if has_trials_left:
        check_start(plan.config, plan.cluster)  # first: what is refused leaves no trace in MLflow
    # a report is written when all is measured: then MLflow alone lacks something
    has_work_left = has_trials_left or not plan.run.report.exists()
    if has_work_left and (has_trials_left or _measures_apart(plan)) and not ray.is_initialized():
        progress.say("connects to Ray")
        connect(plan.cluster)
    interrupts.install()
    _quieten()
    tracker = Tracker.open(plan.config, plan.run, plan.storage, plan.cluster.mlflow_uri)
    with _killed_if_torn_out(tracker), _recorded_system(plan, tracker):
        if ray.is_initialized():
            tracker.describe_cluster(shape(), plan.cluster)
        if has_trials_left:
            base_weights = _measure_unpruned(plan, progress, tracker)
            _measure_references(plan, progress, tracker)
            tuning = _Tuning(plan, progress, tracker, interrupts, trainable)
            _run_trials(tuning, base_weights)
            _run_baselines(tuning, base_weights)
        if has_work_left and _measures_apart(plan):
            _remeasure(plan, progress, tracker)
        outcome = write_report(plan.run)
        _register_front(plan, progress, tracker, outcome)
        tracker.search_ended("FAILED" if have_all_failed(outcome.rows) else "FINISHED")
    return outcome, tracker.how_to_open()


def num_missing(plan: Plan, rows: Sequence[dict[str, Any]]) -> int:
    """Return how many trials have no result yet."""
    return plan.config.search.num_trials - len(ended_trials(rows))


def _rows(plan: Plan) -> list[dict[str, Any]]:
    return read_results(plan.run.results) if plan.run.results.exists() else []


def _measures_apart(plan: Plan) -> bool:
    """Return whether networks are timed at the end, elsewhere than in their trials."""
    return plan.config.base.profile.clock == "wall" and plan.cluster.measures_apart


def _measure_unpruned(plan: Plan, progress: Progress, tracker: Tracker) -> Path:
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
    if not any(row["kind"] == "unpruned" for row in _rows(plan)):
        run_id = tracker.trial_started("unpruned", {}, base, kind="unpruned")
        measured, curve = measure_unpruned(base, base_weights, plan.cluster)
        row = {**measured, "mlflow_run_id": run_id}
        if curve is not None:
            write_atomic(plan.run.latency_curve, curve.to_json())
            progress.say(
                "latencies are predicted until the end from the multiply-adds of five networks, each of which the others miss by "
                f"{curve.error(base.profile.batch_sizes[0]):.0%} on average"
            )
        append_result(plan.run.results, row)
        tracker.trial_ended("unpruned", row, "finished")
        progress.unpruned(row)
    return base_weights


def _measure_references(plan: Plan, progress: Progress, tracker: Tracker) -> None:
    """Measure and record the networks that the space names, as far as that is not done; nothing trains meanwhile."""
    for reference in missing_references(plan.config, _rows(plan)):
        progress.say(f"measures {reference.name}")
        config = plan.config.base.model_copy(update={"model": reference.model})
        run_id = tracker.trial_started(reference.name, {}, config, kind=REFERENCE)
        row = {**measure_reference(reference, plan.config.base, plan.cluster), "mlflow_run_id": run_id}
        append_result(plan.run.results, row)
        tracker.trial_ended(reference.name, row, "finished")


def _remeasure(plan: Plan, progress: Progress, tracker: Tracker) -> None:
    """Replace the estimates of the finished networks, now that nothing trains beside them."""
    progress.say("measures all finished networks side by side")
    try:
        rows = remeasure(plan.run, plan.config, plan.cluster)
    except MeasurerError as error:
        progress.say(f"latencies stay estimates: {error}")
        return
    for row in rows:
        tracker.remeasured(row)


def _register_front(plan: Plan, progress: Progress, tracker: Tracker, outcome: Outcome) -> None:
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


@dataclass(frozen=True)
class _Tuning:
    """What Tune needs beside the trials themselves."""

    plan: Plan
    progress: Progress
    tracker: Tracker
    interrupts: Interrupts
    trainable: Trainable

    def run(self, searcher: OptunaSearcher | GivenTrials, scheduler: RuleScheduler) -> None:
        """Run the searcher's trials to their rows."""
        plan = self.plan
        num_at_once = num_concurrent(plan.config, capacity(plan.cluster))
        self.progress.trials_begin(searcher.num_left, num_at_once)
        # Of an earlier process, or of the trials before the baselines; see the module's docstring.
        shutil.rmtree(plan.run.ray / TUNE_FOLDER, ignore_errors=True)
        recorder = TrialRecorder(plan.run, plan.config, searcher, scheduler, self.tracker, self.progress)
        tuner = tune.Tuner(
            tune.with_resources(self.trainable, _driver_resources()),
            tune_config=tune.TuneConfig(
                # no metric here: it would turn the search into one for that metric
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=searcher.num_left,
                max_concurrent_trials=num_at_once,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=TUNE_FOLDER,
                storage_path=str(plan.run.ray.resolve()),
                verbose=0,
                callbacks=[recorder],
                failure_config=tune.FailureConfig(max_failures=MAX_DRIVER_FAILURES),
            ),
        )
        os.environ.update(TUNE_ENVIRONMENT)
        with self.interrupts.left_to_tune():
            tuner.fit()


def _run_trials(tuning: _Tuning, base_weights: Path) -> None:
    """Run the trials that have no result."""
    plan = tuning.plan
    rows = _rows(plan)
    if num_missing(plan, rows) == 0:
        return
    decisions = Decisions(plan.run.decisions, marker=plan.run.config)
    scheduler = make_scheduler(plan.config, decisions)
    _replay(plan, scheduler, decisions, rows)
    searcher = OptunaSearcher(
        plan.config,
        plan.run.study,
        rows,
        _tune_config(plan, base_weights),
        may_start=_within(Budget.of(plan.config.search, plan.cluster), tuning),
        choose_parent=_parents(plan, scheduler),
    )
    tuning.run(searcher, scheduler)


def _run_baselines(tuning: _Tuning, base_weights: Path) -> None:
    """Run the baselines that have no result, beside the best trial; none is stopped early.

    Trials that a spent budget has left out come first: one of them may be the best.
    """
    plan = tuning.plan
    rows = _rows(plan)
    missing = missing_baselines(plan.config, rows)
    if not missing:
        return
    if num_left := num_missing(plan, rows):
        tuning.progress.say(f"{', '.join(missing)} once the other {num_left} trials have a result")
        return
    best = baselines.reference(plan.config, rows)
    if best is None:
        tuning.progress.say(f"no trial has finished, so there is nothing to compare {', '.join(missing)} with")
        for kind in missing:
            error = f"{kind}: no trial has finished, whose multiply-adds a baseline could match"
            append_result(plan.run.results, {"trial_id": kind, "kind": kind, "status": "failed", "error": error})
        return
    trial = TrialConfig.model_validate_json(plan.run.trial(best["trial_id"]).config.read_bytes())
    tuning.progress.say(f"baselines at the multiply-adds of {best['trial_id']}, macs_ratio {best['macs_ratio']:.3f}")
    requests: dict[str, dict[str, Any]] = {
        kind: TrialRequest(
            trial_id=kind,
            config=baselines.config_of(kind, trial, best["macs_ratio"]),
            run=plan.run,
            base_weights=base_weights,
            cluster=plan.cluster,
        ).to_dict()
        for kind in missing
    }
    tuning.run(GivenTrials(requests), RuleScheduler(NoRule()))


def _tune_config(plan: Plan, base_weights: Path) -> Callable[[str, dict[str, Any], str | None], dict[str, Any]]:
    """Return the function that makes a trial's Tune config of its id, the values of its searched parameters and its parent."""

    def make(trial_id: str, params: dict[str, Any], parent: str | None) -> dict[str, Any]:
        """Return the TrialRequest, or why the values do not make one."""
        try:
            config = _descended(plan, with_values(plan.config.base, params), parent)
        except ValidationError as error:  # values that fit their fields one by one, but not together
            return {"trial_id": trial_id, "error": f"{trial_id}: {'; '.join(item['msg'] for item in error.errors())}"}
        return TrialRequest(
            trial_id=trial_id, config=config, run=plan.run, base_weights=base_weights, cluster=plan.cluster
        ).to_dict()

    return make


def _descended(plan: Plan, config: TrialConfig, parent: str | None) -> TrialConfig:
    """Return the config with which a trial goes on from its parent, if it has one, and can become one."""
    search = plan.config.search
    if search.lineage:
        config = with_values(config, {"pruning.keep_cut": True})
    if parent is None:
        return config
    paths = plan.run.trial(parent)
    return descend(
        config, (paths.cut if search.lineage else paths).root, search.lineage_share if search.lineage else 1.0
    )


def _parents(plan: Plan, scheduler: RuleScheduler) -> Callable[[str, dict[str, Any]], str | None] | None:
    """Return the function that chooses the trial that a trial goes on from; None where trials do not."""
    stages: dict[str, GatingConfig] = {}

    def link(trial_id: str, params: dict[str, Any]) -> str | None:
        """Return the trial before in a chain."""
        number = trial_number(trial_id)
        return make_trial_id(number - 1) if number > 0 else None

    def nearest(trial_id: str, params: dict[str, Any]) -> str | None:
        """Return the nearest trial under less pressure."""
        candidates = _cut_and_kept(plan, scheduler)
        for name in candidates - stages.keys():
            stages[name] = TrialConfig.model_validate_json(plan.run.trial(name).config.read_bytes()).gating
        try:
            gating = with_values(plan.config.base, params).gating
        except ValidationError:  # make() says what is wrong with them
            return None
        return choose_parent(gating, {name: stages[name] for name in candidates})

    if plan.config.search.chain:
        return link
    return nearest if plan.config.search.lineage else None


def _cut_and_kept(plan: Plan, scheduler: RuleScheduler) -> set[str]:
    """Return the trials that were cut, and have finished or run on after their first rung."""
    status = {row["trial_id"]: row["status"] for row in _rows(plan)}
    grace_epochs = num_grace_epochs(plan.config)
    promoted = {trial_id for trial_id, epoch in scheduler.going_on.items() if epoch >= grace_epochs}
    kept = {trial_id for trial_id in plan.run.trial_ids() if status.get(trial_id) == "finished"}
    kept |= promoted - status.keys() - scheduler.stopped.keys()
    return {trial_id for trial_id in kept if plan.run.trial(trial_id).cut.gates.is_file()}


def _within(budget: Budget, tuning: _Tuning) -> Callable[[], bool]:
    """Return the function that tells whether another trial may start, and says why the last one was."""
    said = False
    run = tuning.plan.run

    def may_start() -> bool:
        """Return whether the budget leaves room for another trial."""
        nonlocal said
        if not budget.is_limited:
            return True
        rows = _rows(tuning.plan)
        under_way = set(run.trial_ids()) - {row["trial_id"] for row in rows}
        files = [path for trial_id in under_way if (path := run.trial(trial_id).metrics).exists()]
        reason = budget.why_spent([*rows, *(seconds_columns(read_metrics(path)) for path in files)], time.monotonic())
        if reason is not None and not said:
            tuning.progress.say(f"no further trial starts: {reason}; the same command goes on with the rest")
            said = True
        return reason is None

    return may_start


def _replay(plan: Plan, scheduler: RuleScheduler, decisions: Decisions, rows: Sequence[dict[str, Any]]) -> None:
    """Tell the scheduler what it was told before, then what unfinished trials have recorded since, in order of time."""
    told = set()
    for report in decisions.read():
        scheduler.decide(report["trial_id"], report)
        told.add((report["trial_id"], report["epoch"]))
    ended = {row["trial_id"] for row in ended_trials(rows)}
    recorded = [
        (timestamp_ms, trial_id, metrics)
        for trial_id in set(plan.run.trial_ids()) - set(plan.config.baselines) - ended
        if (metrics_file := plan.run.trial(trial_id).metrics).exists()
        for timestamp_ms, metrics in _in_order(read_metrics(metrics_file))
        if (trial_id, metrics["epoch"]) not in told
    ]
    for _, trial_id, metrics in sorted(recorded, key=lambda report: (*report[:2], report[2]["epoch"])):
        scheduler.take(trial_id, metrics)


def _in_order(epochs: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the epochs of a trial with times that never fall, also where the clock was set back between two of them."""
    latest_ms = 0
    for metrics in epochs:
        latest_ms = max(latest_ms, metrics["timestamp_ms"])
        yield latest_ms, metrics


def _driver_resources() -> dict[str, float]:
    """Return what a trial's driver asks for; on the head node, where there is one."""
    present = ray.cluster_resources()
    return {name: amount for name, amount in TRIAL_DRIVER_RESOURCES.items() if name in present}


def _trial_name(trial: tune.experiment.Trial) -> str:
    return str(trial.config["trial_id"])


@contextmanager
def _killed_if_torn_out(tracker: Tracker) -> Iterator[None]:
    """Leave no run in MLflow that says RUNNING for ever."""
    try:
        yield
    except Interrupted:
        tracker.search_ended("KILLED")
        raise
    except Exception:
        tracker.search_ended("FAILED")
        raise


def _recorded_system(plan: Plan, tracker: Tracker) -> AbstractContextManager[None]:
    if not plan.cluster.system_metrics:
        return nullcontext()
    from orchestrator.system_metrics import system_metrics  # late: nobody else needs it

    return system_metrics(tracker.parent_id, tracker.uri)


def _quieten() -> None:
    """Keep Ray's loggers out of the progress; after ray.init(), which sets their levels."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its errors are trials that failed, which have their row
