"""What tracing finds: groups, layers, locked groups, blocks."""

import pytest
import torch
from torch import nn
from torchvision import models

import gator
from gator.tracing.groups import gather_groups
from gator.tracing.labels import connected_components
from tests.gator.zoo import ZOO, Case, Parts, Shuffled


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO.keys())
def test_groups_are_those_the_network_states(case: Case) -> None:
    graph = case.graph
    assert {group.name: group.num_channels for group in graph.groups} == case.groups
    assert tuple(block.name for block in graph.blocks) == case.blocks
    assert {group.name for group in graph.locked} == set(case.locked) != set()
    assert all(case.locked[group.name] in group.reason for group in graph.locked)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("resnet18", 12), ("resnet34", 20), ("resnet50", 37), ("vgg16_bn", 15)),
        pytest.param("resnet101", 71, marks=pytest.mark.slow),
    ],
)
def test_group_counts_of_torchvision(name: str, count: int) -> None:
    # vgg16_bn: 13 groups of the features and 2 between the classifier's linear layers
    with torch.device("meta"):
        model = models.get_model(name)
    assert len(gator.trace(model, torch.zeros(1, 3, 224, 224, device="meta")).groups) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 8),  # every block
        ("mobilenet_v2", 10),  # 17 blocks, 7 of which begin a stage and have no shortcut
        pytest.param(
            "mobilenet_v3_large", 9, marks=pytest.mark.slow
        ),  # 10 blocks with a shortcut; the first has no channels of its own
        pytest.param("efficientnet_b0", 9, marks=pytest.mark.slow),  # 16 blocks, 7 of which begin a stage
        ("regnet_y_400mf", 16),  # every block, those that begin a stage included: their shortcut has a projection
    ],
)
def test_removable_blocks_of_torchvision(name: str, count: int) -> None:
    graph = gator.trace(models.get_model(name), torch.zeros(1, 3, 32, 32))
    assert len(graph.blocks) == count
    assert {group.block for group in graph.groups} - {None} == {block.name for block in graph.blocks}


def test_highway_couples_all_its_writers_and_readers() -> None:
    graph = gator.trace(ZOO["basic"].build(), torch.zeros(1, 3, 32, 32))
    assert graph.groups[0].layers == {
        ("conv1", "out"), ("layer1.0.conv1", "in"), ("layer1.0.conv2", "out"), ("layer1.1.conv1", "in"), ("layer1.1.conv2", "out"),
        ("layer2.0.conv1", "in"), ("layer2.0.downsample.0", "in"),
    }  # fmt: skip


def test_one_gate_per_path() -> None:
    # One application per batch normalisation: 20 in a ResNet-18 with 12 groups, where one per reader and writer would be 40.
    graph = gator.trace(models.resnet18(), torch.zeros(1, 3, 64, 64))
    assert len(graph.sites) == 20
    assert all("bn" in site.module or "downsample.1" in site.module for site in graph.sites)


def test_trace_leaves_the_model_as_it_was() -> None:
    model = ZOO["chain"].build().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gator.trace(model, torch.zeros(2, 3, 8, 8))
    assert [module.training for module in model] == [index != 1 for index in range(9)]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_fingerprint_is_of_the_structure_not_the_weights() -> None:
    build = ZOO["basic"].build
    one, two = (gator.trace(build(), torch.zeros(1, 3, 32, 32)) for _ in range(2))
    other = gator.trace(ZOO["bottleneck"].build(), torch.zeros(1, 3, 32, 32))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_wrong_input_shape_is_one_clear_error() -> None:
    with pytest.raises(gator.TraceError, match=r"cannot trace Sequential with inputs of shape \(2, 5, 8, 8\)"):
        gator.trace(ZOO["chain"].build(), torch.zeros(2, 5, 8, 8))


def test_branching_on_values_is_one_clear_error() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(gator.TraceError, match="must not branch on values"):
        gator.trace(Branching(), torch.zeros(1, 3))


def test_a_channel_shuffle_is_followed() -> None:
    graph = gator.trace(Shuffled(), torch.zeros(1, 3, 4, 4))
    places = {dim.tensor: dim.index.flatten().tolist() for dim in graph.by_name["stem"].dims if dim.dim == 0}
    assert places["stem.weight"] == [0, 1, 2, 3, 4, 5]
    assert places["depth.weight"] == [0, 2, 4, 1, 3, 5]  # channel 1 comes out third, channel 3 second


def test_parts_of_a_tensor_are_groups_of_their_own() -> None:
    graph = gator.trace(Parts(), torch.zeros(1, 3, 4, 4))
    assert [(group.name, group.num_channels) for group in graph.groups] == [("stem", 3), ("stem#2", 2)]
    assert [group.dims[0].index.flatten().tolist() for group in graph.groups] == [[0, 1, 2], [3, 4]]


def test_connected_components_of_a_long_chain() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert connected_components(1001, order[:-1], order[1:]).tolist() == [0] * 1000 + [1000]


@pytest.mark.parametrize(
    ("include", "exclude", "groups"),
    [
        ("layer2", (), {"layer2.0.conv1", "layer2.0.conv2"}),
        (["layer2.0.conv1"], (), {"layer2.0.conv1"}),
        (["layer*.conv1"], (), {f"layer{s}.{b}.conv1" for s, b in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0))}),
        (None, "layer*.conv1", {"conv1", *(f"layer{stage}.0.conv2" for stage in (2, 3, 4))}),
        (["layer3", "layer4"], ["layer4.0"], {"layer3.0.conv1", "layer3.0.conv2"}),
        # conv1 writes the highway of layer1 together with layer1.0.conv2 and layer1.1.conv2: all three have to be included
        (["conv1"], (), set()),
        (["conv1", "layer1"], "layer1.*.conv1", {"conv1"}),
    ],
)
def test_only_what_is_included_and_not_excluded_may_be_cut(include, exclude, groups: set[str]) -> None:
    graph = gator.trace(ZOO["basic"].build(), torch.zeros(1, 3, 32, 32), include=include, exclude=exclude)
    assert {group.name for group in graph.groups} == groups
    assert len(graph.locked) == 10 - len(groups)  # 9 groups and the classifier's output
    assert all(" is excluded by " in x.reason or " is not among " in x.reason for x in graph.locked if x.name != "fc")


def test_a_block_with_an_excluded_module_stays() -> None:
    blocks = [
        gator.trace(ZOO["bottleneck"].build(), torch.zeros(1, 3, 32, 32), exclude=exclude).blocks
        for exclude in ((), "layer2.0.conv2")
    ]
    assert {block.name for block in blocks[0]} - {block.name for block in blocks[1]} == {"layer2.0"}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_name_that_matches_nothing_is_refused_with_the_nearest(argument: str) -> None:
    with pytest.raises(gator.TraceError, match=rf"{argument}='layr1' matches no module of ResNet; did you mean layer1"):
        gator.trace(ZOO["basic"].build(), torch.zeros(1, 3, 32, 32), **{argument: ["layr1"]})


class Auxiliary(nn.Module):
    """A second classifier that runs in training mode only, like GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.aux = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6 * 64, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_what_only_trains_is_cut_along() -> None:
    model = Auxiliary()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    assert {group.name: group.num_channels for group in graph.groups} == {"stem": 4}
    assert graph.groups[0].layers == {("stem", "out"), ("head", "in"), ("aux.0", "in")}
    assert {locked.name: locked.reason for locked in graph.locked} == {
        "head": "output of the model",
        "aux.0": "in a layer that runs in training mode only",
        "aux.2": "output of the model",
    }
    assert gator.MacsCost(graph).full == 64 * (3 * 4 + 4 * 2)  # of the forward pass in eval mode
    small = gator.prune(model, graph, gator.Architecture.from_keep(graph, {"stem": [1, 3]})).train()
    assert [tuple(out.shape) for out in small(torch.zeros(2, 3, 8, 8))] == [(2, 2, 8, 8), (2, 2)]


def test_what_only_trains_and_cannot_be_traced_is_refused() -> None:
    # the auxiliary linear layer is made for 8 x 8 positions; eval mode accepts any size
    with pytest.raises(gator.TraceError, match=r"aux\.0, aux\.2 did not run in eval mode, and training mode.* fails"):
        gator.trace(Auxiliary(), torch.zeros(1, 3, 4, 4))


def test_group_norm_without_weights_is_locked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8, affine=False), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))
    graph = gator.trace(model, torch.zeros(2, 3, 4, 4))
    assert [group.name for group in graph.groups] == ["2"]
    assert "has no weights" in graph.locked[0].reason


def test_tracing_leaves_no_hook_behind() -> None:
    gator.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.zeros(2, 3, 4, 4))
    registries = {name: value for name, value in vars(nn.modules.module).items() if name.startswith("_global_forward")}
    assert len(registries) >= 3
    assert not any(registries.values())


class EmptyPart(nn.Module):
    """Joins a part without positions to the value it is of."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem, self.head, self.count = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        result: torch.Tensor = self.head(torch.cat([x[:, :, : self.count], x], 2))
        return result


@pytest.mark.parametrize("count", [0, 1])
def test_a_part_without_positions_is_followed(count: int) -> None:
    graph = gator.trace(EmptyPart(count), torch.zeros(2, 3, 4, 4))
    assert {group.name: group.num_channels for group in graph.groups} == {"stem": 4}


class TwoUnmaskable(nn.Module):
    """Two values that are computed once for all samples, so that no mask of a sample fits them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.tables = nn.ModuleList(nn.Sequential(nn.Linear(2, 6), nn.Sigmoid(), nn.Linear(6, 4)) for _ in range(2))
        self.register_buffer("places", torch.arange(8.0).view(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for table in self.tables:
            x = x * table(self.places).mean(0).view(1, -1, 1, 1)
        result: torch.Tensor = self.head(x)
        return result


def test_what_cannot_be_masked_is_locked_in_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    monkeypatch.setattr("gator.tracing.trace.gather_groups", lambda *args: rounds.append(args) or gather_groups(*args))
    graph = gator.trace(TwoUnmaskable(), torch.zeros(2, 3, 4, 4))
    assert len(rounds) == 2  # what cannot be masked is seen in the first
    assert {locked.name: locked.num_channels for locked in graph.locked if "samples share" in locked.reason} == {
        "tables.0.0": 6,
        "tables.1.0": 6,
    }
