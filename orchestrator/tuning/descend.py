"""Which earlier trial a trial starts from: search.descend, and the config that it has then.

nearest: a trial under more pressure starts from the network and the gates of one under less, as they were when it was pruned.
They are complete as soon as the earlier trial has left its gating stage, and do not change later.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.config.metrics import FINISHED
from orchestrator.config.rungs import num_grace_epochs
from orchestrator.config.trial import GatingConfig, TrialConfig, with_values
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import make_trial_id, trial_number
from orchestrator.storage.run_dir import read_trial_config
from orchestrator.tuning.schedulers import RuleScheduler


def pressure_of(gating: GatingConfig) -> tuple[str, float]:
    """Return the kind of pressure in a gating stage, and its strength, which is larger the more channels close.

    It is that of the target where there is one, which bounds what loss_weight can close. Different kinds do not compare.

    >>> pressure_of(GatingConfig(epochs=1, lr=0.1, target_ratio=0.25))
    ('target_ratio of cost', -0.25)
    """
    if gating.target_ms is not None:
        return "target_ms", -gating.target_ms
    if gating.target_ratio is not None:
        return f"target_ratio of {gating.target_of}", -gating.target_ratio
    assert gating.loss_weight is not None  # TrialConfig checks that gates have something to go by
    return "loss_weight", gating.loss_weight


def choose_parent(gating: GatingConfig, candidates: Mapping[str, GatingConfig]) -> str | None:
    """Return the id of the candidate that comes nearest with less pressure, the first by id of equals; None if none has less.

    candidates: trial id -> its gating stage; trials that were finished or promoted, and cut.

    >>> stages = {f"trial_000{i}": GatingConfig(epochs=1, lr=0.1, target_ratio=ratio) for i, ratio in enumerate((0.8, 0.5))}
    >>> choose_parent(GatingConfig(epochs=1, lr=0.1, target_ratio=0.3), stages)
    'trial_0001'
    """
    wanted_kind, wanted = pressure_of(gating)
    pressures = {trial_id: pressure_of(candidates[trial_id]) for trial_id in sorted(candidates)}
    less = {
        trial_id: strength
        for trial_id, (kind, strength) in pressures.items()
        if kind == wanted_kind and strength < wanted
    }
    return max(less, key=less.__getitem__, default=None)


def descend(config: TrialConfig, start_from: Path, share: float) -> TrialConfig:
    """Return the config of a trial that starts from a folder, for that share of its epochs, at least one of each stage that it has.

    >>> config = descend(config, Path("/runs/digits/trials/trial_0001/cut"), share=0.5)   # doctest: +SKIP
    """
    stages = {"gating.epochs": config.gating.epochs, "finetuning.epochs": config.finetuning.epochs}
    shortened = {name: max(1, round(share * epochs)) if epochs else 0 for name, epochs in stages.items()}
    return with_values(config, {**shortened, "gating.start_from": str(start_from.absolute())})


def descended(config: TrialConfig, parent: str | None, plan: SearchPlan) -> TrialConfig:
    """Return the config with which a trial of the search starts from its parent, if it has one."""
    if parent is None:
        return config
    search, paths = plan.config.search, plan.run.trial(parent)
    start_from = paths.cut if search.descend == "nearest" else paths
    return descend(config, start_from.root, search.descend_share)


def parent_chooser(plan: SearchPlan, scheduler: RuleScheduler) -> Callable[[str, dict[str, Any]], str | None] | None:
    """Return the function (trial id, values) -> the trial that it starts from; None where none starts from another."""
    stages: dict[str, GatingConfig] = {}

    def before(trial_id: str, params: dict[str, Any]) -> str | None:
        """Return the trial before in a chain."""
        number = trial_number(trial_id)
        return make_trial_id(number - 1) if number > 0 else None

    def nearest(trial_id: str, params: dict[str, Any]) -> str | None:
        """Return the nearest trial under less pressure."""
        candidates = _cut_and_kept(plan, scheduler)
        for name in candidates - stages.keys():
            stages[name] = read_trial_config(plan.run.trial(name)).gating
        try:
            gating = with_values(plan.config.base, params).gating
        except ValidationError:  # reported where the trial's config is made
            return None
        return choose_parent(gating, {name: stages[name] for name in candidates})

    return {"none": None, "chain": before, "nearest": nearest}[plan.config.search.descend]


def _cut_and_kept(plan: SearchPlan, scheduler: RuleScheduler) -> set[str]:
    """Return the trials that were cut, and have finished or run on after their first rung."""
    status = {row["trial_id"]: row["status"] for row in Outcome.so_far(plan.config, plan.run).rows}
    grace_epochs = num_grace_epochs(plan.config)
    promoted = {trial_id for trial_id, epoch in scheduler.going_on.items() if epoch >= grace_epochs}
    kept = {trial_id for trial_id in plan.run.trial_ids() if status.get(trial_id) == FINISHED}
    kept |= promoted - status.keys() - scheduler.stopped.keys()
    return {trial_id for trial_id in kept if plan.run.trial(trial_id).cut.gates.is_file()}
