"""a function in a process of its own on a node"""

from collections.abc import Callable
from typing import Any, TypeVar

import ray

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import ProfileConfig
from orchestrator.errors import MeasurerError, in_one_line

# glibc gives large blocks back to the kernel when they are freed, and asks for them again in the next forward pass:
# page faults in the timing. 32 MiB is the largest threshold that every glibc accepts.
TIMING_ENV = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
T = TypeVar("T")


def measuring_device(cluster: ClusterConfig) -> str:
    """Return the device that networks are timed on: cuda, or cpu."""
    return "cuda" if cluster.gpus_to_measure else "cpu"


def in_own_process(
    function: Callable[..., T], *arguments: Any, profile: ProfileConfig, cluster: ClusterConfig, num_gpus: float = 0
) -> T:
    """Return what the function returns in a new process, on a node where networks are measured; here without Ray.

    A process that has trained is no place to time a network: its heap is in pieces, and its allocator set otherwise.
    arguments: plain values. Raises: what the function raises; MeasurerError if the process dies twice.
    """
    if not ray.is_initialized():
        return function(*arguments)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus, "max_calls": 1, "max_retries": 1}
    if cluster.measure_on is not None:
        options["resources"] = {cluster.measure_on: 0.001}
    options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(profile.num_threads), **TIMING_ENV}}
    task = ray.remote(**options)(function)
    try:
        result: T = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise MeasurerError(
            f"the process that runs {function.__name__.strip('_')} was lost twice ({in_one_line(error)}); out of memory is the most "
            "frequent reason; what is recorded is kept, and the same command goes on"
        ) from error
    return result
