"""Removable branches, wherever their addition is: the branch that is gone adds nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gator
from gator.gating.loss import lowest_ratio
from tests.gator.law import assert_law, close, random_keep


class InRoot(nn.Module):
    """A branch that ends in a convolution with a bias, added in the network's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (
            *(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)),
            *(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        x = self.stem(x).relu()
        return self.head(self.after(x + self.two(self.one(x).relu())))

    def after(self, x: Tensor) -> Tensor:
        """Return the sum as it is."""
        return x


class Normalised(InRoot):
    """The sum is normalised by views in the same forward, which is written again for that too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def after(self, x: Tensor) -> Tensor:
        """Normalise each position over its channels."""
        n, c, h, w = x.shape
        return self.norm(x.view(n, c, h * w).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)


class Halved(InRoot):
    """The sum is split and multiplied in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 4, 1)

    def after(self, x: Tensor) -> Tensor:
        """Multiply one half by the other."""
        one, two = self.wide(x).chunk(2, 1)
        return one * two.sigmoid()


class InRow(InRoot):
    """Three branches in one forward; the shortcut of the second is gated by a convolution, the third reads a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.ones, self.twos = (
            nn.Conv2d(8, 8, 1),
            nn.ModuleList(nn.Conv2d(8, 5, 1) for _ in range(2)),
            nn.ModuleList(nn.Conv2d(5, 8, 1) for _ in range(2)),
        )

    def after(self, x: Tensor) -> Tensor:
        """Add two more branches."""
        x = x * self.gate(x).sigmoid() + self.twos[0](self.ones[0](x).relu())
        return self.twos[1](self.ones[1](x).relu()) + x


class Inside(InRoot):
    """A branch inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add a branch that holds a branch."""
        x = self.stem(x).relu()
        y = self.one(x).relu()
        return self.head(x + self.two((y + self.inner(y)).relu()))


class Own(nn.Module):
    """The branch is in a module of its own, the addition in the root, between two readers of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Read the sum and the shortcut."""
        x = self.stem(x)
        return self.head(torch.cat([x + self.branch(x), x], 1))


class Twice(InRoot):
    """The shortcut is added twice: x + (x + branch(x))."""

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the stem, and the stem once more."""
        x = self.stem(x).relu()
        return self.head(x + (x + self.two(self.one(x).relu())))


class Drops(nn.Module):
    """Two branches that end in one module, which training mode alone makes anything of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.drop = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), Noise()
        self.one = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.two = nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        x = self.stem(x)
        x = x + self.drop(self.one(x))
        return self.head(x + self.drop(self.two(x)))


class Pair(InRoot):
    """Two branches that are added to each other, as in a cell of NASNet: one of them has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        x = self.stem(x).relu()
        return self.head(self.other(x) + self.two(self.one(x).relu()))


class Scaled(InRoot):
    """The branch is added times a number, which is no factor of the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """Add a fifth of the branch."""
        x = self.stem(x).relu()
        return self.head(torch.add(x, self.two(self.one(x).relu()), alpha=0.2))


class WritesOver(InRoot):
    """Modules that write over their input: one counts on it, the other gets the sum, whose shortcut is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.twofold = Twofold()
        self.rectified, self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of the sum and of the shortcut."""
        x = self.twofold(self.stem(x))
        return self.head(torch.cat([self.rectified(x + self.two(self.one(x).relu())), x], 1))


class Twofold(nn.Module):
    """Twice the rectified input, since the activation writes over it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, less a half."""
        y = self.act(x)
        return y + x - 0.5


class Noise(nn.Module):
    """Adds a constant in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, or a little more."""
        return x + 0.1 if self.training else x


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "in the root": (InRoot, 1),
    "sum normalised": (Normalised, 1),
    "sum split": (Halved, 1),
    "in a row, gated shortcut": (InRow, 3),
    "inside another": (Inside, 1),
    "ends in a sigmoid": (Own, 1),
    "added to a sum": (Twice, 1),
    "end in one module": (Drops, 2),
    "added to another": (Pair, 1),
    "times a number": (Scaled, 1),
    "written over": (WritesOver, 1),
}


@pytest.mark.parametrize(("build", "num_blocks"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_branch_that_is_gone_adds_nothing(build: Callable[[], nn.Module], num_blocks: int) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    assert len(graph.blocks) == num_blocks
    for seed in range(3):
        assert_law(model, graph, inputs, random_keep(graph, seed, empty=1.0 if seed == 0 else 0.5))
    assert "removes a branch of the network" in graph.text or num_blocks > 1


@pytest.mark.parametrize(("build", "num_shortcuts"), [(InRoot, 1), (Twice, 2)])
def test_the_sum_without_its_branch_is_the_shortcut(build: Callable[[], InRoot], num_shortcuts: int) -> None:
    torch.manual_seed(0)
    model, inputs = build().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    architecture = gator.Architecture.from_keep(graph, {"one": []})
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    with torch.no_grad():
        expected = model.head(num_shortcuts * model.stem(inputs).relu())
        assert close(gator.prune(model, graph, architecture)(inputs), expected)
        assert close(gated(inputs), expected)


class Positions(nn.Module):
    """Adds a parameter to all that came before, which is no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
        self.positions = nn.Parameter(torch.rand(1, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.inner(self.stem(x).relu()) + self.positions)


def test_a_parameter_is_no_shortcut() -> None:
    assert not gator.trace(Positions(), torch.zeros(1, 3, 8, 8)).blocks


class ScaledShortcut(InRoot):
    """A fifth of the shortcut is added to the branch."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.stem(x).relu()
        return self.head(torch.add(self.two(self.one(x).relu()), x, alpha=0.2))


class Context(InRoot):
    """The mean over all positions is added to each position."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.stem(x).relu()
        return self.head(self.two(self.one(x).relu()) + x.mean((2, 3), keepdim=True))


class Table(InRoot):
    """A table of positions, the same for all samples, is added to all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(36, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.two(self.one(self.stem(x).relu()).relu())
        positions = self.table(torch.arange(36, device=x.device)).T.reshape(8, 6, 6)
        return self.head(x + positions)


@pytest.mark.parametrize("build", [ScaledShortcut, Context, Table])
def test_what_is_not_the_sum_itself_without_the_branch_is_no_shortcut(build: type[InRoot]) -> None:
    torch.manual_seed(0)
    model, inputs = build().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    assert not graph.blocks
    assert "one" in graph.by_name
    assert_law(model, graph, inputs, random_keep(graph, 0))


def test_what_nothing_reads_goes_with_the_branch_that_holds_it() -> None:
    model = InRoot()
    model.one.unread = nn.BatchNorm2d(6)
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    architecture = gator.Architecture.from_keep(graph, {"one": []})
    pruned = gator.prune(model, graph, architecture)
    assert gator.ParamsCost(graph)(architecture) == sum(p.numel() for p in pruned.parameters())


def test_the_lowest_cost_has_no_branch() -> None:
    graph = gator.trace(InRoot(), torch.zeros(1, 3, 8, 8))
    positions = 6 * 6
    lowest = positions * (1 * 3 * 9 + 4 * 1)  # one channel of the stem, read by the head; nothing of the branch
    cost = gator.MacsCost(graph)
    assert lowest_ratio(cost) * cost.full == pytest.approx(lowest)


def test_what_is_gone_still_tells_its_settings() -> None:
    """nn.TransformerEncoder reads `self_attn.batch_first` of its first layer, which may have no attention any more."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).double().eval()
    inputs = torch.randn(2, 5, 6, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    assert len(graph.blocks) == 4
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, random_keep(graph, 0, empty=1.0)))
    assert pruned(inputs).shape == (2, 5, 3)
    assert not [name for name, _ in pruned.named_modules() if "self_attn" in name]
    assert gator.trace(pruned, inputs).num_channels < graph.num_channels
