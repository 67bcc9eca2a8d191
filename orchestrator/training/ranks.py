"""The place of this process among those that train one network together, and what they do together."""

import hashlib
import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among those that train one network together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> "Ranks":
        """Return the place in torch's process group; that of a process alone when there is no group."""
        if not dist.is_initialized():
            return cls(device=device)
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, the same bits on each of them."""
        total = tensor.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def all_agree(self, text: str) -> bool:
        """Return whether every rank holds this very text."""
        if self.world_size == 1:
            return True
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
        extremes = torch.tensor([digest, -digest], device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def distribute(self, network: nn.Module) -> nn.Module:
        """Return the network under DistributedDataParallel, or as it is when this process is alone.

        No buffers are broadcast in each step: BatchNorm's running statistics, which differ between ranks, are estimated
        again before they are used, and the gates' place in the data must differ.
        """
        if self.world_size == 1:
            return network
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.14 renames the argument to forward_sync_buffers, which 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(
                network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )


def broadcast_state(network: nn.Module, ranks: Ranks) -> None:
    """Give every rank rank 0's parameters and buffers, so that all of them judge the network that rank 0 saves."""
    if ranks.world_size == 1:
        return
    for tensor in network.state_dict().values():
        dist.broadcast(tensor, src=0)
