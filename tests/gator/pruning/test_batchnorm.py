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
