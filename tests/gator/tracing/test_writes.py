"""Ops in place on parts of a value: later readers of the value, and of other parts of it, see what was written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gator
from tests.gator.oracle import assert_exact


class Net(nn.Module):
    """A value of 16 channels, and one of 8 that a normalisation makes, combined by code that a test gives."""

    def __init__(self, combine: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.short, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.norm, self.act, self.combine = nn.BatchNorm2d(8), nn.SiLU(inplace=True), combine
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Read what became of the value."""
        return self.head(self.combine(self, self.conv(x), self.norm(self.short(x))))


def add_to_half(net: Any, y: Tensor, s: Tensor) -> Tensor:
    y[:, :8].add_(s)
    return y


def add_and_assign(net: Any, y: Tensor, s: Tensor) -> Tensor:
    y[:, 8:] += s
    return y


def write_a_part(net: Any, y: Tensor, s: Tensor) -> Tensor:
    one, two = y.chunk(2, 1)
    two.sigmoid_()
    return torch.cat([two, one * s], 1)


def write_the_whole_through_a_view(net: Any, y: Tensor, s: Tensor) -> Tensor:
    y.flatten(2).add_(torch.cat([s, s.sigmoid()], 1).flatten(2))
    return y


def read_a_part_taken_before(net: Any, y: Tensor, s: Tensor) -> Tensor:
    part = y[:, :8]
    y.sigmoid_()
    return torch.cat([part, s], 1) + y


def set_positions(net: Any, y: Tensor, s: Tensor) -> Tensor:
    y[:, :, 2:4] = torch.cat([s, s], 1)[:, :, :2]
    return y


def write_twice(net: Any, y: Tensor, s: Tensor) -> Tensor:
    y.view(-1, 2, 8, *y.shape[2:]).transpose(1, 2)[:, :, 0].add_(s)
    y.select(3, 1).exp_()
    return y


def write_in_a_module(net: Any, y: Tensor, s: Tensor) -> Tensor:
    net.act(y[:, :8])
    return y + torch.cat([s, s], 1)


def write_the_sum_of_a_residual(net: Any, y: Tensor, s: Tensor) -> Tensor:
    y = torch.cat([s, s], 1) + y
    y.relu_()
    y.narrow(1, 0, 8).mul_(0.5)
    return y


def write_what_a_write_returned(net: Any, y: Tensor, s: Tensor) -> Tensor:
    part = y[:, :8].mul_(s)
    part.relu_()
    return y


WRITES = [
    *(
        add_to_half,
        add_and_assign,
        write_a_part,
        write_the_whole_through_a_view,
        read_a_part_taken_before,
        set_positions,
    ),
    *(write_twice, write_in_a_module, write_the_sum_of_a_residual, write_what_a_write_returned),
]


@pytest.mark.parametrize("combine", WRITES, ids=lambda combine: combine.__name__)
def test_later_readers_see_what_was_written(combine: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    graph = assert_exact(lambda: Net(combine), larger=(2, 3, 10, 6))
    assert {locked.name for locked in graph.locked} <= {"head"}


def test_a_write_that_cannot_be_followed_locks_what_it_touches() -> None:
    def combine(net: Any, y: Tensor, s: Tensor) -> Tensor:
        y[:, ::2].add_(s)
        return y

    graph = gator.trace(Net(combine), torch.zeros(1, 3, 8, 8))
    reasons = {locked.name: locked.reason for locked in graph.locked}
    assert "aten.add_ at '' writes over a part of a value that is read again" in reasons["conv"]
    assert {group.name for group in graph.groups} <= {"short"}
