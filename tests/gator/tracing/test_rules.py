"""The rules of ops, one small network for each: what may be cut, and that cut, masked and zeroed networks agree."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gator
from tests.gator.law import close, random_keep, tensors_of
from tests.gator.zoo import randomised

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Between(nn.Module):
    """A convolution of 8 channels, a function of its output, and two more convolutions."""

    def __init__(
        self, function: Callable[..., Tensor], width: int = 8, read: int | None = None, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.head = nn.Sequential(nn.Conv2d(read or width, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.parts, self.function = nn.ModuleDict(parts), function

    def forward(self, x: Tensor) -> Tensor:
        """Return what the second convolution makes of the function's value."""
        return self.head(self.function(self.norm(self.stem(x)), **self.parts))


def zeroed(model: nn.Module, graph: gator.ChannelGraph, architecture: gator.Architecture) -> nn.Module:
    """Return the unpruned network in which layers read nothing of closed channels, and that write zeros to them."""
    model = copy.deepcopy(model)
    for group in graph.groups:
        closed = torch.ones(group.num_channels, dtype=torch.bool)
        closed[list(architecture.keep[group.name])] = False
        for dim in group.dims:
            owner, _, name = dim.tensor.rpartition(".")
            module = model.get_submodule(owner)
            places, is_layer = dim.entries(closed.nonzero().flatten()), isinstance(module, LAYERS) and name == "weight"
            if is_layer and dim.dim == 1 and (owner, "in") in group.layers:
                with torch.no_grad():
                    module.weight.index_fill_(1, places, 0)
            if dim.dim == (1 if isinstance(module, nn.Embedding) else 0) and (owner, "out") in group.layers:
                _silence(module, places)
    return model


def _silence(writer: nn.Module, places: Tensor) -> None:
    dim = 1 if isinstance(writer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1
    writer.register_forward_hook(lambda module, args, output: output.index_fill(dim, places, 0))


def check(model: nn.Module, x: Tensor, is_additive: bool = True) -> gator.ChannelGraph:
    """Assert that the cut network equals the masked one, the one with zeroed readers too if the ops are additive; and that it trains."""
    model = randomised(model)
    graph = gator.trace(model, x)
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, 0))
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    pruned = gator.prune(model, graph, architecture)
    with torch.no_grad():
        cut, masked = pruned(x), gated(x)
        assert all(bool(part.isfinite().all()) for part in tensors_of(masked))
        assert close(cut, masked)
        assert not is_additive or close(cut, zeroed(model, graph, architecture)(x))
    if graph.groups:
        trained = gated.train()
        sum(part.sum() for part in tensors_of(trained(torch.cat([x, x])))).backward()
        assert bool(gated.gates.logits_C.grad.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in gated.parameters() if p.grad is not None)
    sum(part.sum() for part in tensors_of(pruned.train()(torch.cat([x, x])))).backward()
    return graph


def widths(graph: gator.ChannelGraph) -> list[int]:
    """Return the widths of the groups of the first convolution."""
    return [group.num_channels for group in graph.groups if "stem" in group.name]


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "adaptive max pooling": lambda y: functional.adaptive_max_pool2d(y, 2),
    "expand": lambda y: y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6),
    "argument-less squeeze": lambda y: y.mean((2, 3), keepdim=True).squeeze()[:, :, None, None],
    "broadcast_to": lambda y: y.mean((2, 3), keepdim=True).broadcast_to(y.shape),
    "comparison": lambda y: (y > 0).to(y.dtype) * y,
    "concat": lambda y: torch.concat([y, y.relu()], 3),
    "cumsum": lambda y: y.cumsum(2),
    "dropout of channels": lambda y: functional.dropout2d(y, 0.0, training=True),
    "expand_as": lambda y: y.mean((2, 3), keepdim=True).expand_as(y),
    "rot90": lambda y: torch.rot90(y, 1, (2, 3)),
    "channel_shuffle": lambda y: functional.channel_shuffle(y, 2),
    "fill": lambda y: torch.cat([y[:, :, :1].fill_(torch.tensor(0.5, dtype=y.dtype)), y[:, :, 1:]], 2),
    "flip": lambda y: y.flip(1, 3),
    "log": lambda y: y.exp().log(),
    "log of zeros": lambda y: (y.relu() + y.relu()).sigmoid().log(),
    "log_softmax": lambda y: y.flatten(2).log_softmax(2).unflatten(2, (6, 6)),
    "maximum of two": lambda y: torch.max(y, y.flip(3)),
    "maximum over positions": lambda y: y.max(2, keepdim=True)[0] + y.amax(3, keepdim=True),
    "minimum": lambda y: torch.minimum(y, torch.zeros_like(y)),
    "movedim": lambda y: y.movedim(1, 3).moveaxis(3, 1),
    "nearest-exact": lambda y: functional.interpolate(y, scale_factor=2.0, mode="nearest-exact"),
    "ones_like": lambda y: torch.ones_like(y) * y,
    "one minus": lambda y: (1 - y.sigmoid()) * y,
    "pow": lambda y: y**2 + y.clamp(min=0.1) ** 0.3,
    "quotient of itself": lambda y: y.exp() / y.exp().sum((2, 3), keepdim=True),
    "quotient by its norm": lambda y: y / y.norm(dim=(2, 3), keepdim=True),
    "quotient that is rounded": lambda y: torch.div(8 * y, norm(y), rounding_mode="trunc"),
    "reciprocal": lambda y: 1 / (y.square() + 1),
    "repeat": lambda y: y.repeat(1, 1, 2, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 3),
    "reshape_as": lambda y: (2 * y.flatten(2)).reshape_as(y),
    "softplus": functional.softplus,
    "square root of zeros": lambda y: y.square().sum((2, 3), keepdim=True).sqrt(),
    "square root of a variance": lambda y: y / (y.var((2, 3), keepdim=True) + 1e-5).sqrt(),
    "stack": lambda y: torch.stack([y, y.tanh()], 1).sum(1),
    "standard deviation": lambda y: y / (y.std((2, 3), keepdim=True) + 1),
    "tensor_split": lambda y: torch.cat(y.tensor_split(2, 1)[::-1], 1),
    "to": lambda y: y.to(torch.float64).type_as(y),
    "unfold of positions": lambda y: y.unfold(2, 3, 3).mean(-1),
    "view_as": lambda y: (2 * y).view_as(y.relu()),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y) + torch.where(y > 1, y, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("function", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_an_op_is_followed(function: Callable[[Tensor], Tensor]) -> None:
    graph = check(Between(function), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert widths(graph) in ([8], [4])  # 4 where two halves must be cut alike


def centred(y: Tensor) -> Tensor:
    """Subtract the mean over channels."""
    return y - y.mean(1, keepdim=True)


def norm(y: Tensor) -> Tensor:
    """Return the norm of each channel."""
    return y.norm(dim=(2, 3), keepdim=True)


OPEN_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "sum over channels": lambda y: y * y.sum(1, keepdim=True),
    "norm over channels": lambda y: functional.normalize(y, dim=1),
    "square root of a sum over channels": lambda y: y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10),
    "mean over channels": lambda y: y * y.mean(1, keepdim=True),
    "mean in another type": lambda y: y * y.float().mean(1, keepdim=True, dtype=torch.float64),
    "extremes over channels": lambda y: y * (y.max(1, keepdim=True)[0] - y.amin(1, keepdim=True)),
    "normalisation by hand": lambda y: centred(y) / (centred(y).pow(2).mean(1, keepdim=True) + 1e-6).sqrt(),
    "root mean square by hand": lambda y: y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6),
    "global response": lambda y: y + y * norm(y) / (norm(y).mean(1, keepdim=True) + 1e-6),
    "softmax over channels": lambda y: y.softmax(1),
    "logarithm of a softmax over channels": lambda y: y * y.log_softmax(1),
    "group_norm of one group": lambda y: functional.group_norm(y, 1),
    "rms_norm": lambda y: functional.rms_norm(y.movedim(1, -1), (8,)).movedim(-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("function", OPEN_ONLY.values(), ids=OPEN_ONLY.keys())
def test_a_statistic_over_channels_is_over_the_open_ones(function: Callable[[Tensor], Tensor]) -> None:
    graph = check(Between(function), torch.randn(2, 3, 8, 8, dtype=torch.float64), is_additive=False)
    assert widths(graph) == [8]


def halves(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what applies a function to the second half of the channels, which one group holds with the first."""
    return lambda y: torch.cat([y.chunk(2, 1)[0], function(y.chunk(2, 1)[1])], 1)


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "extreme": halves(lambda b: b * b.amax(1, keepdim=True)),
    "mean": halves(lambda b: b - b.mean(1, keepdim=True)),
    "pooling": halves(lambda b: functional.max_pool2d(b, 3, 1, 1)),
    "interpolation": halves(lambda b: functional.interpolate(b, scale_factor=2)[..., ::2, ::2]),
    "view": halves(lambda b: b.flatten(2).softmax(-1).reshape(b.shape)),
    "windows": halves(lambda b: functional.fold(functional.unfold(b, 1), (6, 6), 1)),
    "norm of one group": halves(lambda b: functional.group_norm(b, 1)),
    "reflection": halves(lambda b: functional.pad(b, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1]),
}  # fmt: skip


@pytest.mark.parametrize("function", PARTS.values(), ids=PARTS.keys())
def test_a_part_keeps_a_channel_if_an_op_needs_one(function: Callable[[Tensor], Tensor]) -> None:
    model, x = randomised(Between(function)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(model, x)
    assert widths(graph) == [7]
    assert any("needs a channel of this part of a group" in locked.reason for locked in graph.locked)
    architecture = gator.Architecture.from_keep(graph, {"stem": [0, 2]})  # nothing else of the second half
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    with torch.no_grad():
        assert close(gator.prune(model, graph, architecture)(x), gated(x))


EMPTY: dict[str, Callable[[Tensor], Tensor]] = {
    name: halves(function)
    for name, function in {
        **{name: FOLLOWED[name] for name in ("broadcast_to", "cumsum", "expand", "fill", "flip", "rot90", "stack")},
        "copy into positions": lambda b: torch.cat([b[:, :, :1].copy_(b[:, :, 1:2]), b[:, :, 1:]], 2),
        "every second position": lambda b: torch.stack([b[..., ::2], b[..., 1::2]], -1).flatten(-2),
        "narrowed positions": lambda b: b * b.narrow(2, 1, 1),
        "parts of the positions": lambda b: torch.cat([*b.split(3, 2)[::-1], *b.chunk(3, 2)], 2)[:, :, 3:9],
        "selected positions": lambda b: b * b.select(2, 0).unsqueeze(2),
    }.items()
}


@pytest.mark.parametrize("function", EMPTY.values(), ids=EMPTY.keys())
def test_a_part_without_channels_keeps_its_positions(function: Callable[[Tensor], Tensor]) -> None:
    model, x = randomised(Between(function)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(model, x)
    architecture = gator.Architecture.from_keep(graph, {"stem": [0, 2]})  # nothing of the second half
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    with torch.no_grad():
        assert close(gator.prune(model, graph, architecture)(x), gated(x))


LOCKED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "variance over channels": (lambda y: y * y.var(1, keepdim=True), "aten.var at '' depends on all channels"),
    "running sum of channels": (lambda y: y.cumsum(1), "aten.cumsum at '' adds up along the channels"),
    "mean over the batch": (lambda y: y - y.mean(0), "aten.mean at '' mixes samples"),
    "positions from channels": (
        lambda y: functional.grid_sample(y, y[:, :2].movedim(1, -1), align_corners=False),
        "aten.grid_sampler at '' reads them as positions",
    ),
    "pooling of features": (
        lambda y: functional.adaptive_avg_pool1d(y.mean((2, 3)), 8)[:, :, None, None] * torch.ones_like(y),
        "aten.adaptive_avg_pool1d at '' pools along the channels",
    ),
    "pooling without samples": (
        lambda y: functional.avg_pool2d(y.mean(3), (3, 1), 1, (1, 0))[..., None] * torch.ones_like(y),
        "aten.avg_pool2d at '' pools along the channels",
    ),
    "channel by channel": (lambda y: (y[:, :, None] * y[:, None]).sum(2), "combines channels of one dimension with those of another"),
    "one channel": (
        lambda y: torch.cat([y.select(1, 0).relu().unsqueeze(1), y[:, 1:]], 1),
        "aten.select at '' takes this channel by its number",
    ),
    "norm of a weight": (
        lambda y: functional.conv2d(y, torch._weight_norm(torch.ones(8, 8, 1, 1, dtype=y.dtype), torch.ones(8, 1, 1, 1, dtype=y.dtype), 0)),
        "the weight from aten._weight_norm at '' is computed, not a parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "reason"), LOCKED.values(), ids=LOCKED.keys())
def test_what_cannot_be_followed_is_locked_for_a_reason(function: Callable[[Tensor], Tensor], reason: str) -> None:
    graph = check(Between(function), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert widths(graph) in ([], [6], [7])
    assert any(reason in locked.reason for locked in graph.locked), [str(locked) for locked in graph.locked]


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, int]]] = {
    "gated linear unit": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GLU(1), nn.Conv2d(4, 2, 1)), (2, 3, 8, 8), {"0": 4}),
    "channel dropout": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.1), nn.Conv2d(8, 6, 1), nn.AlphaDropout(0.1), nn.Conv2d(6, 2, 1)),
        (2, 3, 8, 8), {"0": 8, "2": 6},
    ),
    "windows": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unfold(2), nn.Fold((6, 6), 2), nn.Conv2d(4, 2, 1)), (2, 3, 8, 8), {"0": 4}),
    "maximum in one dimension": (
        nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 4)), (2, 3, 8), {"0": 8},
    ),
    "outer product": (
        Between(lambda y, fc: (fc(y.mean((2, 3))).unsqueeze(2) * y.mean((2, 3)).unsqueeze(1)).sum(1)[..., None, None], fc=nn.Linear(8, 6)),
        (2, 3, 8, 8), {"head.0": 4, "parts.fc": 6},
    ),
    "softmax of heads": (
        Between(lambda y, q: y.unflatten(1, (2, 4)).softmax(2).flatten(1, 2) * q(y), q=nn.Conv2d(8, 8, 1)),
        (2, 3, 8, 8), {"stem": 2, "head.0": 4},
    ),
    "spatial gate": (Between(lambda y, gate: y * gate(y).sigmoid(), gate=nn.Conv2d(8, 1, 1)), (2, 3, 8, 8), {"stem": 8, "head.0": 4}),
    "one channel added": (Between(lambda y, one: y + one(y).sigmoid(), one=nn.Conv2d(8, 1, 1)), (2, 3, 8, 8), {"stem": 8, "head.0": 4}),
    "scalar gate": (
        Between(lambda y, gate: y + y * gate(y.mean((2, 3))).tanh()[:, :, None, None], gate=nn.Linear(8, 1)),
        (2, 3, 8, 8), {"stem": 8, "head.0": 4},
    ),
    "gate of both": (
        Between(lambda y, a, b: torch.maximum(y * a(y).sigmoid(), y * b(y.mean((2, 3), keepdim=True)).sigmoid()),
                a=nn.Conv2d(8, 1, 1), b=nn.Conv2d(8, 8, 1)),
        (2, 3, 8, 8), {"stem": 8, "head.0": 4},
    ),
    "indices of maxima": (
        Between(lambda y, pool, back: back(*pool(y)), pool=nn.MaxPool2d(2, return_indices=True), back=nn.MaxUnpool2d(2)),
        (2, 3, 8, 8), {"stem": 8, "head.0": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "shape", "groups"), NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_is_exact(model: nn.Module, shape: tuple[int, ...], groups: dict[str, int]) -> None:
    graph = check(model, torch.randn(shape, dtype=torch.float64))
    assert {group.name: group.num_channels for group in graph.groups} == groups


class Folded(nn.Module):
    """A network of images in which several entries of the batch belong to each sample, and a mean over them."""

    def __init__(self, fold: Callable[[Tensor], Tensor], mean: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.images = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        )
        self.fold, self.mean, self.head = fold, mean, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return a vector for each sample."""
        return self.head(self.mean(self.images(self.fold(x)).mean((2, 3))))


FOLDED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "frames": (lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (-1, 4)).mean(1)),
    "time first": (lambda x: x.transpose(0, 1).flatten(0, 1), lambda y: y.unflatten(0, (4, -1)).mean(0)),
    "views": (lambda x: torch.cat([x[:, 0], x[:, 1].flip(3), x[:, 2]]), lambda y: sum(y.chunk(3))),
    "repeated": (lambda x: x[:, 0].repeat(2, 1, 1, 1), lambda y: y.unflatten(0, (2, -1)).sum(0)),
    "frames in views": (lambda x: torch.cat([x.flatten(0, 1), x.flatten(0, 1).flip(3)]), lambda y: y.unflatten(0, (2, -1, 4)).sum((0, 2))),
}  # fmt: skip


@pytest.mark.parametrize(("fold", "mean"), FOLDED.values(), ids=FOLDED.keys())
def test_entries_of_a_sample_have_its_mask(fold: Callable[[Tensor], Tensor], mean: Callable[[Tensor], Tensor]) -> None:
    model, x = randomised(Folded(fold, mean)), torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    graph = check(model, x, is_additive=False)
    assert [group.num_channels for group in graph.groups] == [8, 6]
    gated = gator.GatedModel(model, graph).eval()
    mask_NC = torch.rand(3, 14, dtype=torch.float64).round()
    with torch.no_grad():
        alone = [gated.under(mask_NC[n : n + 1], x[n : n + 1]) for n in range(3)]
        assert close(gated.under(mask_NC, x), torch.cat(alone))


def test_one_norm_over_all_channels_is_cut() -> None:
    norm = nn.GroupNorm(1, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    graph = check(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), is_additive=False)
    assert {group.name: group.num_channels for group in graph.groups} == {"0": 8, "2": 6}
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, {"0": [1, 2]}))
    assert (pruned[1].num_groups, pruned[1].num_channels) == (1, 2)


def test_a_softmax_of_no_open_channel_has_finite_gradients() -> None:
    model = randomised(Between(lambda y: y.softmax(1)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gated = gator.GatedModel(model, gator.trace(model, x))
    mask_NC = torch.zeros(2, gated.graph.num_channels, dtype=torch.float64, requires_grad=True)
    gated.under(mask_NC, x).square().sum().backward()
    assert mask_NC.grad is not None
    assert bool(mask_NC.grad.isfinite().all())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_reads_channels(layer: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rnn = nn.Conv1d(3, 8, 3), layer(8, 4, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.conv(x).relu().transpose(1, 2))[0][:, -1])

    graph = check(Recurrent(), torch.randn(2, 3, 9, dtype=torch.float64), is_additive=False)
    assert {group.name: group.num_channels for group in graph.groups} == {"conv": 8}


def test_a_norm_over_entries_of_one_channel_counts_all_of_them() -> None:
    """All 8 entries are one channel, since a product mixes them: they are open or closed together."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)
            self.mix = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).permute(0, 2, 3, 1)
            return self.head(
                self.norm(self.mix(x).sum(-1, keepdim=True).expand(-1, -1, -1, 8) * x.sum(-1, keepdim=True))
            )

    net = Mixes()
    gator.verify(net, gator.trace(net, torch.zeros(1, 3, 8, 8)), torch.zeros(1, 3, 8, 8))
