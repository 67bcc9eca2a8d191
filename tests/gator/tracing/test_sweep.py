"""Every classifier of torchvision keeps the laws. What each network reaches: benchmarks/results/classifiers.md."""

import pytest
import torch

from tests.gator import sweep


@pytest.mark.slow
@pytest.mark.timeout(sweep.TIMEOUT_S + 30)
@pytest.mark.parametrize("name", sweep.NAMES)
def test_classifier_keeps_the_laws(name: str) -> None:
    assert sweep.in_own_process(name).failures == []


def test_a_network_that_cannot_be_built_is_a_failure_not_a_crash() -> None:
    assert sweep.check("resnet17").failures == ["ValueError: Unknown model resnet17"]


def test_a_difference_is_told_from_rounding() -> None:
    one = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert sweep.relative_error(one + torch.tensor([0.0, 3e-10]), one) == pytest.approx(1.5e-10)
    assert not sweep.is_alive(one, one)  # nothing was cut that anyone could see
    assert not sweep.is_alive(one / 0, one)
