"""The process group of torch that joins a trial's workers: what ray.train.torch sets up, with torch imported by the workers only.

Two processes of each trial only wait for its workers: the one that Tune starts, and Ray Train's controller.
ray.train.torch would cost each of them the import of torch: 2 s of CPU time and 0.4 GB of memory.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import ray
from ray import train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.util import get_node_ip_address

logger = logging.getLogger(__name__)
COLLECTIVE_TIMEOUT_S = 1800  # as in ray.train.torch; so is the next
SHUTDOWN_TIMEOUT_S = 30


@dataclass
class ProcessGroupConfig(BackendConfig):
    """The process group of a Train run."""

    backend: str
    """nccl or gloo."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return the class that sets the group up."""
        return _ProcessGroup

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Return the context in which a worker runs its function."""
        return _on_its_gpu

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for Ray Train's records."""
        return asdict(self)


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Let all workers join; return when they have."""
        address = worker_group.execute_single(0, _free_address)
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, _join, backend_config.backend, address) for rank in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Let all workers leave; those that hang are left behind."""
        try:
            ray.get(worker_group.execute_async(_leave), timeout=SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:
            logger.warning("the workers did not leave their process group within %s s", SHUTDOWN_TIMEOUT_S)


def _free_address() -> tuple[str, int]:
    """Return this node's address and a port that is free on it."""
    address = get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind(("", 0))
        return address, listener.getsockname()[1]


def _join(backend: str, address: tuple[str, int]) -> None:
    """Join the group on this worker; return when all workers have joined.

    torchrun's environment variables are set: the own code of a network or of a data set may read them.
    """
    import torch.distributed as dist

    context = train.get_context()
    os.environ.update(
        MASTER_ADDR=address[0],
        MASTER_PORT=str(address[1]),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )
    if backend == "nccl":  # a collective that fails ends the process, which Ray Train sees
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))


def _leave() -> None:
    """Leave the group, and give this worker's cached memory back to its GPU."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _on_its_gpu() -> Iterator[None]:
    """Make the worker's GPU, if it has one, torch's current device."""
    import ray.train.torch
    import torch

    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    yield
