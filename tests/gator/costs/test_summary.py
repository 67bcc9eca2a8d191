"""What print(graph) says."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gator
from gator.costs.summary import summarise
from tests.gator.zoo import ZOO


def test_every_group_is_shown_with_its_cost_its_members_and_its_block() -> None:
    text = str(gator.trace(ZOO["basic"].build(), torch.zeros(1, 3, 32, 32)))
    line = next(line for line in text.splitlines() if line.startswith("layer1.1.conv1 "))
    # 8 channels at 8 x 8 positions, between two 3x3 convolutions of 8 channels: 7 of the 8 go on both sides, and their
    # 2 x 9 x 8 weights each and the 2 parameters of batch normalisation.
    assert line.split()[1:3] == ["8", f"{2 * 7 * 8 * 9 * 64:,}"]
    assert line.split()[4] == f"{7 * (2 * 9 * 8 + 2):,}"
    assert line.endswith("layer1.1.conv1:out, layer1.1.conv2:in  [removes layer1.1]")


def test_locked_groups_are_shown_with_their_reasons() -> None:
    lines = str(gator.trace(ZOO["unknown"].build(), torch.zeros(1, 3, 8, 8))).splitlines()
    locked = lines[next(number for number, line in enumerate(lines) if line.startswith("locked")) :]
    assert any(line.startswith("stem           4  aten.logcumsumexp at '' has no channel rule") for line in locked)
    assert "head           2  output of the model" in locked


def test_reach_counts_what_no_group_runs_through() -> None:
    # 64 positions: stem 3 -> 4 is locked on both sides, inner 4 -> 6 and head 6 -> 2 shrink to a sixth.
    summary = summarise(gator.trace(ZOO["unknown"].build(), torch.zeros(1, 3, 8, 8)))
    full, smallest = 3 * 4 + 4 * 6 + 6 * 2, 3 * 4 + 4 * 1 + 1 * 2
    assert summary.macs.full == 64 * full
    assert summary.macs.reachable == pytest.approx(1 - smallest / full)


def test_what_one_group_costs_is_the_difference_of_two_costs() -> None:
    graph = gator.trace(ZOO["bottleneck"].build(), torch.zeros(1, 3, 32, 32))
    summary, cost = summarise(graph), gator.ParamsCost(graph)
    for group, params in zip(graph.groups, summary.params.per_group, strict=True):
        assert params == cost.full - cost(gator.Architecture.from_keep(graph, {group.name: [0]}))


def test_a_network_without_channels_is_described_too() -> None:
    graph = gator.trace(nn.ReLU(), torch.zeros(1, 3))
    assert str(graph).splitlines()[1:] == [
        "groups: 0, of 0 channels; removable blocks: 0",
        "reachable: 0.00% of 0 MACs an image, 0.00% of 0 parameters (gone when every group is at one channel)",
        "nothing to prune: the exported graph has no convolution or linear layer; it runs relu (1)",
    ]


class Pairs(nn.Module):
    """Two convolutions, and products of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)), nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify products of all pairs of channels."""
        y = self.conv(x).flatten(2)
        return self.head((y @ y.transpose(1, 2)).flatten(1))


def test_reach_is_over_all_products() -> None:
    # 64 positions: 3 x 8 + 8 x 6 of which group 0 is in all; 6 x 6 x 64 in the product, and the head's 36 x 4, which stay.
    summary = summarise(gator.trace(Pairs(), torch.zeros(1, 3, 8, 8)))
    full, smallest = 64 * (3 * 8 + 8 * 6 + 36) + 144, 64 * (3 * 1 + 1 * 6 + 36) + 144
    assert summary.macs.full == full
    assert summary.macs.reachable == pytest.approx(1 - smallest / full)
    assert "of these in products without a layer, such as attention's: 2,304 MACs an image" in str(summary)


def test_an_op_that_multiplies_by_unknown_widths_is_named() -> None:
    graph = replace(gator.trace(ZOO["chain"].build(), torch.zeros(1, 3, 8, 8)), uncounted=("aten.cdist at 'head'",) * 2)
    assert "not among the MACs, of unknown widths: aten.cdist at 'head'" in str(summarise(graph)).splitlines()


@torch.library.custom_op("gator_tests::opaque", mutates_args=())
def opaque(x: Tensor, weight: Tensor) -> Tensor:
    """Return a convolution that the exported graph does not show."""
    return nn.functional.conv2d(x, weight)


@opaque.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight), *x.shape[2:])


class Opaque(nn.Conv2d):
    """A convolution that runs in an op of its own, as those prepared for quantisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the result of the op."""
        return opaque(x, self.weight)


def test_a_network_of_opaque_ops_says_which_it_runs() -> None:
    graph = gator.trace(nn.Sequential(Opaque(3, 4, 1), nn.ReLU(), Opaque(4, 2, 1)), torch.zeros(1, 3, 8, 8))
    why = "the exported graph has no convolution or linear layer; it runs gator_tests::opaque (2), relu (1)"
    assert str(graph).splitlines()[-1] == f"nothing to prune: {why}"
    with pytest.raises(gator.GateError, match=re.escape(why)):
        gator.GatedModel(nn.Sequential(Opaque(3, 4, 1), nn.ReLU(), Opaque(4, 2, 1)), graph)


class Rounded(nn.Conv2d):
    """A convolution whose weight is rounded by an op without a channel rule, as in training for quantisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the rounded weight."""
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.1, 0, -128, 127)
        return nn.functional.conv2d(x, weight, self.bias)


class Cell(nn.Module):
    """A recurrent cell alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the state after one step."""
        return self.cell(x.flatten(1))


@pytest.mark.filterwarnings("ignore:.*during export:UserWarning")
@pytest.mark.parametrize(
    ("network", "locked"),
    [
        (
            nn.Sequential(Rounded(3, 4, 1), nn.ReLU(), Rounded(4, 2, 1)),
            dict.fromkeys(("0", "2"), "the weight from aten.fake_quantize_per_tensor_affine"),
        ),
        (Cell(), {"cell": "aten.gru_cell at 'cell' keeps its state whole"}),
    ],
    ids=["computed", "cell"],
)
def test_a_layer_without_labels_is_locked_with_the_reason(network: nn.Module, locked: dict[str, str]) -> None:
    graph = gator.trace(network, torch.zeros(1, 3, 4, 2))
    found = {group.name: group.reason for group in graph.locked}
    assert not graph.groups
    assert found.keys() == locked.keys()
    assert all(found[name].startswith(reason) for name, reason in locked.items())
