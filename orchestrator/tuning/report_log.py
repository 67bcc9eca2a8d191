"""Every report to the scheduler, in order: what a resumed search needs to decide as before.

reports.jsonl begins with its version; then comes a line of JSON per report, which ends in its own checksum.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.metrics import NETWORK_METRICS
from orchestrator.errors import RunDirError
from orchestrator.storage.files import cut_torn_line, parse_json, wait_until_reachable

VERSION = 2
_CHECKSUM = "crc32"
KEPT = ("epoch", "stage", "gating_epochs", "num_epochs", *NETWORK_METRICS, "target_ratio", "architecture")
"""The metrics that a rule may read."""


class ReportLog:
    """The file of one run directory. The process that writes it holds the run directory's lock."""

    def __init__(self, path: Path, marker: Path | None = None) -> None:
        """marker: a file that is there whenever the storage is; while it is away, adding waits. None: nothing is waited for."""
        self._path = path
        self._marker = marker

    def append(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Add a report. Raises: StorageError if the storage is away for too long."""
        if self._marker is not None:
            wait_until_reachable(self._marker)
        line = {"trial_id": trial_id, **{name: metrics[name] for name in KEPT if metrics.get(name) is not None}}
        with open(self._path, "a") as file:
            if file.tell() == 0:
                file.write(json.dumps({"version": VERSION}) + "\n")
            file.write(json.dumps({**line, _CHECKSUM: _checksum(line)}) + "\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the reports, oldest first; half a line at the end, of a process that died, is cut off.

        Raises: RunDirError if another version wrote the file, or a line of it is damaged.
        """
        cut_torn_line(self._path)
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        if lines and self._parsed(lines, 0) != {"version": VERSION}:
            raise RunDirError(
                f"{self._path} begins with {lines[0][:60]!r}, expected version {VERSION}; use the release that wrote it"
            )
        for number in range(1, len(lines)):
            report = self._parsed(lines, number)
            if report.pop(_CHECKSUM, None) != _checksum(report):
                raise self._damaged(number)
            yield report

    def _parsed(self, lines: list[bytes], number: int) -> dict[str, Any]:
        try:
            value = parse_json(lines[number])
        except ValueError as error:  # also text that is not UTF-8
            raise self._damaged(number) from error
        if not isinstance(value, dict):
            raise self._damaged(number)
        return value

    def _damaged(self, number: int) -> RunDirError:
        return RunDirError(
            f"{self._path}, line {number + 1} is damaged; restore it from a copy, or start the search under another name: "
            "--set name=..."
        )


def _checksum(report: Mapping[str, Any]) -> int:
    """Return the CRC-32 of a report: JSON gives the same text again for what was read from it."""
    return zlib.crc32(json.dumps(report).encode())
