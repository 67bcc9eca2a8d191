"""What the scheduler was told, in the order in which it was told: what a continued search needs to decide as before."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.paths import cut_torn_line

KEPT = ("epoch", "stage", "top1", "top5", "latency_ms", "latency_p10_ms", "latency_p90_ms", "macs", "macs_ratio", "params",
        "target_ratio", "architecture")  # fmt: skip
"""The metrics that a rule may read."""


class Decisions:
    """A file with a line of JSON per report. The process that writes it holds the run directory's lock."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Add a report."""
        line = {"trial_id": trial_id, **{name: metrics[name] for name in KEPT if metrics.get(name) is not None}}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the reports, oldest first; half a line at the end, of a process that died, is cut off."""
        cut_torn_line(self._path)
        if self._path.exists():
            yield from map(json.loads, self._path.read_text().splitlines())
