from typing import Any

import pytest
import torch
from torch import nn

import gator


def test_statistics_become_the_mean_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.1), nn.Dropout(0.9)).train()
    model(torch.full((2, 1, 2, 2), 50.0))  # what is replaced
    # batches of the values (0, 2) and (4, 8): means 1 and 6, unbiased variances 2 and 8
    batches = [torch.tensor(values).view(2, 1, 1, 1) for values in ([0.0, 2.0], [4.0, 8.0])]
    gator.reestimate_batchnorm(model, batches)
    norm = model[0]
    assert (norm.running_mean.item(), norm.running_var.item()) == (3.5, 5.0)
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], gator.PruneError, "there is no batch"),
        ([[torch.zeros(2, 1, 2, 2), torch.zeros(2)]], gator.PruneError, "batch 1 is a list, expected a tensor"),
        ([torch.ones(2, 1, 2, 2), torch.zeros(2, 3, 2, 2)], RuntimeError, "running_mean"),
    ],
    ids=["none", "with labels", "the second does not fit"],
)
def test_what_cannot_be_estimated_leaves_the_statistics(
    batches: list[Any], error: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.BatchNorm2d(1))
    model(torch.randn(2, 1, 2, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(error, match=message):
        gator.reestimate_batchnorm(model, batches)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not model[0].training
