"""Widths in steps of the hardware: which channels stay, and that the cost stays within its target."""

import pytest
import torch
from torch import nn

import gator
from tests.gator.law import assert_law


def gated_chain(
    widths: tuple[int, int] = (16, 32), kept: tuple[int, int] = (9, 21)
) -> tuple[gator.GatedModel, gator.MacsCost]:
    """Return two convolutions and a classifier, the first channels of each group open, the first ones most probable."""
    first, second = widths
    model = nn.Sequential(
        *(
            nn.Conv2d(3, first, 3),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3),
            nn.BatchNorm2d(second),
        ),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 5)),
    )
    graph = gator.trace(model.double().eval(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    gated = gator.GatedModel(model, graph)
    with torch.no_grad():
        logits = [torch.linspace(3, -1, first), torch.linspace(2.9, -1.1, second)]
        gated.gates.logits_C.copy_(torch.cat(logits))
    gated.load_architecture(gator.Architecture.from_keep(graph, {"0": range(kept[0]), "3": range(kept[1])}))
    return gated.eval(), gator.MacsCost(graph)


def test_with_room_every_group_is_rounded_up_with_its_most_probable_channels() -> None:
    gated, cost = gated_chain()
    architecture = gator.aligned(gated, cost, step=8, target_ratio=1.0)
    assert architecture.keep == {"0": tuple(range(16)), "3": tuple(range(24))}


def test_without_room_the_channels_worth_least_per_cost_are_dropped() -> None:
    gated, cost = gated_chain()
    architecture = gator.aligned(gated, cost, step=8)
    assert cost(architecture) <= cost(gated.architecture())
    # 16 and 24 wide is too much. Down to 8 in the first group saves 8 * (36 * 27 + 16 * 9 * 24) = 35,424 MACs at widths of
    # 16 and 24 for the probabilities of its last eight, the second 8 * (16 * 9 * 16 + 5) = 18,472 for those of channels 16 to 23.
    assert architecture.keep == {"0": tuple(range(8)), "3": tuple(range(24))}


@pytest.mark.parametrize("step", [1, 2, 4, 8])
@pytest.mark.parametrize("target_ratio", [0.6, 0.3])
def test_widths_are_multiples_within_the_target(step: int, target_ratio: float) -> None:
    gated, cost = gated_chain()
    architecture = gator.aligned(gated, cost, step, target_ratio)
    assert cost(architecture) <= target_ratio * cost.full
    assert all(width > 0 and width % step == 0 for width in architecture.widths.values())
    gated.load_architecture(architecture)
    assert gated.architecture() == architecture
    model = gated.body.model
    assert_law(model, cost.graph, torch.randn(2, 3, 8, 8, dtype=torch.float64), dict(architecture.keep))


def test_step_one_changes_nothing_that_is_within_the_target() -> None:
    gated, cost = gated_chain()
    assert gator.aligned(gated, cost, step=1) == gated.architecture()


def test_a_group_without_a_multiple_keeps_all_its_channels() -> None:
    gated, cost = gated_chain(widths=(12, 32), kept=(9, 21))
    assert gator.aligned(gated, cost, step=8, target_ratio=1.0).widths == {"0": 12, "3": 24}


def test_each_group_can_have_a_step_of_its_own() -> None:
    gated, cost = gated_chain()
    assert gator.aligned(gated, cost, {"0": 2, "3": 16}, target_ratio=1.0).widths == {"0": 10, "3": 32}


@pytest.mark.parametrize(
    ("step", "target_ratio", "message"),
    [
        (0, None, "step is 0 for group 0, expected at least 1"),
        ({"0": 8}, None, "step is None for group 3, expected at least 1"),
        (16, 0.1, r"steps of 16 at least 0\.\d+ of the full cost remain"),
    ],
    ids=["no step", "a group without one", "too coarse"],
)
def test_what_cannot_be_is_one_clear_error(
    step: int | dict[str, int], target_ratio: float | None, message: str
) -> None:
    gated, cost = gated_chain()
    with pytest.raises(gator.GateError, match=message):
        gator.aligned(gated, cost, step, target_ratio)
