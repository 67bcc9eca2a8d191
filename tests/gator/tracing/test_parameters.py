"""Parameters that are computed with, shared or transposed: each use of one that is cut follows, or its channels stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

import gator
from tests.gator.tracing.test_rules import check


class Around(nn.Module):
    """Two linear layers around a function of one's output and of the network itself."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last layer makes of the function's value."""
        return self.head(self.function(self, self.stem(x)))


class FrozenNet(nn.Module):
    """Frozen batch normalisation: a scale and a shift computed from four buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.Conv2d(8, 2, 1)
        for number, buffer in enumerate(self.norm.buffers()):
            buffer.copy_(torch.rand(8, generator=torch.Generator().manual_seed(number)) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise between two convolutions."""
        return self.two(self.norm(self.one(x)).relu())


class TiedDecoder(nn.Module):
    """A decoder whose weight is a table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.transform = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.decoder = nn.Linear(8, 20)
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return a score of each word at each place."""
        return self.decoder(self.transform(self.body(self.embed(ids)).relu()).relu())


class TiedAutoencoder(nn.Module):
    """A decoder that reads the encoder's weights transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.encode, self.bias = nn.Linear(6, 8), nn.Linear(8, 5), nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode."""
        hidden = self.encode(self.inner(x).relu()).relu()
        return self.head(functional.linear(hidden, self.encode.weight.t(), self.bias).relu())


class TiedTransposed(nn.Module):
    """A transposed convolution that reads a convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3), nn.Conv2d(3, 2, 1)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of the input's size."""
        return self.head(self.up(self.down(x).relu()).relu())


class ReadTwice(nn.Module):
    """Two convolutions with one weight, one of which reads channels that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.head = (
            nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1),
        )  # fmt: skip
        self.three.weight = self.two.weight

    def forward(self, x: Tensor) -> Tensor:
        """Read the input and the first convolution alike."""
        return self.head(self.two(x).relu() + self.three(self.one(x).relu()).relu())


class Standardised(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 in each output channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardise the weight, and convolve."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


def words(*shape: int) -> Tensor:
    """Return numbers of words."""
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))


def images(*shape: int) -> Tensor:
    """Return random values of a shape."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def standardised() -> nn.Module:
    """A standardised convolution of the image, and one of 8 channels, whose mean would change with each that is cut."""
    return nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, int], str]] = {
    "frozen batch normalisation": (FrozenNet, images(2, 3, 8, 8), {"one": 8}, "output of the model"),
    "tied decoder": (TiedDecoder, words(2, 5), {"embed": 8, "body": 16}, "output of the model"),
    "tied autoencoder": (TiedAutoencoder, images(2, 6), {"inner": 8, "encode": 5}, "output of the model"),
    "tied transposed convolution": (TiedTransposed, images(2, 3, 8, 8), {"down": 8}, "also read by aten.conv2d at 'down'"),
    "read twice": (ReadTwice, images(2, 3, 8, 8), {"two": 6}, "two.weight is also read by aten.conv2d at 'two'"),
    "standardised": (standardised, images(2, 3, 8, 8), {"2": 6}, "aten.mean at '2' is computed from all entries of a parameter"),
    "scale of two parameters": (
        lambda: Around(lambda net, y: y * (net.a * net.b.exp()), a=nn.Parameter(torch.rand(8)), b=nn.Parameter(torch.rand(8))),
        images(2, 6), {"stem.0": 8}, "output of the model",
    ),
    "scale over its sum": (
        lambda: Around(lambda net, y: y * (net.a / net.a.sum()), a=nn.Parameter(torch.rand(8))),
        images(2, 6), {}, "aten.sum at '' is computed from all entries of a parameter",
    ),
    "bias of two parameters": (
        lambda: Around(lambda net, y: y + torch.cat([net.a, net.b]), a=nn.Parameter(torch.rand(5)), b=nn.Parameter(torch.rand(3))),
        images(2, 6), {"stem.0": 5, "stem.0#2": 3}, "output of the model",
    ),
    "computed weight": (
        lambda: Around(lambda net, y: functional.linear(y, net.a(net.b).view(8, 8)), a=nn.Linear(4, 64), b=nn.Parameter(torch.rand(4))),
        images(2, 6), {}, "is computed, not a parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "x", "groups", "reason"), CASES.values(), ids=CASES.keys())
def test_each_use_of_a_parameter_follows(
    build: Callable[[], nn.Module], x: Tensor, groups: dict[str, int], reason: str
) -> None:
    model = build().double()
    graph = gator.trace(model, x)
    assert any(reason in locked.reason for locked in graph.locked), [str(locked) for locked in graph.locked]
    if groups:
        graph = check(model, x)
    assert {group.name: group.num_channels for group in graph.groups} == groups


class Projects(nn.Module):
    """Multiplies tokens by a matrix of its own, as CLIP does, between two linear layers."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.stem, self.weight, self.product = nn.Linear(6, 8), nn.Parameter(torch.rand(shape)), product
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each token."""
        return self.head(self.product(self.stem(x).relu(), self.weight))


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Return what makes a convolution of 8 channels, and one of 5 of them whose weight is computed."""
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 1), norm(nn.Conv2d(8, 5, 3)), nn.ReLU(), nn.Conv2d(5, 2, 1))


MATRICES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "product": (lambda: Projects(torch.matmul, 8, 5), (2, 4, 6), {"stem": 8, "weight": 5}),
    "product with the transpose": (lambda: Projects(lambda y, w: y @ w.T, 5, 8), (2, 4, 6), {"stem": 8, "weight": 5}),
    "einsum": (lambda: Projects(lambda y, w: torch.einsum("bnc,cd->bnd", y, w), 8, 5), (2, 4, 6), {"stem": 8, "weight": 5}),
    "product of the transposes": (lambda: Projects(lambda y, w: (w @ y.mT).mT, 5, 8), (2, 4, 6), {"stem": 8, "weight": 5}),
    "weight_norm": (
        normed(nn.utils.parametrizations.weight_norm), (2, 3, 8, 8), {"1.parametrizations.weight": 5},
    ),
    "weight_norm by hooks": (normed(nn.utils.weight_norm), (2, 3, 8, 8), {"1": 5}),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "groups"), MATRICES.values(), ids=MATRICES.keys())
def test_a_matrix_outside_layers_is_cut(
    build: Callable[[], nn.Module], shape: tuple[int, ...], groups: dict[str, int]
) -> None:
    model, x = build(), torch.randn(shape)
    graph = gator.trace(model, x)
    assert {group.name: group.num_channels for group in graph.groups} == groups
    assert not graph.uncounted
    gator.verify(model, graph, x)
