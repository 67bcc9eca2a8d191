"""Records CPU, memory, disk, network and GPUs in the search's MLflow run while it runs, if the cluster's YAML sets `system_metrics`.

With a tracking server that all nodes reach, an actor on every node samples it. The embedded SQLite store has one writer, the
driver, so only the driver's node is sampled there, as with a server on loopback. Off by default: sampling wakes up every ten
seconds, also during latency measurements.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

INTERVAL_S = 10


class NodeMonitor:
    """Samples one node until finish(). Its metrics are named system/<node>/..."""

    def __init__(self, run_id: str, node: str, tracking_uri: str) -> None:
        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=INTERVAL_S, resume_logging=True, node_id=node, tracking_uri=tracking_uri
        )
        self._monitor.start()

    def finish(self) -> None:
        """Stop, after the samples so far are sent."""
        self._monitor.finish()


@contextmanager
def system_metrics(run_id: str, tracking_uri: str) -> Iterator[None]:
    """Record what the nodes do while the block runs. run_id: the MLflow run. Ray runs already, or only this node counts."""
    host = urlsplit(tracking_uri).hostname if tracking_uri.startswith("http") else None
    if host is None or host == "localhost" or host.startswith("127.") or not ray.is_initialized():
        here = NodeMonitor(run_id, "driver", tracking_uri)
        try:
            yield
        finally:
            here.finish()
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    actors = [_start_on(node["NodeID"], run_id, node["NodeName"], tracking_uri) for node in nodes]
    try:
        yield
    finally:
        ray.wait([actor.finish.remote() for actor in actors], num_returns=len(actors), timeout=INTERVAL_S)
        for actor in actors:
            ray.kill(actor)


def _start_on(node_id: str, run_id: str, name: str, tracking_uri: str) -> ray.actor.ActorHandle:
    options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    return ray.remote(**options)(NodeMonitor).remote(run_id, name, tracking_uri)
