"""Numbers and decisions that a forward pass computes from sizes: of cut channels they stay, of images they follow the input."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn import functional as F

import gator
from gator.graph.numbers import SizeOf, with_formula
from gator.graph.plans import Ref
from tests.gator.law import close, random_keep
from tests.gator.oracle import assert_exact


class Net(nn.Module):
    """A stem, something in between of which a test tells the code, and a head."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.head, self.between = nn.Conv2d(width, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output."""
        return self.head(self.between(self, self.stem(x).relu()))


class NonLocal(nn.Module):
    """Attention over positions, scaled by the number of features."""

    def __init__(self, scale: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v, self.head = (
            nn.Conv2d(3, 8, 3),
            *(nn.Conv2d(8, n, 1) for n in (6, 6, 8)),
            nn.Linear(8, 4),
        )
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the values by the products of queries and keys."""
        y = self.stem(x).relu()
        q, k, v = self.q(y).flatten(2), self.k(y).flatten(2), self.v(y).flatten(2)
        attention = (q.transpose(1, 2) @ k * self.scale(q)).softmax(-1)
        return self.head((v @ attention.transpose(1, 2)).amax(2))


def branch_on_width(net: Any, x: Tensor) -> Tensor:
    y = net.wide(x)
    return x + y if x.shape == y.shape else y


def branch_on_a_number(net: Any, x: Tensor) -> Tensor:
    return net.wide(x) * (2.0 if x.size(1) >= 8 else 0.5)


def assertion(net: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == net.wide.weight.shape[1] == 8
    return net.wide(x)


def loop_over_positions(net: Any, x: Tensor) -> Tensor:
    return sum(net.wide(x).select(3, number) for number in range(x.shape[3])).unsqueeze(3)


def parts_of_width(net: Any, x: Tensor) -> Tensor:
    parts = net.wide(x).split(x.shape[1] // 2, dim=1)
    return torch.cat([part * len(parts) for part in parts], 1)


def width_of_a_parameter(net: Any, x: Tensor) -> Tensor:
    return net.wide(x) / net.wide.weight.shape[0] ** 0.5


def lost_in_a_library(net: Any, x: Tensor) -> Tensor:
    return net.wide(x) / math.log(x.size(1))


def mean_by_hand(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return (net.wide(x).view(n, c, h * w).sum(2) / (h * w)).view(n, c, 1, 1).expand(n, c, h, w) + x


def share_of_all(net: Any, x: Tensor) -> Tensor:
    return net.wide(x) / x.numel() * x.size(0)


WIDTHS: dict[str, Callable[[], nn.Module]] = {
    "scale by the width": lambda: NonLocal(lambda q: q.shape[1] ** -0.5),
    "scale by a square root": lambda: NonLocal(lambda q: 1 / math.sqrt(q.size(1))),
    "scale by the entries of a sample": lambda: NonLocal(lambda q: (q.numel() / len(q)) ** -0.5),
    "scale by the number of positions": lambda: NonLocal(lambda q: q.size(-1) ** -0.5),
    "branch on equal shapes": lambda: Net(branch_on_width),
    "branch on a width": lambda: Net(branch_on_a_number),
    "assertion": lambda: Net(assertion),
    "parts of half the width": lambda: Net(parts_of_width),
    "width of a parameter": lambda: Net(width_of_a_parameter),
    "logarithm of the width": lambda: Net(lost_in_a_library),
    "mean by hand": lambda: Net(mean_by_hand),
    "number of entries": lambda: Net(share_of_all),
}


@pytest.mark.parametrize("build", WIDTHS.values(), ids=WIDTHS.keys())
def test_numbers_are_those_of_the_unpruned_network_and_of_the_given_image(build: Callable[[], nn.Module]) -> None:
    assert_exact(build, larger=(3, 3, 12, 10))


def test_a_module_that_does_not_use_the_width_it_reads_is_not_written_again() -> None:
    def between(net: Any, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        return F.interpolate(net.wide(x), size=(2 * height, width))

    graph = assert_exact(lambda: Net(between), larger=(2, 3, 9, 7))
    assert not graph.plans


class Halves(nn.Module):
    """Splits channels, so that its forward is written again, and computes with the height and width in several ways."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.after = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(8, 4, 1), after

    def forward(self, x: Tensor) -> Tensor:
        """Multiply one half by the other."""
        one, two = self.conv(x).chunk(2, 1)
        return self.after(x, self.head(one * two.sigmoid()))


def windows(x: Tensor, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    y = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 2, 2)
    y = y - y.mean((2, 3), keepdim=True)
    return y.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


SIZES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "interpolated to the input": lambda x, y: F.interpolate(y, size=x.shape[-2:]),
    "by a factor": lambda x, y: F.interpolate(y, size=(math.ceil(y.size(2) * 1.5), y.size(3) * 2)),
    "windows": windows,
    "positions made": lambda x, y: y * torch.linspace(0, 1, y.shape[3], dtype=y.dtype),
    "cropped": lambda x, y: y[:, :, 1 : y.size(2) - 1, : y.size(3) // 2],
    "pooled over all": lambda x, y: F.avg_pool2d(y, y.shape[2:]),
    "padded": lambda x, y: F.pad(y, (0, y.size(3) // 4, 0, 1)),
    "split in two": lambda x, y: torch.cat(y.split(y.size(3) // 2, 3)[::-1], 3),
    "fractions": lambda x, y: y / (y.shape[2] * y.shape[3]) ** 0.5 + 1 / y.shape[3],
}


@pytest.mark.parametrize("after", SIZES.values(), ids=SIZES.keys())
def test_another_image_size_is_exact(after: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_exact(lambda: Halves(after), larger=(3, 3, 24, 16))


REFUSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "branch": lambda x, y: y * (2 if y.size(2) == 4 else 3),
    "integer part": lambda x, y: F.interpolate(y, size=(int(y.size(2) * 1.5), 6)),
    "loop": lambda x, y: torch.stack([y.select(2, row) for row in range(y.size(2))]),
}


@pytest.mark.parametrize("after", REFUSED.values(), ids=REFUSED.keys())
def test_another_image_size_that_may_run_otherwise_is_refused_when_called(after: Callable) -> None:
    model = Halves(after)
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, random_keep(graph, 0)))
    assert pruned(torch.zeros(5, 3, 8, 8)).shape == model(torch.zeros(5, 3, 8, 8)).shape
    with pytest.raises(gator.PruneError, match=r"regenerated for values of size \(4,.*and got \(6,"):
        pruned(torch.zeros(1, 3, 12, 12))


def test_a_decision_that_comes_out_alike_is_no_reason_to_refuse() -> None:
    assert_exact(lambda: Halves(lambda x, y: y * (2 if y.size(2) % 2 == 0 else 3)), larger=(2, 3, 24, 12))


def test_a_checked_forward_is_compiled_exported_copied_and_traced_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Halves(REFUSED["branch"]), nn.Identity()).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(model, x)
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, random_keep(graph, 0)))
    torch._dynamo.reset()
    exported = torch.export.export(pruned, (x,)).module()
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    for other in (exported, compiled, copy.deepcopy(pruned)):
        assert torch.equal(other(x), pruned(x))
    again = gator.trace(pruned, x)
    smaller = gator.prune(pruned, again, gator.Architecture.from_keep(again, {again.groups[0].name: [0]}))
    with pytest.raises(gator.PruneError, match="regenerated for values of size"):
        smaller(torch.zeros(1, 3, 12, 12, dtype=torch.float64))


class CausalAttention(nn.Module):
    """Attention in a forward of its own, with the arguments and views that people write."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj, self.head = (
            nn.Conv2d(3, 8, 2, 2),
            nn.ModuleList(nn.Linear(8, 6) for _ in range(3)),
            *(nn.Linear(6, 8), nn.Linear(8, 2)),
        )
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output of each position."""
        x = self.stem(x).flatten(2).mT
        n, length, _ = x.shape
        q, k, v = (linear(x).view(n, length, 3, 2).transpose(1, 2) for linear in self.qkv)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.head(x + self.proj(y.permute(0, 2, 1, 3).contiguous().view(n, length, -1)))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.1}], ids=["causal", "scaled"])
def test_attention_keeps_its_arguments(options: dict[str, Any]) -> None:
    model = CausalAttention(**options).double().eval()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    gated = gator.GatedModel(model, graph).eval()
    widths = {group.name: list(range(group.num_channels)) for group in graph.groups}
    architecture = gator.Architecture.from_keep(graph, widths | {"qkv.0": [0, 2]})
    pruned = gator.prune(model, graph, architecture)
    images = torch.randn(3, 3, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        assert close(gated(images), model(images))
        gated.load_architecture(architecture)
        assert close(pruned(images), gated(images))
        model.proj.weight[:, 2:4] = 0
        assert close(pruned(images), model(images))


def test_a_copy_of_a_number_keeps_its_formula_once_the_trace_is_over() -> None:
    node = Graph().placeholder("x")
    traced, planned = (with_formula(6, SizeOf(value, 1, 6)) for value in (node, Ref("x")))
    assert type(copy.deepcopy(traced)) is int  # left in an attribute of the traced network
    assert copy.deepcopy(planned).formula == SizeOf(Ref("x"), 1, 6)
