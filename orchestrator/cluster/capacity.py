"""How many trials fit on the cluster at once, and what the cluster consists of."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import ClusterError

UNIT = 1e-4  # Ray counts resources in ten-thousandths, and so does this file: 4 * 0.3 fits into 1.2
INTERNAL = ("node:", "object_store_memory", "memory")
"""How names of resources begin that every node has."""


def capacity(cluster: ClusterConfig) -> int:
    """Return how many trials run at once.

    Raises: ClusterError if not even one fits on a cluster that does not grow, or if it has no node to measure on.
    """
    fits = num_now(cluster) if cluster.grows_to is None else cluster.grows_to
    if fits == 0:
        raise ClusterError(
            f"one trial needs {demand(cluster)}, the nodes have {present()}; lower workers_per_trial or resources_per_worker in "
            "the cluster's YAML, add nodes, or set grows_to if an autoscaler adds them"
        )
    if cluster.grows_to is None and not _has_node_to_measure_on(cluster):
        raise ClusterError(
            f"measure_on is {cluster.measure_on}, expected a custom resource of a node, the nodes have {present()}; start one with "
            f"`ray start --resources '{{\"{cluster.measure_on}\": 1}}'`, or leave measure_on out"
        )
    return min(fits, cluster.max_concurrent or fits)


def num_now(cluster: ClusterConfig) -> int:
    """Return how many trials the nodes hold that are alive now."""
    nodes = [node["Resources"] for node in _alive() if has_labels(node.get("Labels", {}), cluster.worker_labels)]
    fits = num_trials_that_fit(nodes, cluster.resources_per_worker, cluster.workers_per_trial)
    if fits == 0 and cluster.is_elastic:
        return min(1, num_trials_that_fit(nodes, cluster.resources_per_worker, cluster.fewest_workers))
    return fits


def demand(cluster: ClusterConfig) -> str:
    """Return what one trial needs, for messages: "2 workers with {CPU: 6, GPU: 1} each"."""
    labels = f" on nodes with the labels {_text(cluster.worker_labels)}" if cluster.worker_labels else ""
    num, each = cluster.fewest_workers, _text(cluster.resources_per_worker)
    return f"1 worker with {each}{labels}" if num == 1 else f"{num} workers with {each} each{labels}"


def present() -> str:
    """Return what the nodes have, for messages: "1 x {CPU: 4}, 2 x {CPU: 8, GPU: 1, accelerator_type:L4: 1}"."""
    kinds = Counter(
        _text({name: amount for name, amount in sorted(node["Resources"].items()) if not name.startswith(INTERNAL)})
        + _labels_text(node.get("Labels", {}))
        for node in _alive()
    )
    return ", ".join(f"{num} x {kind}" for kind, num in kinds.items()) or "nothing, as no node is alive"


def shape() -> dict[str, str]:
    """Return what the cluster consists of, for the record: nodes, CPU, GPU and the kinds of accelerators."""
    totals = ray.cluster_resources()
    kinds = sorted(name.partition(":")[2] for name in totals if name.startswith("accelerator_type:"))
    counts = {"nodes": len(_alive()), "CPU": totals.get("CPU", 0), "GPU": totals.get("GPU", 0)}
    return {name: f"{count:g}" for name, count in counts.items()} | {"accelerators": ", ".join(kinds) or "none"}


def has_nodes() -> bool:
    """Return whether any node is alive; Tune would wait forever for a place on none."""
    return bool(_alive())


def num_trials_that_fit(nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials of so many workers fit together; a worker does not span nodes.

    nodes: the resources of each.    worker: what one worker reserves.

    >>> num_trials_that_fit([{"CPU": 2}], {"CPU": 0.5}, 2), num_trials_that_fit([{"CPU": 2}], {"CPU": 0.51}, 2)
    (2, 1)
    """
    return sum(_num_that_fit(node, worker) for node in nodes) // num_workers


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether a node's labels are as wanted; a label that the node lacks is another than each value.

    >>> has_labels({"zone": "a"}, {"zone": "in(a, b)"}), has_labels({"zone": "a"}, {"zone": "!a"}), has_labels({}, {"zone": "!a"})
    (True, False, True)
    """
    for name, condition in wanted.items():
        text = condition.removeprefix("!")
        values = text[3:-1].split(",") if text.startswith("in(") else [text]
        if (labels.get(name) in [value.strip() for value in values]) == condition.startswith("!"):
            return False
    return True


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _has_node_to_measure_on(cluster: ClusterConfig) -> bool:
    return cluster.measure_on is None or any(cluster.measure_on in node["Resources"] for node in _alive())


def _labels_text(labels: Mapping[str, str]) -> str:
    shown = {name: value for name, value in sorted(labels.items()) if name != "ray.io/node-id"}
    return f" labelled {_text(shown)}" if shown else ""


def _text(values: Mapping[str, float] | Mapping[str, str]) -> str:
    return (
        "{"
        + ", ".join(f"{key}: {value if isinstance(value, str) else f'{value:g}'}" for key, value in values.items())
        + "}"
    )


def _num_that_fit(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return min(_units(node.get(name, 0)) // _units(amount) for name, amount in worker.items() if _units(amount))


def _units(amount: float) -> int:
    return round(amount / UNIT)
