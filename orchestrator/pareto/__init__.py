"""Which of many networks are worth keeping: pure functions and rules, no files, no Ray, no clock. Imports: config."""

from orchestrator.pareto.asha import ParetoASHA
from orchestrator.pareto.front import hypervolume, non_dominated

__all__ = ["ParetoASHA", "hypervolume", "non_dominated"]
