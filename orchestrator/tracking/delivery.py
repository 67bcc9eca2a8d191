"""Delivery: writes to a store that may fail, so that a store that is away does not hold up the search."""

import logging
import time
from collections.abc import Callable

from orchestrator.errors import RunDirError, first_line
from orchestrator.masking import masked
from orchestrator.tracking.store import STORE_ERRORS, is_there

logger = logging.getLogger(__name__)
SLOW_FAILURE_S = 1.0
"""A failed write that took longer holds up the search: the store is then left alone for PAUSE_S."""
PAUSE_S = 60.0
PROBE_S = 2.0
"""How long a server that has failed may take to answer a probe, before anything is sent to it."""


class Delivery:
    """Guards writes to one store: counts and logs failures, and pauses while the store is away."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.num_failed = 0
        """Writes that failed or were left out while the store was away."""
        self._paused_until = 0.0
        self._last_failure: str | None = None
        """What the store said when it failed last; None after a write that succeeded."""

    def attempt(self, write: Callable[[], None]) -> None:
        """Write unless the store is away. Log the first of equal failures, count all, and pause after a slow one."""
        if self._is_away():
            self.num_failed += 1
            return
        began = time.monotonic()
        try:
            write()
        except (
            *STORE_ERRORS,
            RunDirError,
        ) as error:  # a damaged file of the run directory: the report at the end refuses it
            self.num_failed += 1
            if first_line(error) != self._last_failure:
                self._last_failure = first_line(error)
                logger.warning(
                    "MLflow at %s cannot be written (%s); the search continues, and what is missing is sent later",
                    masked(self.uri),
                    self._last_failure,
                )
            if time.monotonic() - began > SLOW_FAILURE_S:
                self._paused_until = time.monotonic() + PAUSE_S
        else:
            self._last_failure = None

    def end_pause(self) -> None:
        """Try the store at the next write."""
        self._paused_until = 0.0

    def _is_away(self) -> bool:
        """Return whether the store is to be left alone: for PAUSE_S, and for as long as a server that failed is silent.

        A server that hangs would hold up each write through all its retries; a probe takes PROBE_S at most.
        """
        if time.monotonic() < self._paused_until:
            return True
        if self._last_failure is None or is_there(self.uri, PROBE_S):
            return False
        self._paused_until = time.monotonic() + PAUSE_S
        return True
