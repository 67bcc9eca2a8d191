"""The plain choices of channels: at the asked cost, and each by its own rule."""

import pytest
import torch
from torch import nn

import gator
from gator.pruning.baselines import BaselineKind, baseline, close_in_order, magnitudes
from orchestrator.config.trial import ModelConfig
from orchestrator.models import networks as models

KINDS: tuple[BaselineKind, ...] = ("uniform", "random", "magnitude")


def resnet20(width: int) -> tuple[nn.Module, gator.ChannelGraph]:
    torch.manual_seed(0)
    model = models.build(ModelConfig(name="resnet20_cifar", num_classes=10, kwargs={"width": width}))
    return model, gator.trace(model, torch.zeros(1, 3, 28, 28))


@pytest.fixture(scope="module")
def narrow() -> tuple[nn.Module, gator.ChannelGraph]:
    return resnet20(width=8)


@pytest.mark.parametrize(
    ("kind", "ratio"), [(kind, ratio) for kind in KINDS for ratio in (0.7, 0.5, 0.3, 0.15)], ids=str
)
def test_cost_lands_within_one_percent(
    narrow: tuple[nn.Module, gator.ChannelGraph], kind: BaselineKind, ratio: float
) -> None:
    model, graph = narrow
    cost = gator.MacsCost(graph)
    architecture = baseline(kind, model, cost, ratio)
    assert cost(architecture) / cost.full == pytest.approx(ratio, rel=0.01)
    assert architecture.removed_blocks == ()


def test_another_cost_is_met_too(narrow: tuple[nn.Module, gator.ChannelGraph]) -> None:
    model, graph = narrow
    cost = gator.ParamsCost(graph)
    assert cost(baseline("uniform", model, cost, 0.4)) / cost.full == pytest.approx(0.4, rel=0.01)


def test_uniform_keeps_the_same_share_of_every_group(narrow: tuple[nn.Module, gator.ChannelGraph]) -> None:
    model, graph = narrow
    architecture = baseline("uniform", model, gator.MacsCost(graph), 0.25)
    # MACs go with the square of the width, so about half of each group; one channel more or less closes the last gap
    assert all(abs(architecture.widths[group.name] - group.num_channels / 2) <= 1 for group in graph.groups)


def test_uniform_keeps_the_largest_of_each_group(narrow: tuple[nn.Module, gator.ChannelGraph]) -> None:
    model, graph = narrow
    architecture = baseline("uniform", model, gator.MacsCost(graph), 0.3)
    for group, sizes in zip(
        graph.groups, magnitudes(model, graph).split([g.num_channels for g in graph.groups]), strict=True
    ):
        kept = list(architecture.keep[group.name])
        closed = sorted(set(range(group.num_channels)) - set(kept))
        assert not closed or sizes[closed].max() <= sizes[kept].min()


def test_random_depends_on_the_seed_alone(narrow: tuple[nn.Module, gator.ChannelGraph]) -> None:
    model, graph = narrow
    cost = gator.MacsCost(graph)
    first = baseline("random", model, cost, 0.5, seed=1)
    assert baseline("random", nn.Identity(), cost, 0.5, seed=1) == first
    assert baseline("random", model, cost, 0.5, seed=2) != first


def test_magnitude_is_the_sum_of_absolute_weights_that_go_with_a_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 1))
    graph = gator.trace(model, torch.zeros(1, 1, 4, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-2.0, 1.0]).view(2, 1, 1, 1))
        model[3].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.5], [1.0, 0.0]]).view(3, 2, 1, 1))
    assert magnitudes(model, graph).tolist() == [2 + 3, 1 + 0.5]  # written by model[0], read by model[3]
    kept = baseline("magnitude", model, gator.MacsCost(graph), 0.5)
    assert list(kept.keep.values()) == [(0,)]


def test_a_channel_too_large_for_what_is_missing_is_passed_over() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    cost = gator.MacsCost(gator.trace(model, torch.zeros(1, 1, 1, 1)))
    # a + a b + b with a = b = 4 costs 24. From (4, 3), 19, either group's next channel goes too far below 18.
    assert cost(close_in_order(cost, torch.tensor([4, 0, 1, 2, 3, 5, 6, 7]), 18 / 24)) == 19


@pytest.mark.parametrize(
    ("ratio", "message"), [(0.0, "expected a share"), (1.1, "expected a share"), (0.001, "one channel in each group")]
)
def test_a_target_out_of_reach_is_refused(
    narrow: tuple[nn.Module, gator.ChannelGraph], ratio: float, message: str
) -> None:
    model, graph = narrow
    with pytest.raises(gator.GateError, match=message):
        baseline("uniform", model, gator.MacsCost(graph), ratio)
