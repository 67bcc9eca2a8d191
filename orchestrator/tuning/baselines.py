"""The plain choices that a search trains after its trials, to compare with the best one: at which size, and for how long.

A baseline is a trial with pruning.choice other than gates. It runs through the same worker as the trials and has a row of
its own kind, but is never on the front. Its MACs are those of the best trial, and it trains for as many epochs:
what the trial, and the trials that it starts from, spend on gating is fine-tuning here.
"""

from pathlib import Path
from typing import Any

from orchestrator.config.metrics import FAILED
from orchestrator.config.trial import Baseline, TrialConfig, with_values
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import Row
from orchestrator.storage.run_dir import read_trial_config
from orchestrator.tuning.schedulers import NoRule, RuleScheduler
from orchestrator.tuning.searchers import GivenTrials
from orchestrator.tuning.trainable import request_of
from orchestrator.tuning.tuner import Tuning


def reference(outcome: Outcome) -> Row | None:
    """Return the trial that baselines are compared with; None as long as none has finished.

    It is the most accurate of the front (best in the first objective); where the constraints leave no front, the smallest.
    """
    return outcome.front[0] if outcome.front else min(outcome.finished, key=lambda row: row["macs"], default=None)


def config_of(kind: Baseline, trial: TrialConfig, macs_ratio: float) -> TrialConfig:
    """Return the config of a baseline that is to cost as much and train as long as the trial.

    macs_ratio: what the trial has come to, as in its row.
    """
    return with_values(
        trial,
        {
            "pruning.choice": kind,
            "pruning.macs_ratio": macs_ratio,
            "pruning.round_to": 1,
            "finetuning.epochs": epochs_of(trial),
        },
    )


def epochs_of(trial: TrialConfig) -> int:
    """Return the epochs that a trial's network has had since the base network: its own, and its ancestors' as far as it took them over."""
    num_epochs, folder = trial.num_epochs, trial.gating.start_from
    while folder is not None:
        paths = TrialPaths(Path(folder))
        is_cut = not paths.config.is_file()  # before the fine-tuning of the trial in whose folder it is
        ancestor = read_trial_config(TrialPaths(paths.root.parent) if is_cut else paths)
        num_epochs += ancestor.gating_epochs if is_cut else ancestor.num_epochs
        folder = ancestor.gating.start_from
    return num_epochs


def run_baselines(tuning: Tuning, base_weights: Path) -> None:
    """Run the baselines that have no result, next to the best trial; none is stopped early.

    Trials that a spent budget has left out come first: one of them may be the best.
    """
    plan = tuning.plan
    outcome = Outcome.so_far(plan.config, plan.run)
    missing = outcome.missing_baselines
    if not missing:
        return
    if num_left := outcome.missing_trials:
        tuning.recorder.progress.say(f"{', '.join(missing)} once the other {num_left} trials have a result")
        return
    best = reference(outcome)
    if best is None:
        for kind in missing:
            error = f"{kind}: no trial has finished whose MACs a baseline could match"
            tuning.recorder.started(kind, plan.config.base, kind)
            tuning.recorder.ended({"trial_id": kind, "kind": kind, "status": FAILED, "error": error})
        return
    trial = read_trial_config(plan.run.trial(best["trial_id"]))
    tuning.recorder.progress.say(f"baselines at the MACs of {best['trial_id']}, macs_ratio {best['macs_ratio']:.3f}")
    configs = {kind: config_of(kind, trial, best["macs_ratio"]) for kind in missing}
    requests: dict[str, dict[str, Any]] = {
        kind: request_of(plan, kind, config, base_weights) for kind, config in configs.items()
    }
    tuning.run(GivenTrials(requests), RuleScheduler(NoRule()))
