"""The networks that are trained on the stand-in device: the zoo's, and those whose forward passes make tensors on a device."""

import torch
from torch import Tensor, nn

from tests.gator.zoo import ZOO, Case


class MakesTensors(nn.Module):
    """Adds a tensor that forward() makes to the channels in line, so that its forward pass is regenerated under gates."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.head = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add a number to each of the 5 positions."""
        if self.kind == "arange":
            made = torch.arange(5, device=x.device, dtype=x.dtype)
        elif self.kind == "zeros":
            made = torch.zeros(5, device=x.device) + 1
        elif self.kind == "linspace":
            made = torch.linspace(0, 1, 5, device=x.device)
        else:
            made = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=x.device)
        return self.head(self.two(self.one(x) + made).relu())


KINDS = ("arange", "zeros", "linspace", "tensor")
NETWORKS = ZOO | {
    f"makes {kind}": Case(lambda kind=kind: MakesTensors(kind), {}, input_shape=(2, 3, 5)) for kind in KINDS
}
