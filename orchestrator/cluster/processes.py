"""A function in a process of its own on a node, or spread over the CPUs of all nodes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import ray

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import ProfileConfig
from orchestrator.errors import MeasurerError, OrchestratorError, in_one_line

# glibc gives large blocks back to the kernel when they are freed, and asks for them again in the next forward pass:
# page faults in the timing. 32 MiB is the largest threshold that every glibc accepts.
TIMING_ENV = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
T = TypeVar("T")


def measuring_device(cluster: ClusterConfig) -> str:
    """Return the device that networks are timed on: cuda, or cpu."""
    return "cuda" if cluster.gpus_to_measure else "cpu"


def in_own_process(
    function: Callable[..., T],
    *arguments: Any,
    profile: ProfileConfig,
    cluster: ClusterConfig,
    num_gpus: float = 0,
    is_on_head: bool = False,
) -> T:
    """Return what the function returns in a new process, on a node where networks are measured; here without Ray.

    A process that has trained cannot time a network well: its heap is fragmented, and its allocator has other settings.
    arguments: plain values.    is_on_head: whether it needs the head's disk instead.
    Raises: what the function raises; MeasurerError if the process dies twice.
    """
    if not ray.is_initialized():
        return function(*arguments)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus, "max_calls": 1, "max_retries": 1}
    if is_on_head:
        options["resources"] = {"node:__internal_head__": 0.001}
    elif cluster.measure_on is not None:
        options["resources"] = {cluster.measure_on: 0.001}
    elif num_gpus:  # the kind of GPU that the trials ask for
        kinds = [name for name in cluster.resources_per_worker if name.startswith("accelerator_type:")]
        options |= {"resources": dict.fromkeys(kinds, 0.001), "label_selector": cluster.worker_labels}
    options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(profile.num_threads), **TIMING_ENV}}
    task = ray.remote(**options)(function)
    try:
        result: T = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise MeasurerError(
            f"the process that runs {function.__name__.strip('_')} crashed twice ({in_one_line(error)}), most often because of "
            "insufficient memory. Finished results are saved; rerun the same command to resume"
        ) from error
    return result


def spread(function: Callable[[Any], T], tasks: Mapping[str, Any]) -> Iterator[T]:
    """Yield what the function returns for each task, in the order in which they end; every call gets one CPU of some node.

    tasks: by names for error messages.    Raises: what the function raises; OrchestratorError if the process of a task is lost.
    """
    run = ray.remote(num_cpus=1)(function)
    waiting = {run.remote(task): name for name, task in tasks.items()}
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        name = waiting.pop(done)
        try:
            result: T = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:  # a process, a node or Ray itself
            raise OrchestratorError(
                f"{name}: the process that worked on it was lost ({in_one_line(error)}). Finished tasks are kept; rerun the same "
                "command to resume"
            ) from error
        yield result
