"""Modules that are shared, hooked, or have a forward of their own keep what they do when they are gated and cut."""

import copy
import functools
import io
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import gator
from tests.gator.law import assert_law, close, random_keep
from tests.gator.zoo import randomised

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def law(net: nn.Module, groups: dict[str, int], inputs: Tensor = IMAGES) -> nn.Module:
    """Assert the groups of a network, and the law for a random cut of them; return the pruned network."""
    net = randomised(net)
    graph = gator.trace(net, inputs)
    assert {group.name: group.num_channels for group in graph.groups} == groups
    return assert_law(net, graph, inputs, random_keep(graph, 0))[0]


def body(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act)


# --- one module in several places -------------------------------------------------------------------------------------


def shared_activation(act: nn.Module) -> nn.Module:
    second = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), act)
    return nn.Sequential(body(act), second, nn.Conv2d(6, 4, 1), act, act)


class Levels(nn.Module):
    """Two branches hold one head, under names of their own, and one pooling that follows a shift of each."""

    def __init__(self) -> None:
        super().__init__()
        shared, pool = nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)
        self.one = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), shift=Shift(pool), head=shared))
        self.two = nn.Sequential(OrderedDict(begin=nn.Conv2d(3, 4, 3, padding=1), shift=Shift(pool), final=shared))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x) + self.two(x).relu())


class Shift(nn.Module):
    """Closed channels are not zero any more inside; what it returns comes out of a module that others share."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x + 1)


@pytest.mark.parametrize(
    ("net", "groups"),
    [
        (lambda: shared_activation(nn.SiLU()), {"0.0": 8, "1.0": 6}),
        (lambda: shared_activation(nn.Sigmoid()), {"0.0": 8, "1.0": 6}),
        (lambda: shared_activation(nn.Sequential(nn.Dropout(0.1), nn.Sigmoid())), {"0.0": 8, "1.0": 6}),
        (Levels, {"one.stem": 4, "one.head": 4}),
    ],
    ids=["keeps zeros", "breaks zeros", "a container", "weights"],
)
def test_a_module_in_several_places(net: Callable[[], nn.Module], groups: dict[str, int]) -> None:
    law(net(), groups)


# --- forwards of the instance -----------------------------------------------------------------------------------------


class Mix(nn.Module):
    """Ends in a normalisation, so that its output is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x).relu()))

    def other(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x).sigmoid())) + 1

    def flat(self, x: Tensor) -> Tensor:
        return self.norm(self.two(self.one(x).view(-1, 8, 6, 6)))


def _wrapped(module: Mix) -> Any:
    module.before = module.forward  # type: ignore[assignment]

    def call(module: Mix, x: Tensor) -> Tensor:
        return module.before(x) * 2  # type: ignore[operator]

    return functools.update_wrapper(functools.partial(call, module), module.before)


def _weakly(module: Mix) -> Any:
    return functools.partial(lambda reference, x: reference().other(x), weakref.ref(module))


@pytest.mark.parametrize(
    "forward",
    [
        lambda module: module.other,
        lambda module: module.flat,
        _wrapped,
        _weakly,
        lambda module: lambda x: module.other(x.abs()),
    ],
    ids=["method", "states sizes", "partial", "weak reference", "closure"],
)
def test_a_forward_of_the_instance(forward: Callable[[Mix], Any]) -> None:
    mix = Mix()
    mix.forward = forward(mix)  # type: ignore[method-assign]
    net = randomised(nn.Sequential(mix, nn.Conv2d(6, 4, 1)))
    graph = gator.trace(net, IMAGES)
    assert [group.name for group in graph.groups] == ["0.one", "0.two"]
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, 0))
    gated, pruned = gator.GatedModel(net, graph).eval(), gator.prune(net, graph, architecture)
    gated.load_architecture(architecture)
    with torch.no_grad():
        assert close(gated(IMAGES), pruned(IMAGES))
        before = pruned(IMAGES)
        for parameter in net.parameters():
            parameter.zero_()
        assert torch.equal(pruned(IMAGES), before)  # nothing of the original is left in it


@pytest.mark.parametrize(
    ("trace", "groups"),
    [
        (torch.fx.symbolic_trace, {"0.one": 8, "0.two": 6}),
        (lambda net: nn.Sequential(torch.fx.symbolic_trace(net)), {"0.0.one": 8, "0.0.two": 6}),
        (lambda net: create_feature_extractor(net, ["1"]), {"0.one": 8, "0.two": 6}),
    ],
    ids=["whole", "inside", "feature extractor"],
)
def test_a_network_that_is_a_graph(trace: Callable[[nn.Module], nn.Module], groups: dict[str, int]) -> None:
    net = trace(nn.Sequential(Mix(), nn.Conv2d(6, 4, 1)))
    pruned = law(net, groups)
    assert pruned.train().training
    assert type(pruned.eval()(IMAGES)) is type(net(IMAGES))


# --- attributes, classes, hooks ---------------------------------------------------------------------------------------


class Flat(nn.Module):
    """States a size, so that its forward is written again when it is cut."""

    scale = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.size = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 6), (6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().view(-1, 8 * 36))


class Asks(nn.Module):
    """Reads what belongs to its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = Flat(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.child, Flat)
        return self.head(self.child(x) * self.child.scale / self.child.size[0])


def test_a_forward_that_is_written_again_keeps_class_and_attributes() -> None:
    pruned = law(Asks(), {"child.conv": 8, "child.fc": 6})
    assert type(pruned.child) is not Flat
    stored = io.BytesIO()
    torch.save(pruned, stored)
    stored.seek(0)
    for other in (copy.deepcopy(pruned), torch.load(stored, weights_only=False)):
        assert torch.equal(other(IMAGES), pruned(IMAGES))


def encoder(**kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **kwargs)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 4))


@pytest.mark.parametrize("which", ["self_attn", "linear1", ""], ids=["heads", "hidden", "all"])
def test_a_fused_kernel_does_not_pass_by_gates_and_cuts(which: str) -> None:
    net, tokens = randomised(encoder()), torch.randn(2, 5, 6, dtype=torch.float64)
    graph = gator.trace(net, tokens)
    keep = random_keep(graph, 0)
    chosen = {
        name: kept if which in name else list(range(graph.by_name[name].num_channels)) for name, kept in keep.items()
    }
    assert any(which in name for name in keep)
    assert_law(net, graph, tokens, chosen)


@pytest.mark.parametrize(
    "hook",
    [
        lambda net: net.register_forward_hook(lambda module, args, output: output * 3),
        lambda net: net.register_forward_hook(lambda module, args, output: output + 3),
        lambda net: net.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        lambda net: net.register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0].abs(),), kwargs), with_kwargs=True
        ),
        lambda net: net.conv.register_forward_hook(lambda module, args, output: output + 3),
    ],
    ids=["scales", "shifts", "before", "with names", "inside"],
)
def test_hooks_are_kept(hook: Callable[[nn.Module], object]) -> None:
    flat = Flat()
    hook(flat)
    law(nn.Sequential(flat, nn.Linear(6, 4)), {"0.conv": 8, "0.fc": 6})


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    ],
    ids=["weight", "spectral", "old weight"],
)
def test_a_layer_whose_weight_is_computed_keeps_its_law(norm: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm(nn.Conv2d(8, 6, 3)), Flatter())
    graph = gator.trace(randomised(net), IMAGES)
    net(IMAGES)  # with gradients, so that a weight may be no leaf
    keep = random_keep(graph, 0)
    architecture = gator.Architecture.from_keep(graph, keep)
    gated = gator.GatedModel(net, graph).eval()
    gated.load_architecture(architecture)
    assert close(gated(IMAGES), gator.prune(net, graph, architecture)(IMAGES))


class Flatter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(-1, 4 * 4))


# --- regions ----------------------------------------------------------------------------------------------------------


class Region(nn.Module):
    """Runs its stem in a region; the view makes cut networks write its forward again."""

    def __init__(self, region: Callable[[], Any]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.Conv2d(8, 6, 3))
        self.region, self.head = region, nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            y = self.stem(x).relu()
        return self.head(y.view(-1, 6 * 16))


def test_layers_in_an_autocast_region_are_cut() -> None:
    law(Region(lambda: torch.autocast("cpu", enabled=False)), {"stem.0": 8, "stem.2": 6})


def test_a_region_without_gradients_stays_one() -> None:
    net = randomised(Region(torch.no_grad))
    graph = gator.trace(net, IMAGES)
    pruned = gator.prune(net, graph, gator.Architecture.from_keep(graph, random_keep(graph, 0))).train()
    pruned(IMAGES).sum().backward()
    assert torch.is_grad_enabled()
    assert {name for name, p in pruned.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    with torch.no_grad():
        pruned(IMAGES)
        assert not torch.is_grad_enabled()


def test_an_autocast_region_stays_one() -> None:
    class Half(Region):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.stem(x)
            assert y.dtype == torch.bfloat16
            return self.head(y.float().view(-1, 6 * 16))

    net, images = Half(torch.no_grad).eval(), IMAGES.float()
    graph = gator.trace(net, images)
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, 0))
    gated = gator.GatedModel(net, graph).eval()
    gated.load_architecture(architecture)
    pruned = gator.prune(net, graph, architecture)
    assert torch.allclose(gated(images), pruned(images), atol=2e-2)
    assert not torch.is_autocast_enabled("cpu")


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.conv(x), lambda x: self.conv(-x), (x,))


def test_branches_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(
        gator.TraceError, match=r"cannot trace Chooses .*return torch.cond\(.*must not branch on values"
    ):
        gator.trace(Chooses(), torch.zeros(1, 3, 8, 8))


class Remembers(nn.Module):
    """Stores what it computes from the size of its input, for the next call with that size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.shape: tuple[int, ...] | None = None
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        if self.shape != y.shape[2:]:
            self.shape, self.ramp = y.shape[2:], torch.linspace(0, 1, y.shape[3], dtype=y.dtype)
        self.cache.setdefault(0, self.head.weight * 2)
        return self.head(y * self.ramp) * self.cache[0].shape[0]


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_what_a_forward_stores_while_it_is_traced_is_forgotten() -> None:
    net = Remembers()
    law(net, {"conv": 8})
    gator.trace(Remembers().train(), IMAGES.float())
    again = Remembers().double()
    gator.trace(again, IMAGES)
    assert again.shape is None
    assert again.cache == {}
    assert not hasattr(again, "ramp")


# --- what a module returns --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Result:
    first: Tensor
    second: Tensor


class Returns(nn.Module):
    """Returns what its forward makes in a class of its own, and is written again."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.fc, self.make = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 6), make

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).relu()
        return self.make(first=self.fc(y.view(-1, 8 * 36)), second=y)


class Takes(nn.Module):
    def __init__(self, make: Callable[..., Any], get: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.inner, self.get, self.head, self.last = Returns(make), get, nn.Linear(6, 4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.get(self.inner(x))
        return self.head(first), self.last(second)


@pytest.mark.parametrize(
    ("make", "get"),
    [
        (Pair, lambda out: (out[0], out.second)),
        (Result, lambda out: (out.first, out.second)),
        (OrderedDict, lambda out: tuple(out.values())),
        (dict, lambda out: (out["first"], out["second"])),
    ],
    ids=["named tuple", "dataclass", "ordered", "dictionary"],
)
def test_what_a_module_returns_keeps_its_class(make: type, get: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
    pruned = law(Takes(make, get), {"inner.conv": 8, "inner.fc": 6})
    assert type(pruned.inner(IMAGES)) is make


# --- code that depends on the mode ------------------------------------------------------------------------------------


class Mode(nn.Module):
    """States a size, so that its forward is written again, in which `code` reads the mode."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.drop, self.code = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4), nn.Dropout(0.5), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.fc(self.conv(x).relu().view(-1, 8 * 36)))


@pytest.mark.parametrize(
    "code",
    [
        lambda net, x: x if net.training else x.softmax(1),
        lambda net, x: x + torch.randn_like(x) * 0.1 if net.training else x,
        lambda net, x: x * torch.rand(len(x), 1, dtype=x.dtype) if net.training else x,
        lambda net, x: net.drop(x) if net.training else x * 2,
    ],
    ids=["softmax in eval", "noise", "depth by hand", "a module"],
)
def test_both_modes_are_written_again(code: Callable[..., Tensor]) -> None:
    net = Mode(code)
    pruned = law(net, {"conv": 8})
    pruned.code = None  # a function without a name cannot be stored
    stored = io.BytesIO()
    torch.save(pruned, stored)
    stored.seek(0)
    for other in (pruned, copy.deepcopy(pruned), torch.load(stored, weights_only=False)):
        for mode in (True, False):
            other.train(mode)
            torch.manual_seed(0)
            found = other(IMAGES)
            torch.manual_seed(0)
            assert torch.allclose(found, code(other, other.fc(other.conv(IMAGES).relu().flatten(1))), rtol=1e-12)
    gated = gator.GatedModel(net, gator.trace(net, IMAGES))
    gated.train()(IMAGES).square().sum().backward()
    assert gated.gates.logits_C.grad is not None
    assert bool(gated.gates.logits_C.grad.ne(0).any())


def test_a_module_whose_train_returns_nothing_is_traced_in_both_modes() -> None:
    class Silent(Mode):
        """Forgets to return itself, as attention of timm's EfficientViT does."""

        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    net = Silent(lambda net, x: x if net.training else x.softmax(1)).double()
    net.train(False)
    assert [(group.name, group.num_channels) for group in gator.trace(net, IMAGES).groups] == [("conv", 8)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (lambda net, x: nn.functional.dropout(x, 0.5, training=not net.training), None),
        (lambda net, x: x.view(-1, 2, 2).flatten(1) if net.training else x, "in training mode alone states a size"),
        (lambda net, x: x[: int(x.sum())] if net.training else x, "training mode cannot be traced"),
    ],
    ids=["dropout in eval", "a size", "values"],
)
def test_a_mode_that_cannot_be_written_again_keeps_its_channels(
    code: Callable[..., Tensor], reason: str | None
) -> None:
    graph = gator.trace(Mode(code), IMAGES.float())
    assert [group.name for group in graph.groups] == ([] if reason else ["conv"])
    assert reason is None or any(
        f"it depends on the mode: what it does {reason}" in x.reason or reason in x.reason for x in graph.locked
    )


@pytest.mark.parametrize(
    ("code", "share"),
    [
        (lambda net, x: nn.functional.dropout(x, 0.5, training=net.training), 0.5),
        (lambda net, x: nn.functional.dropout(x, 0.5, training=False), 0.0),
        (lambda net, x: nn.functional.dropout(x, 0.5), 0.5),
    ],
    ids=["in training", "never", "always"],
)
def test_an_op_that_depends_on_the_mode_is_written_again(code: Callable[..., Tensor], share: float) -> None:
    net = Mode(code).double()
    graph = gator.trace(net, IMAGES)
    pruned = gator.prune(net, graph, gator.Architecture.from_keep(graph, {"conv": [1, 2]}))
    images = torch.randn(500, 3, 8, 8, dtype=torch.float64)
    zeros = {mode: float((pruned.train(mode)(images) == 0).double().mean()) for mode in (True, False)}
    assert zeros[True] == pytest.approx(share, abs=0.1)
    assert zeros[False] == pytest.approx(
        float(code(nn.Module().eval(), torch.ones(2000)).eq(0).double().mean()), abs=0.1
    )


class Trains(nn.Module):
    """Returns its input, or what one of its modules makes of it; in training mode something more."""

    def __init__(self, more: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.body, self.more = nn.Sequential(*layers), more

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) if len(self.body) else x
        return self.more(x) if self.training else x


@pytest.mark.parametrize(
    "more",
    [
        lambda x: x + 0.1 * torch.ones_like(x),
        lambda x: x.softmax(2),
        lambda x: torch.nn.functional.hardtanh(x, 0.5, 2.0),
        lambda x: x * torch.full((len(x), 1, 1, 1), 0.5, dtype=x.dtype).div(0.7),
    ],
    ids=["a constant", "softmax over positions", "a clip above 0", "stochastic depth"],
)
@pytest.mark.parametrize("layers", [[], [nn.Conv2d(8, 6, 1), nn.ReLU()]], ids=["its input", "of a module"])
def test_what_training_mode_adds_to_closed_channels_is_masked(
    more: Callable[[Tensor], Tensor], layers: list[nn.Module]
) -> None:
    width = 6 if layers else 8
    net = nn.Sequential(body(nn.ReLU()), Trains(more, *layers), nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = gator.trace(net, IMAGES.float())
    assert [group.num_channels for group in graph.groups] == [8, *([6] if layers else []), 4]
    gator.verify(net, graph, IMAGES.float())


class Lists(nn.Module):
    """Returns its input in a list, and reads the mode."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x] if not self.training else [x * 2]


def test_a_module_that_leaves_nothing_in_the_graph_may_read_the_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lists, self.head = nn.Conv2d(3, 8, 1), Lists(), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lists(self.stem(x))[0])

    net = Net()
    gator.verify(net, gator.trace(net, IMAGES.float()), IMAGES.float())


class Attends(nn.Module):
    """Attention that drops in training, whose kernel then has another layout, so that contiguous() copies in one mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.drop.p if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=p)
        return self.out(y.transpose(1, 2).contiguous().view(-1, 5, 8))


def test_attention_that_drops_in_training_is_cut() -> None:
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pruned = law(
        nn.Sequential(nn.Linear(6, 8), Attends(), nn.Linear(8, 4)), {"0": 8, "1.qkv": 2, "1.out": 8}, tokens
    ).train()
    assert not torch.equal(pruned(tokens), pruned(tokens))


class Reads(nn.Module):
    """Adds to what it gets a branch that begins with an op of the mode."""

    def __init__(self, begin: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.stem, self.inner, self.outer, self.head = (
            body(nn.ReLU()),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 8, 1),
            nn.Conv2d(8, 2, 1),
        )
        self.begin = begin

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(self.begin(x, self.training)) / x.shape[1]))


@pytest.mark.parametrize(
    "begin",
    [
        lambda x, training: nn.functional.dropout(x, 0.2, training),
        lambda x, training: nn.functional.alpha_dropout(x, 0.2, training),
        lambda x, training: nn.functional.feature_alpha_dropout(x, p=0.2, training=training),
    ],
    ids=["dropout", "alpha dropout", "feature alpha dropout"],
)
def test_what_passes_by_a_dropout_is_not_dropped(begin: Callable[[Tensor, bool], Tensor]) -> None:
    net = Reads(begin)
    graph = gator.trace(net, IMAGES.float())
    assert {group.name: group.num_channels for group in graph.groups} == {"stem.0": 8, "inner": 6}
    addition = next(step for step in graph.plans[""].steps if step.name == "add")
    dropout = next(step for step in graph.plans[""].steps if "dropout" in step.name)
    assert not dropout.outputs() & addition.inputs()
    gator.verify(net, graph, IMAGES.float())


def test_what_training_mode_makes_non_zero_before_a_layer_stays() -> None:
    net = Reads(lambda x, training: x + 0.1 * torch.ones_like(x) if training else x)
    graph = gator.trace(net, IMAGES.float())
    assert {group.name: group.num_channels for group in graph.groups} == {"inner": 6}
    assert "stem.0" in {group.name for group in graph.locked if "in training mode alone" in group.reason}
    gator.verify(net, graph, IMAGES.float())


@pytest.mark.parametrize("begin", [nn.Dropout(0.2), Trains(lambda x: x * 2)], ids=["dropout", "a module"])
def test_a_write_over_what_is_shared_in_one_mode_stays(begin: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.begin, self.conv, self.head = (
                nn.Conv2d(3, 8, 1),
                begin,
                nn.Conv2d(8, 8, 1),
                nn.Conv2d(8, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.conv(self.begin(x).relu_()) + x)

    net = Net()
    graph = gator.trace(net, IMAGES.float())
    assert "stem" in {group.name for group in graph.locked if "writes over a part of a value" in group.reason}
    gator.verify(net, graph, IMAGES.float())


class TwoBranches(nn.Module):
    """Two branches in one forward, each begun by an op of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)),
            nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return x + self.two(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def test_branches_of_one_forward_have_names_of_their_own() -> None:
    net = randomised(nn.Sequential(body(nn.ReLU()), TwoBranches(), nn.Conv2d(8, 2, 1)))
    graph = gator.trace(net, IMAGES)
    assert [block.name for block in graph.blocks] == ["1:1.one.0", "1:1.two.0"]
    for gone in ("1.one.0", "1.two.0"):
        keep = {group.name: [] if group.name == gone else list(range(group.num_channels)) for group in graph.groups}
        assert_law(net, graph, IMAGES, keep)


class Borrows(nn.Module):
    """Reads the weight of one of its modules in its own forward, in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.inner, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = nn.functional.conv_transpose2d(self.conv(x).relu(), self.conv.weight)
        return self.head(self.last(self.inner(y)) + x)


def test_a_branch_that_reads_the_weight_of_its_module_can_be_removed() -> None:
    net = randomised(Borrows())
    graph = gator.trace(net, IMAGES)
    keep = {group.name: [] if group.block is not None else list(range(group.num_channels)) for group in graph.groups}
    assert not all(keep.values())
    assert_law(net, graph, IMAGES, keep)
