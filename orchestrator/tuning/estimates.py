"""Latencies that are to be measured after the trials, and are estimates until then."""

from orchestrator.config.metrics import ESTIMATED, FINISHED
from orchestrator.planning.plan import SearchPlan
from orchestrator.reporting.outcome import Outcome


def are_left(plan: SearchPlan, outcome: Outcome) -> bool:
    """Return whether finished networks are still to be measured, as after the process that measures has crashed."""
    finished = (row for row in outcome.rows if row["status"] == FINISHED)
    return plan.measures_apart and any(row.get("latency_source") == ESTIMATED for row in finished)
