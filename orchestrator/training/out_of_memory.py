"""Out of memory, reported with the settings that decide how much a training needs."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.config.trial import TrialConfig
from orchestrator.errors import OutOfMemoryError, first_line
from orchestrator.training.ranks import Ranks

# Words of plain RuntimeErrors: of torch's allocator for a CPU, of CUDA and its libraries. torch.OutOfMemoryError is a class.
_ALLOCATORS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
)


@contextmanager
def lack_of_memory_named(config: TrialConfig, ranks: Ranks) -> Iterator[None]:
    """Raise OutOfMemoryError in place of what allocators raise in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise OutOfMemoryError(_message(error, config, ranks)) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an allocator, Python's or torch's, raised the error for lack of memory."""
    is_allocators = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_allocators or any(word in str(error) for word in _ALLOCATORS)


def _message(error: BaseException, config: TrialConfig, ranks: Ranks) -> str:
    batch_size = config.data.global_batch_size
    share = -(-batch_size // ranks.world_size)
    micro = config.training.micro_batch_size
    half = max(1, min(micro or share, share) // 2)
    return (
        f"out of memory on {ranks.device} of {socket.gethostname()}, worker {ranks.rank} of {ranks.world_size}: {first_line(error)}. "
        f"Found data.global_batch_size {batch_size}, {share} images a worker, training.micro_batch_size {micro or 'none'}, "
        f"evaluation.batch_size {config.evaluation.batch_size}; set training.micro_batch_size to {half} in the "
        f"space's base (--set base.training.micro_batch_size={half}), which changes BatchNorm's batches only; lower "
        "evaluation.batch_size or data.num_loader_workers if these need the memory; or give each worker more "
        "in the cluster's YAML"
    )
