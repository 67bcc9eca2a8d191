"""Computes how much each searched parameter matters, by Optuna's fANOVA over the finished trials."""

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.config.domains import CategoricalDomain, Domain, distribution
from orchestrator.errors import RunDirError
from orchestrator.reporting.outcome import Outcome

MIN_TRIALS = 4
"""With fewer finished trials a forest of trees explains nothing."""


def importances(outcome: Outcome) -> Mapping[str, Mapping[str, float]]:
    """Return {objective: {parameter: share of the objective's variance}}, the largest share first; shares sum to 1.

    Objectives and parameters that are equal in all trials are left out; empty when fewer than MIN_TRIALS trials have
    finished, or they differ in fewer than two parameters.
    Raises: RunDirError if a value is outside its domain.
    Source: Hutter, Hoos and Leyton-Brown, "An efficient approach for assessing hyperparameter importance", ICML 2014.
    """
    import optuna  # late: only this report needs Optuna

    rows, params = outcome.finished, outcome.config.params
    domains = {name: domain for name, domain in params.items() if len({row.get(name) for row in rows}) > 1}
    if len(rows) < MIN_TRIALS or len(domains) < 2:
        return {}
    distributions = {name: distribution(domain) for name, domain in domains.items()}
    drawn = [{name: _drawn(row[name], domain) for name, domain in domains.items()} for row in rows]
    shares = {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for metric in (objective.metric for objective in outcome.config.objectives):
        if len({row[metric] for row in rows}) == 1:
            continue  # nothing to explain
        study = optuna.create_study()
        for row, values in zip(rows, drawn, strict=True):
            try:
                trial = optuna.trial.create_trial(params=values, distributions=distributions, value=row[metric])
            except ValueError as error:
                raise RunDirError(
                    f"{row['trial_id']} has a value outside its domain in search.json ({error}); restore search.json and "
                    "results.parquet from a copy"
                ) from error
            study.add_trial(trial)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares[metric] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return shares


def _drawn(value: Any, domain: Domain) -> Any:
    """Return what was drawn: in results.parquet, choices of several types are JSON text."""
    if not isinstance(domain, CategoricalDomain):
        return value
    return next((choice for choice in domain.choices if value in (choice, json.dumps(choice))), value)
