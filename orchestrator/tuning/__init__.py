"""Ray Tune and Optuna around the trials: what is tried next, what stops early, what is recorded.

Imports: config, storage, pareto, cluster, trial, planning, reporting, tracking.
"""
