"""How many trials fit on the cluster at once, and what the cluster consists of."""

from collections.abc import Mapping, Sequence

import ray

from orchestrator.config.cluster import TRIAL_DRIVER_CPU, ClusterConfig
from orchestrator.errors import ClusterError

UNIT = 1e-4  # Ray counts resources in ten-thousandths, and so does this file: 0.01 + 2 * 0.49 fits twice into 2


def capacity(cluster: ClusterConfig) -> int:
    """Return how many trials fit at once. Raises: ClusterError if not even one does."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = num_trials_that_fit(nodes, cluster.resources_per_worker, cluster.workers_per_trial)
    if fits == 0 and cluster.is_elastic:
        fits = min(1, num_trials_that_fit(nodes, cluster.resources_per_worker, cluster.fewest_workers))
    if fits == 0:
        names = ("CPU", *(name for name in cluster.resources_per_worker if name != "CPU"))
        present = [{name: node.get(name, 0) for name in names} for node in nodes]
        raise ClusterError(
            f"one trial needs {cluster.fewest_workers} workers with {cluster.resources_per_worker} each and "
            f"{TRIAL_DRIVER_CPU} CPU for its driver, the nodes have {present}; lower workers_per_trial or "
            "resources_per_worker in the cluster's YAML, or add nodes"
        )
    return min(fits, cluster.max_concurrent or fits)


def shape() -> dict[str, str]:
    """Return what the cluster consists of, for the record: nodes, CPU, GPU and the kinds of accelerators."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    totals = ray.cluster_resources()
    kinds = sorted(name.partition(":")[2] for name in totals if name.startswith("accelerator_type:"))
    counts = {"nodes": len(nodes), "CPU": totals.get("CPU", 0), "GPU": totals.get("GPU", 0)}
    return {name: f"{count:g}" for name, count in counts.items()} | {"accelerators": ", ".join(kinds) or "none"}


def has_nodes() -> bool:
    """Return whether any node is alive; Tune would wait forever for a place on none."""
    return any(node["Alive"] for node in ray.nodes())


def num_trials_that_fit(nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials of so many workers fit together with their drivers; a worker does not span nodes.

    nodes: the resources of each.    worker: what one worker reserves.

    >>> num_trials_that_fit([{"CPU": 2}], {"CPU": 0.49}, 2), num_trials_that_fit([{"CPU": 2}], {"CPU": 0.5}, 2)
    (2, 1)
    """
    slots = [_num_that_fit(node, worker) for node in nodes]
    worker_cpu = _units(worker.get("CPU", 0))
    driver_cpu = _units(TRIAL_DRIVER_CPU)
    spare_cpu = [_units(node.get("CPU", 0)) - num * worker_cpu for node, num in zip(nodes, slots, strict=True)]
    num_drivers = sum(cpu // driver_cpu for cpu in spare_cpu)
    for num_trials in range(sum(slots) // num_workers, 0, -1):
        # Worker slots that no trial fills make room for more drivers.
        free_slots = sum(slots) - num_trials * num_workers
        if num_trials <= num_drivers + free_slots * (worker_cpu // driver_cpu):
            return num_trials
    return 0


def _num_that_fit(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return min(_units(node.get(name, 0)) // _units(amount) for name, amount in worker.items() if _units(amount))


def _units(amount: float) -> int:
    return round(amount / UNIT)
