"""Networks of the kinds that people bring and tools cut wrongly: two of each, exact or locked with a reason. gator.verify() compares."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gator
from tests.gator.zoo import randomised


class Net(nn.Module):
    """A forward of its own over layers by name: code(self, x)."""

    def __init__(self, code: Callable[["Net", Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.head, self.code = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1), code
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.code(self, self.stem(x)))


def conv(inputs: int = 8, outputs: int = 8, size: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def chain(width: int = 6) -> nn.Sequential:
    return nn.Sequential(conv(8, width), nn.BatchNorm2d(width), nn.ReLU(), conv(width, 8))


def attend(net: Net, x: Tensor, scale: float) -> Tensor:
    q, k, v = (layer(x).flatten(2) for layer in (net.q, net.k, net.v))
    return net.out((v @ (q.transpose(1, 2) @ k * scale).softmax(-1).transpose(1, 2)).reshape(x.shape))


def mixed(net: Net, x: Tensor) -> Tensor:
    """Return what each sample makes with a statistic of the batch: minibatch standard deviation."""
    deviation = (x - x.mean(0)).square().mean(0).add(1e-8).sqrt().mean()
    return torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], 1)


def hooked(kind: str) -> nn.Module:
    layer = conv()
    if kind == "forward hook":
        layer.register_forward_hook(lambda module, args, output: output.relu() + 1)
    else:
        layer.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    return layer


def wrapped(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a layer with a forward of the instance, as accelerate and fairscale leave it."""
    inner = layer.forward
    layer.forward = functools.wraps(inner)(lambda *args: change(inner(*args)))
    return layer


def transformer() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1, enable_nested_tensor=False)


def tokens(net: Net, x: Tensor) -> Tensor:
    return net.body(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def without_autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.body(x) + x


def recurrent(net: Net, x: Tensor) -> Tensor:
    return x * net.body(x.flatten(2).transpose(1, 2))[0].mean((1, 2), keepdim=True)[..., None]


def loop(net: Net, x: Tensor) -> Tensor:
    parts = [x[:, number : number + 1] * (number + 1) for number in range(x.shape[1])]
    return torch.cat(parts, 1)


def write(net: Net, x: Tensor) -> Tensor:
    y = net.body(x)
    y[:, :4].add_(x[:, 4:])
    return y


def write_half(net: Net, x: Tensor) -> Tensor:
    y = net.body(x)
    y[:, :4].sigmoid_()
    return y


def twice(net: Net, x: Tensor) -> Tensor:
    return net.act(net.two(net.act(net.one(net.act(x)))))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "a removed branch in the root": lambda: Net(lambda net, x: x + net.body(x), body=chain()),
    "a branch of two masks in the root": lambda: Net(
        lambda net, x: net.one(x).sigmoid() * x + net.body(x), body=chain(), one=conv()
    ),
    "a scale of the live width": lambda: Net(
        lambda net, x: attend(net, x, x.shape[1] ** -0.5), q=conv(8, 6), k=conv(8, 6), v=conv(), out=conv()
    ),
    "a branch on equal widths": lambda: Net(
        lambda net, x: x + net.body(x) if net.body(x).shape == x.shape else net.body(x), body=chain()
    ),
    "a loop over channels": lambda: Net(loop),
    "a part written in place": lambda: Net(write, body=conv()),
    "a half written in place": lambda: Net(write_half, body=conv()),
    "exp over its sum": lambda: Net(lambda net, x: net.body((e := x.exp()) / e.sum((2, 3), keepdim=True)), body=conv()),
    "over its norm": lambda: Net(lambda net, x: net.body(x / x.norm(dim=(2, 3), keepdim=True)), body=conv()),
    "weight_norm": lambda: Net(lambda net, x: net.body(x), body=nn.utils.parametrizations.weight_norm(conv())),
    "spectral_norm": lambda: Net(lambda net, x: net.body(x), body=nn.utils.parametrizations.spectral_norm(conv())),
    "noise in training": lambda: Net(
        lambda net, x: net.body(x + torch.randn_like(x) if net.training else x), body=conv()
    ),
    "another layer in training": lambda: Net(
        lambda net, x: net.body(x) if net.training else net.body(x).clamp(-1, 1), body=conv()
    ),
    "a tied autoencoder": lambda: Net(
        lambda net, x: functional.conv_transpose2d(net.body(x).relu(), net.body.weight), body=conv(8, 6)
    ),
    "a tied linear layer": lambda: Net(
        lambda net, x: functional.linear(net.body(x.mean((2, 3))).relu(), net.body.weight.t())[..., None, None] * x,
        body=nn.Linear(8, 6),
    ),
    "a transformer layer of torch": lambda: Net(tokens, body=transformer()),
    "a forward hook": lambda: Net(lambda net, x: net.body(x), body=hooked("forward hook")),
    "a hook before forward": lambda: Net(lambda net, x: net.body(x), body=hooked("forward pre-hook")),
    "an autocast region": lambda: Net(without_autocast, body=chain()),
    "a checkpoint": lambda: Net(lambda net, x: checkpoint(net.body, x, use_reentrant=False), body=chain()),
    "a forward of the instance": lambda: Net(lambda net, x: net.body(x), body=wrapped(conv(), torch.tanh)),
    "a shared activation": lambda: Net(twice, one=conv(), two=conv(), act=nn.SiLU()),
    "one channel over all": lambda: Net(lambda net, x: x * net.gate(x).sigmoid(), gate=conv(8, 1)),
    "CBAM": lambda: Net(
        lambda net, x: x * net.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid(),
        gate=conv(2, 1, 3),
    ),
    "a GRU": lambda: Net(recurrent, body=nn.GRU(8, 5, batch_first=True)),
    "an LSTM": lambda: Net(recurrent, body=nn.LSTM(8, 5, batch_first=True)),
    "attention over channels": lambda: Net(
        lambda net, x: (((y := net.body(x).flatten(2)) @ y.transpose(1, 2)).softmax(-1) @ y).reshape(x.shape),
        body=chain(),
    ),
    "linear attention": lambda: Net(
        lambda net, x: net.out(
            (net.v(x).flatten(2) @ net.k(x).flatten(2).transpose(1, 2)) @ net.q(x).flatten(2) / 64
        ).reshape(x.shape),
        q=conv(8, 6),
        k=conv(8, 6),
        v=conv(),
        out=nn.Conv1d(8, 8, 1),
    ),
    "a mean over the batch": lambda: Net(lambda net, x: net.body(mixed(net, x)), body=conv(9, 8)),
}


CHANNELS = {
    "a removed branch in the root": 14,
    "a branch of two masks in the root": 14,
    "a scale of the live width": 30,
    "a branch on equal widths": 14,
    "a loop over channels": 1,
    "a part written in place": 12,
    "a half written in place": 16,
    "exp over its sum": 16,
    "over its norm": 16,
    "weight_norm": 8,
    "spectral_norm": 0,
    "noise in training": 8,
    "another layer in training": 8,
    "a tied autoencoder": 14,
    "a tied linear layer": 14,
    "a transformer layer of torch": 22,
    "a forward hook": 16,
    "a hook before forward": 16,
    "an autocast region": 14,
    "a checkpoint": 22,
    "a forward of the instance": 16,
    "a shared activation": 24,
    "one channel over all": 8,
    "CBAM": 8,
    "a GRU": 8,
    "an LSTM": 8,
    "attention over channels": 14,
    "linear attention": 17,
    "a mean over the batch": 8,
}
"""That can be cut; the network's outputs cannot."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_each_kind_is_exact(kind: str) -> None:
    torch.manual_seed(0)
    net = randomised(KINDS[kind]())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = gator.trace(net, images)
    assert graph.num_channels == CHANNELS[kind]
    gator.verify(net, graph, images)
