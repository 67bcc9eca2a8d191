"""Optuna's samplers, seeded per trial, and how a trial's values are drawn from one."""

import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, PartialFixedSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from orchestrator.config.domains import CategoricalDomain, Domain, IntDomain
from orchestrator.config.search import SearchAlgorithmConfig

Params = dict[str, Any]
MAX_RANDOM_STARTS = 10
MAX_POPULATION = 50
"""Trials in a generation of NSGA-II, Optuna's default; a search has at least four generations."""


def make_sampler(
    config: SearchAlgorithmConfig, number: int, distributions: Mapping[str, BaseDistribution]
) -> BaseSampler:
    """Return the sampler for the trial with this number.

    Each has its own seed, so that no sampler's state has to survive: a resumed search draws the same values as one that never
    stopped.
    """
    sampler = _make_sampler(config, number, distributions)
    return (
        partly_fixed(config.points_to_evaluate[number], sampler) if number < len(config.points_to_evaluate) else sampler
    )


def _make_sampler(
    config: SearchAlgorithmConfig, number: int, distributions: Mapping[str, BaseDistribution]
) -> BaseSampler:
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    if config.algorithm == "random" or (config.algorithm == "sobol" and number == 0):
        return RandomSampler(seed=seed)
    if config.algorithm == "tpe":
        # Optuna draws the first 10 at random; in a search of 8 trials it would then never learn anything.
        return TPESampler(seed=seed, n_startup_trials=min(MAX_RANDOM_STARTS, max(3, config.num_trials // 4)))
    if config.algorithm == "nsga2":
        return NSGAIISampler(seed=seed, population_size=min(MAX_POPULATION, max(4, config.num_trials // 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _SobolSampler(config.seed, number - 1, distributions)


class _SobolSampler(QMCSampler):
    """Draws one place of one scrambled sequence.

    Optuna's sampler counts places in the journal and finds their ranges in earlier trials: a process that died in between would
    have used up a place, and shifted all trials behind it.
    """

    def __init__(self, seed: int, place: int, distributions: Mapping[str, BaseDistribution]) -> None:
        super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self._place = place
        self._distributions = distributions

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all searched parameters."""
        return dict(self._distributions)

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._place


def partly_fixed(values: Params, sampler: BaseSampler) -> BaseSampler:
    """Return a sampler that takes these values and draws the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return PartialFixedSampler(values, sampler)


def draw(
    study: optuna.Study, sampler: BaseSampler, frozen: FrozenTrial, distributions: Mapping[str, BaseDistribution]
) -> Params:
    """Return what the sampler draws for the trial, as if none of its values were written yet; writes none of them."""
    blank = copy(frozen)
    blank.params, blank.distributions = {}, {}
    drawn = sampler.sample_relative(study, blank, sampler.infer_relative_search_space(study, blank))
    for name, one in distributions.items():
        if name not in drawn and not one.single():
            drawn[name] = sampler.sample_independent(study, blank, name, one)
    return drawn


def suggest(trial: optuna.trial.Trial, name: str, domain: Domain) -> Any:
    """Draw a trial's value of one parameter by its study's sampler, write it and return it."""
    if isinstance(domain, CategoricalDomain):
        return trial.suggest_categorical(name, domain.choices)
    if isinstance(domain, IntDomain):
        return trial.suggest_int(name, domain.low, domain.high, log=domain.log, step=domain.step)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log, step=domain.step)
