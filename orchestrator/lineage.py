"""Which earlier trial a trial goes on from: search.lineage, the paper's chain as a search. Pure.

A trial under more pressure starts from what one under less had come to when it was cut: its network and its gates. That
is there as soon as the earlier trial has left its gating stage, and does not change any more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from orchestrator.config import GatingConfig, TrialConfig, with_values


class Pressure(NamedTuple):
    """How much is to be closed."""

    of: str
    """What is compared: two pressures of different things are not."""
    strength: float
    """Larger closes more."""


def pressure_of(gating: GatingConfig) -> Pressure:
    """Return the pressure of a gating stage: its target where it has one, which bounds what loss_weight can close.

    >>> pressure_of(GatingConfig(epochs=1, lr=0.1, target_ratio=0.25))
    Pressure(of='target_ratio of cost', strength=-0.25)
    """
    if gating.target_ms is not None:
        return Pressure("target_ms", -gating.target_ms)
    if gating.target_ratio is not None:
        return Pressure(f"target_ratio of {gating.target_of}", -gating.target_ratio)
    assert gating.loss_weight is not None  # TrialConfig checks that gates have something to go by
    return Pressure("loss_weight", gating.loss_weight)


def choose_parent(gating: GatingConfig, candidates: Mapping[str, GatingConfig]) -> str | None:
    """Return the id of the candidate that comes nearest with less pressure, the first by id of equals; None if none has less.

    candidates: trial id -> its gating stage; trials that were finished or promoted, and cut.

    >>> stages = {f"trial_000{i}": GatingConfig(epochs=1, lr=0.1, target_ratio=ratio) for i, ratio in enumerate((0.8, 0.5))}
    >>> choose_parent(GatingConfig(epochs=1, lr=0.1, target_ratio=0.3), stages)
    'trial_0001'
    """
    wanted = pressure_of(gating)
    pressures = {trial_id: pressure_of(candidates[trial_id]) for trial_id in sorted(candidates)}
    less = [trial_id for trial_id, found in pressures.items() if found.of == wanted.of and found < wanted]
    return max(less, key=lambda trial_id: pressures[trial_id].strength, default=None)


def descend(config: TrialConfig, start_from: Path, share: float) -> TrialConfig:
    """Return the config of a trial that goes on from a folder, for that share of its epochs, at least one of each stage that it has.

    >>> config = descend(config, Path("/runs/digits/trials/trial_0001/cut"), share=0.5)   # doctest: +SKIP
    """
    stages = {"gating.epochs": config.gating.epochs, "finetuning.epochs": config.finetuning.epochs}
    shortened = {name: max(1, round(share * epochs)) if epochs else 0 for name, epochs in stages.items()}
    return with_values(config, {**shortened, "gating.start_from": str(start_from.absolute())})
