"""gator.verify(): exact networks pass, and each kind of mistake is found and named."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

import gator
from gator.checking import verify as verifying
from gator.checking.oracle import silenced
from tests.gator.zoo import ZOO, randomised

IMAGES = torch.zeros(1, 3, 8, 8)


class Branch(nn.Module):
    """A chain, a removable branch and a layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.one, self.two = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.norm(self.stem(x)).relu()
        x = x + self.two(self.one(x).relu())
        return self.head(self.last(x.mean((2, 3))))


def small() -> tuple[nn.Module, gator.ChannelGraph]:
    torch.manual_seed(0)
    net = Branch()
    return net, gator.trace(net, IMAGES)


@pytest.mark.parametrize("name", ["vgg", "dense", "squeeze", "tied", "whole groups", "convnext"])
def test_exact_networks_pass_and_do_not_change(name: str) -> None:
    torch.manual_seed(0)
    case = ZOO[name]
    net = case.build().train()
    before = copy.deepcopy(net.state_dict())
    gator.verify(net, case.graph, torch.zeros(case.input_shape))
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert net.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in net.parameters())


class Reads(nn.Module):
    """A convolution whose value one head reads as `read` makes it, and another one as it is."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.other, self.read = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1), read

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what both heads make of it."""
        x = self.conv(x).relu() + 0.1
        return self.head(self.read(x)), self.other(x)


FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "divides by a value that is masked": lambda x: x.reciprocal(),
    "maximum over a padding of -inf": lambda x: max_pool2d(pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 1),
}


@pytest.mark.parametrize("name", FINITE)
def test_closed_channels_give_no_nan(name: str) -> None:
    net = Reads(FINITE[name])
    graph = gator.trace(net, IMAGES)
    assert [group.num_channels for group in graph.groups] == [6]
    gator.verify(net, graph, IMAGES)


def test_trace_verifies_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = small()
    assert len(gator.trace(net, IMAGES, verify=True).groups) == 2
    monkeypatch.setattr(verifying, "prune", wrong_prune)
    gator.trace(net, IMAGES)
    with pytest.raises(gator.VerificationError):
        gator.trace(net, IMAGES, verify=True)


def test_the_random_numbers_of_the_caller_stay() -> None:
    net, graph = small()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    gator.verify(net, graph, IMAGES)
    assert torch.equal(torch.rand(4), expected)


# --- the oracle -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [{"one": [1, 4]}, {"one": []}, {"stem": [0, 2, 5]}, {"stem": [3]}], ids=str)
def test_the_oracle_is_the_pruned_network_without_its_code(keep: dict[str, list[int]]) -> None:
    net = randomised(Branch())
    graph = gator.trace(net, IMAGES.double())
    architecture = gator.Architecture.from_keep(graph, keep)
    oracle = silenced(net, graph, architecture)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert oracle is not None
    with torch.no_grad():
        torch.testing.assert_close(oracle(x), gator.prune(net, graph, architecture)(x), rtol=1e-10, atol=1e-12)


def test_there_is_no_oracle_where_averaged_channels_cannot_be_copied_evenly() -> None:
    net, graph = small()
    assert (
        silenced(net, graph, gator.Architecture.from_keep(graph, {"stem": [0, 1, 2, 3]})) is None
    )  # 6 are no multiple of 4


class Half(nn.Module):
    """Averages over the second half of a group's channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale one half by a function of its mean."""
        one, two = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([two * self.gate(two.mean(1, keepdim=True)).sigmoid(), one], 1))


class HalfNormalised(nn.Module):
    """Normalises the second half of a group's channels only, without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        one, two = self.stem(x.mean((2, 3))).chunk(2, 1)
        return self.head(torch.cat([nn.functional.layer_norm(two, (3,)), one], 1))


@pytest.mark.parametrize("keep", [[3], [1, 4], [0, 2, 3, 4, 5]], ids=["none of a half", "one of each", "all of a half"])
def test_the_oracle_copies_what_is_averaged_and_zeroes_the_rest(keep: list[int]) -> None:
    net = randomised(HalfNormalised())
    graph = gator.trace(net, IMAGES.double())
    architecture = gator.Architecture.from_keep(graph, {"stem": keep})
    oracle = silenced(net, graph, architecture)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert oracle is not None
    with torch.no_grad():
        torch.testing.assert_close(oracle(x), gator.prune(net, graph, architecture)(x), rtol=1e-9, atol=1e-9)


class WithImage(nn.Module):
    """Averages over a group's channels and those of the input, which are in no group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(11), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = x.mean((2, 3))
        return self.head(self.norm(torch.cat([self.stem(x), x], 1)))


class Unit(nn.Module):
    """Divides by the norm of all channels, then averages over them: no copy of a channel leaves both as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = nn.functional.normalize(self.stem(x.mean((2, 3))), dim=-1)
        return self.head(x + self.norm(x))


@pytest.mark.parametrize("build", [Half, WithImage, Unit])
def test_a_network_that_the_oracle_cannot_copy_raises_no_false_alarm(build: type[nn.Module]) -> None:
    for seed in range(3):
        net = randomised(build())
        graph = gator.trace(net, IMAGES.double())
        assert graph.groups, "nothing would be verified"
        gator.verify(net, graph, IMAGES, seed=seed)


# --- each kind of mistake ---------------------------------------------------------------------------------------------------


def wrong_prune(model: nn.Module, graph: gator.ChannelGraph, architecture: gator.Architecture) -> nn.Module:
    """Forget the bias of the layer that reads one group, if that is cut."""
    pruned = gator.prune(model, graph, architecture)
    if 0 < architecture.widths["one"] < 8:
        pruned.get_submodule("two").bias.data.zero_()
    return pruned


def test_a_wrong_cut_names_the_group_and_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    net, graph = small()
    monkeypatch.setattr(verifying, "prune", wrong_prune)
    with pytest.raises(
        gator.VerificationError, match=r"group 'one' are removed.* differ by .*first after module 'two'"
    ) as error:
        gator.verify(net, graph, IMAGES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [8, 128], ids=["one sample is tried first", "small images are tried first"])
def test_a_block_that_is_removed_wrongly_is_found_by_every_seed(
    monkeypatch: pytest.MonkeyPatch, size: int, seed: int
) -> None:
    def wrong(model: nn.Module, graph: gator.ChannelGraph, architecture: gator.Architecture) -> nn.Module:
        """Prune, and lose what is behind a removed block."""
        pruned = gator.prune(model, graph, architecture)
        if not architecture.widths["one"]:
            pruned.get_submodule("head").bias.data.add_(1)
        return pruned

    net = Branch()
    net.norm = nn.Identity()  # type: ignore[assignment]
    images = torch.zeros(1, 3, size, size)
    graph = gator.trace(net, images)
    monkeypatch.setattr(verifying, "prune", wrong)
    with pytest.raises(gator.VerificationError, match="group 'one' are removed"):
        gator.verify(net, graph, images, seed)


def test_what_pruned_and_gated_do_wrong_alike_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run a network whose head is not the model's; the oracle is made of the model."""
    net, graph = small()
    monkeypatch.setattr(verifying, "silenced", lambda model, graph, architecture: scaled(model))
    with pytest.raises(
        gator.VerificationError, match="the pruned network and the unpruned one without the closed channels"
    ):
        gator.verify(net, graph, IMAGES)


def scaled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.get_submodule("head").weight.data.mul_(2)
    return model


def without(**changes: Callable[[gator.ChannelGraph], Any]) -> gator.ChannelGraph:
    _, graph = small()
    return replace(graph, **{name: change(graph) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (without(sites=lambda graph: ()), "the pruned and the gated network differ"),
        (
            without(layers=lambda graph: graph.layers[1:]),
            "runs .* MACs, MacsCost and AttentionCost say .*misses a product",
        ),
    ],
    ids=["no gates", "a layer is not counted"],
)
def test_a_wrong_graph_is_found(graph: gator.ChannelGraph, message: str) -> None:
    with pytest.raises(gator.VerificationError, match=message):
        gator.verify(small()[0], graph, IMAGES)


class Mixes(nn.Module):
    """Adds the mean over the batch of a value to each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.stem(x)
        return self.head(x + x.roll(1, 0))


def test_a_sample_that_depends_on_another_ones_mask_is_found() -> None:
    net = Mixes()
    graph = gator.trace(Plain(), IMAGES)  # the trace of this network itself would lock its channels
    with pytest.raises(gator.VerificationError, match="the output of a sample changes with the mask of another sample"):
        gator.verify(net, graph, IMAGES)


class Plain(Mixes):
    """The same without mixing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.stem(x))


class Rooted(Mixes):
    """Finite gradients as long as no channel is closed: the root of a mask's zero has none."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.stem(x).abs().sqrt())


def test_a_gradient_that_masks_make_infinite_is_found() -> None:
    with pytest.raises(gator.VerificationError, match=r"gradient of .* is not finite under random masks"):
        gator.verify(Rooted(), gator.trace(Plain(), IMAGES), IMAGES)


class Trains(Mixes):
    """Another forward pass in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.stem(x)) * (2.0 if self.training else 1.0)


def test_a_training_mode_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_eval_mode(model: nn.Module, graph: gator.ChannelGraph, architecture: gator.Architecture) -> nn.Module:
        """Return a pruned network without a training mode."""
        return Fixed(gator.prune(model, graph, architecture))

    monkeypatch.setattr(verifying, "prune", in_eval_mode)
    with pytest.raises(gator.VerificationError, match="in training mode the pruned and the gated network differ"):
        gator.verify(Trains(), gator.trace(Plain(), IMAGES), IMAGES)


class Fixed(nn.Module):
    """Always in eval mode."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return what eval mode returns."""
        return self.body.eval()(x)


def test_inputs_that_the_network_does_not_take_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        gator.VerificationError, match=r"itself does not run on the example inputs, \(1, 1, 8, 8\) float32: Runtime"
    ):
        gator.verify(model, graph, torch.zeros(1, 1, 8, 8))


def test_a_pruned_network_that_fails_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "prune", lambda model, graph, architecture: nn.Linear(1, 1).double())
    with pytest.raises(
        gator.VerificationError, match="Branch: the check of its pruning ended in RuntimeError"
    ) as error:
        gator.verify(*small(), IMAGES)
    assert "\n" not in str(error.value)


def test_a_network_without_finite_outputs_is_refused() -> None:
    class Logs(Mixes):
        """Takes the logarithm of its input."""

        def forward(self, x: Tensor) -> Tensor:
            """Return the map."""
            return self.head(self.stem(x.log()))

    with pytest.raises(gator.VerificationError, match=r"not finite.*give example inputs as in training"):
        gator.verify(Logs(), gator.trace(Plain(), IMAGES), IMAGES)


def test_a_network_without_groups_has_nothing_to_verify() -> None:
    net = nn.Conv2d(3, 4, 1)
    graph = gator.trace(net, IMAGES)
    assert not graph.groups
    gator.verify(net, graph, IMAGES)


def test_weights_that_a_module_keeps_computed_can_be_copied() -> None:
    """torch.nn.utils.weight_norm leaves a weight with a history after each forward pass; deepcopy refuses such tensors."""
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 6, 1)), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1))
    net(IMAGES)
    graph = gator.trace(net, IMAGES)
    small = gator.prune(net, graph, gator.Architecture.from_keep(graph, {"1": [0, 1]}))
    assert small(IMAGES).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("seed", [22, 24, 45])
def test_a_dropout_over_few_values_raises_no_false_alarm(seed: int) -> None:
    """Two draws of it agree by chance, where most of the values are zero already."""
    torch.manual_seed(seed)
    head = (nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 5))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), *head)
    gator.verify(net, gator.trace(net, IMAGES), IMAGES, seed=seed)


class Divides(nn.Module):
    """Divides by what is zero when all channels of a group are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 6, 1, bias=False), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.two(self.one(x)).reciprocal().tanh())


def test_a_network_that_cannot_be_trained_with_a_closed_group_is_told_so() -> None:
    torch.manual_seed(0)
    net = Divides()
    with pytest.raises(gator.VerificationError, match=r"close all channels of a group.*gates cannot be trained"):
        gator.verify(net, gator.trace(net, IMAGES), IMAGES, seed=1)


class InFloat32(nn.Module):
    """Normalises in float32 whatever its type, as language models do."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised channels."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def test_what_a_network_rounds_itself_is_no_difference() -> None:
    for dtype in (torch.float32, torch.float64):
        net, images = nn.Sequential(nn.Conv2d(3, 64, 1), InFloat32(), nn.Conv2d(64, 2, 1)).to(dtype), IMAGES.to(dtype)
        graph = gator.trace(net, images)
        assert graph.num_channels == 64
        gator.verify(net, graph, images)


class Tied(nn.Module):
    """Reads out with the weight that it embeds with, after a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each token."""
        return nn.functional.linear(self.norm(self.embed(x)), self.embed.weight)


class Ends(nn.Module):
    """A branch that ends in an op which is not zero where its inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.branch = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.stem(x)
        return self.head(x + self.branch(x))


class Chooses(nn.Module):
    """Hides in torch.where() what a layer with a computed weight returns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.utils.weight_norm(nn.Conv2d(6, 6, 1))
        self.last, self.head = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.stem(x)
        y = self.last(self.conv(x))
        return self.head(torch.where(y > 0, y, x))


@pytest.mark.parametrize("build", [Tied, Ends, Chooses], ids=["tied weights", "an end that is not zero", "weight_norm"])
def test_the_oracle_raises_no_false_alarm(build: type[nn.Module]) -> None:
    net = build()
    inputs = torch.arange(8).view(2, 4) if build is Tied else IMAGES
    graph = gator.trace(net, inputs)
    assert graph.groups
    for seed in range(4):
        gator.verify(net, graph, inputs, seed=seed)


class Positions(nn.Module):
    """Makes its positions in the type of its input, which the graph of a trace in float32 states as float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.places, self.head = nn.Conv2d(3, 8, 1), nn.Linear(1, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.stem(x)
        places = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / x.shape[1]
        return self.head(x * self.places(places).T[None, :, :, None])


def test_a_network_that_makes_tensors_of_its_type_is_compared_in_it() -> None:
    for dtype in (torch.float32, torch.float64):
        net, images = Positions().to(dtype), IMAGES.to(dtype)
        graph = gator.trace(net, images)
        assert graph.num_channels == 8
        gator.verify(net, graph, images)


class QueryNorm(nn.Module):
    """Normalises queries and keys over the channels that their product sums."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.one, self.two, self.out = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each token."""
        q, k = self.one(self.q(x)), self.two(self.k(x))
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ self.v(x))


def test_the_oracle_copies_no_channels_that_a_product_sums() -> None:
    net, tokens = QueryNorm(), torch.zeros(1, 5, 6)
    graph = gator.trace(net, tokens)
    assert graph.groups
    for seed in range(4):
        gator.verify(net, graph, tokens, seed=seed)
