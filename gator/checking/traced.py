"""trace() as library users call it: with a verification, if they ask for one."""

from collections.abc import Sequence

from torch import Tensor, nn

from gator.checking.verify import verify as verify_graph
from gator.graph.graph import ChannelGraph
from gator.tracing import trace as tracing


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    *,
    verify: bool = False,
) -> ChannelGraph:
    """Return the channel groups of a network: what gator.tracing.trace.trace() returns for these arguments.

    verify: run gator.verify() on the result, which cuts the network in some ways and compares. Takes as long as 14 to 20
    forward passes of one sample in float64, and needs a network that is not on the meta device.

    Raises: TraceError if the network cannot be traced; VerificationError if gator would prune it wrongly.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(group.name, group.num_channels) for group in trace(net, torch.zeros(1, 3, 8, 8), verify=True).groups]
    [('0', 8)]
    """
    graph = tracing.trace(model, example_inputs, include, exclude)
    if verify:
        verify_graph(model, graph, example_inputs)
    return graph
