"""Reports what waits for room on the cluster, with what the nodes have: within a minute, and then ever more sparsely."""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from threading import Event, Thread

import ray
from ray.util.state import list_cluster_events
from ray.util.state.exception import RayStateApiException

from orchestrator.cluster.capacity import demand, present
from orchestrator.config.cluster import ClusterConfig

logger = logging.getLogger(__name__)
REPORTED_AFTER_S = (45.0, 300.0, 1500.0)
"""A wait is reported when it has lasted so long; the last of them again and again."""
LOOK_S = 5.0
CANNOT = "No available node types can fulfill"
"""How an event begins that Ray's autoscaler writes every few seconds while no node type can serve a request."""
RECENT = timedelta(seconds=60)


class Waiting:
    """The trainings whose workers have not started, and since when."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._since_s: dict[str, float] = {}
        self._num_reports: dict[str, int] = {}

    def text(self, names: Collection[str], now_s: float) -> str | None:
        """Return what to report of the trainings that wait now; None if nothing of that is due."""
        self._since_s = {name: self._since_s.get(name, now_s) for name in names}
        self._num_reports = {name: self._num_reports.get(name, 0) for name in names}
        due = [name for name in names if now_s - self._since_s[name] >= self._next_s(name)]
        for name in due:
            self._num_reports[name] += 1
        if not due:
            return None
        verb = "waits" if len(due) == 1 else "wait"
        return (
            f"{', '.join(due)} {verb} for {demand(self._cluster)}; the nodes have {present()}, `ray status` shows what is in use "
            f"and what an autoscaler adds{'' if self._cluster.grows_to is None else autoscaler_answer()}"
        )

    def _next_s(self, name: str) -> float:
        """Return after how many seconds of waiting the next report is due."""
        num, last = self._num_reports[name], len(REPORTED_AFTER_S) - 1
        return REPORTED_AFTER_S[min(num, last)] * max(1, num - last + 1)


@contextmanager
def reported_while_waiting(
    name: str, cluster: ClusterConfig, has_started: Callable[[], bool], report: Callable[[str], None]
) -> Iterator[None]:
    """While the body trains, report that its workers have not started, from another thread."""
    ended, waiting = Event(), Waiting(cluster)

    def watch() -> None:
        """Look until the workers have started, or the body has ended."""
        while not ended.wait(LOOK_S) and ray.is_initialized() and not has_started():
            if (text := waiting.text([name], time.monotonic())) is not None:
                report(text)

    Thread(target=watch, daemon=True, name=f"waiting of {name}").start()
    try:
        yield
    finally:
        ended.set()


def autoscaler_answer() -> str:
    """Return "; Ray's autoscaler reports: No available node types ..."; empty if it reports no such thing, or cannot be asked."""
    try:
        events = list_cluster_events(
            ray.get_runtime_context().gcs_address,
            filters=[("source_type", "=", "AUTOSCALER")],
            limit=10_000,  # the oldest come first, and Ray keeps so many
            timeout=10,
            raise_on_missing_output=False,
        )
    except (RayStateApiException, ConnectionError, RuntimeError, ValueError) as error:  # no dashboard, or no answer
        logger.debug("Ray's events cannot be read: %s", error)
        return ""
    since = str(datetime.now() - RECENT)  # local time, as Ray's dashboard on the head writes it
    recent = [str(event["message"]) for event in events if event["time"] > since]
    return next((f"; Ray's autoscaler reports: {text}" for text in reversed(recent) if text.startswith(CANNOT)), "")
