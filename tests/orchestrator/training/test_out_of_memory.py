"""Out of memory is told by name, with what to lower."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.errors import OutOfMemoryError, TrialError
from orchestrator.training.out_of_memory import lack_of_memory_named
from orchestrator.training.ranks import Ranks
from tests.orchestrator.commands.test_search import PROJECT
from tests.orchestrator.tiny_trial import TINY, tiny

STARVED = """
import resource, sys
from pathlib import Path

import torch

from orchestrator.trial.worker import run_assignment
from tests.orchestrator.tiny_trial import MemorySession, assign, tiny

folder = Path(sys.argv[1])
config = tiny(data__image_size=64, data__num_train=400, data__global_batch_size=256, model__kwargs={"width": 32})
assignment = assign(folder, config)
torch.ones(2**20, requires_grad=True).exp().sum().backward()  # starts all threads: one that lacks memory for its stack says EAGAIN
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
try:
    run_assignment(assignment, MemorySession(folder))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_failed_allocation_says_what_to_lower(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARVED, str(tmp_path)]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("OutOfMemoryError: out of memory on cpu of "), told
    assert "DefaultCPUAllocator: can't allocate memory" in told
    assert "data.global_batch_size 256, 256 images a worker, training.micro_batch_size none" in told
    assert "--set base.training.micro_batch_size=128" in told
    assert "DefaultCPUAllocator" in (tmp_path / "trial" / "log.txt").read_text()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
    ],
    ids=str,
)
def test_every_allocator_is_known(error: BaseException) -> None:
    config = tiny(data__global_batch_size=100, training__micro_batch_size=10)
    with (
        pytest.raises(
            OutOfMemoryError, match=r"worker 1 of 3: .*100, 34 images a worker, .*micro_batch_size 10.* to 5"
        ),
        lack_of_memory_named(config, Ranks(rank=1, world_size=3)),
    ):
        raise error
    assert issubclass(OutOfMemoryError, TrialError)  # one trial's: the search goes on with the others


def test_another_error_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), lack_of_memory_named(TINY, Ranks()):
        raise RuntimeError("shapes do not fit")
