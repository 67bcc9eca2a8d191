"""MacsCost and AttentionCost equal torch's counter, for every network and architecture."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import gator
from gator.costs.counter import count_macs
from gator.errors import GateError, LatencyError, PruneError
from gator.gating.check import check_macs, check_pruning
from gator.graph.ops import PRODUCTS
from gator.latency.op_timing import OpChain, example_inputs
from tests.gator.law import random_keep
from tests.gator.zoo import ZOO, randomised

CPU = torch.device("cpu")
IMAGE = (2, 3, 6, 6)
pytestmark = pytest.mark.filterwarnings("ignore:.*during export:UserWarning", "ignore:.*weight_norm.*:FutureWarning")


class Between(nn.Module):
    """Two convolutions of 8 channels, any function of their maps, and a linear layer over what comes out."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], num_features: int) -> None:
        super().__init__()
        self.one, self.other = (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1)) for _ in range(2))
        self.between, self.head = between, nn.Linear(num_features, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the function of both maps, (N, 8, 16) each."""
        return self.head(self.between(self.one(x).flatten(2), self.other(x).flatten(2)).flatten(1))


class Recurrent(nn.Module):
    """A recurrent layer over the columns of convolved images."""

    def __init__(self, layer: nn.Module, num_out: int) -> None:
        super().__init__()
        self.conv, self.layer = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1)), layer
        self.head = nn.Linear(num_out, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the last output, or that of a cell for the first position."""
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.RNNCellBase):
            return self.head(self.layer(tokens[:, 0]))
        return self.head(self.layer(tokens)[0][:, -1])


class StandardisedConv(nn.Conv2d):
    """Its weight is standardised in each forward pass, as in NF-ResNets."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardised weight."""
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Cosine(nn.Module):
    """A classifier by angles: both its input and its weight are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)), nn.Parameter(torch.ones(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines of the angles."""
        features = self.conv(x).mean((2, 3))
        return functional.linear(functional.normalize(features), functional.normalize(self.weight))


class OwnKernel(nn.Module):
    """Each image is filtered with a kernel computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kernel = nn.Conv2d(3, 4, 1), nn.Linear(3, 4 * 9)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve all channels of all images as groups of their own."""
        maps = self.conv(x)
        kernels = self.kernel(x.mean((2, 3))).view(-1, 1, 3, 3)
        return functional.conv2d(maps.flatten(0, 1)[None], kernels, groups=len(kernels)).sum((2, 3)).view(-1, 4)


def normed(layer: nn.Module) -> nn.Module:
    """Return a network with a layer of computed weight, 3 -> 8 channels, at its beginning."""
    return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))


def two_heads(maps: Tensor) -> Tensor:
    """Return (N, 8, 16) maps as two heads of four features at 16 positions."""
    return maps.unflatten(1, (2, 4)).transpose(2, 3)


def linear_attention(a: Tensor, b: Tensor) -> Tensor:
    """Return queries times (keys times values)."""
    q, k = two_heads(a).relu(), two_heads(b).relu()
    return q @ (k.transpose(2, 3) @ k)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "channels times themselves": lambda: Between(lambda a, b: a @ a.transpose(1, 2), 64),
    "channels times channels": lambda: Between(lambda a, b: torch.bmm(a, b.transpose(1, 2)), 64),
    "sums over channels": lambda: Between(lambda a, b: a.transpose(1, 2) @ b, 256),
    "einsum over channels": lambda: Between(lambda a, b: torch.einsum("ncx,ncy->nxy", a, b), 256),
    "einsum that sums one value first": lambda: Between(lambda a, b: torch.einsum("ncx,ndy->nxy", a, b), 256),
    "einsum with a sum first": lambda: Between(lambda a, b: torch.einsum("ncx,ndx->nc", a, b), 8),
    "einsum of three": lambda: Between(lambda a, b: torch.einsum("ncx,ndx,ndy->ncy", a, b, b), 128),
    "einsum without a sum": lambda: Between(lambda a, b: torch.einsum("ncx,ncx->ncx", a, b), 128),
    "a matrix that is not cut": lambda: Between(lambda a, b: a @ torch.ones(16, 5, dtype=a.dtype), 40),
    "a matrix over channels": lambda: Between(lambda a, b: torch.ones(5, 8, dtype=a.dtype) @ a, 80),
    "times a vector": lambda: Between(lambda a, b: a @ torch.ones(16, dtype=a.dtype), 8),
    "a vector times": lambda: Between(lambda a, b: torch.ones(8, dtype=a.dtype) @ a, 16),
    "over the batch": lambda: Between(lambda a, b: a.flatten(1) @ a.flatten(1).T @ b.flatten(1), 128),
    "tensordot": lambda: Between(lambda a, b: torch.tensordot(a, torch.ones(16, 3, dtype=a.dtype), 1), 24),
    "distances": lambda: Between(lambda a, b: torch.cdist(a.transpose(1, 2), b.transpose(1, 2)), 256),
    "added products": lambda: Between(lambda a, b: torch.baddbmm(a, b, b.transpose(1, 2) @ b), 128),
    "linear attention": lambda: Between(linear_attention, 128),
    "fused attention": lambda: Between(
        lambda a, b: functional.scaled_dot_product_attention(two_heads(a), two_heads(b), two_heads(b)), 128
    ),
    "fused attention over channels": lambda: Between(
        lambda a, b: functional.scaled_dot_product_attention(a, b, b), 128
    ),
    "fused attention of shared keys": lambda: Between(
        lambda a, b: functional.scaled_dot_product_attention(
            two_heads(a), b[:, None, :4].transpose(2, 3), b[:, None, 4:].transpose(2, 3), enable_gqa=True
        ),
        128,
    ),
    "queries that are learned": lambda: Between(
        lambda a, b: functional.scaled_dot_product_attention(
            torch.ones(len(a), 2, 1, 4, dtype=a.dtype), two_heads(a), two_heads(a)
        ),
        8,
    ),
    "GRU": lambda: Recurrent(nn.GRU(8, 5, batch_first=True), 5),
    "GRU of two layers and directions": lambda: Recurrent(nn.GRU(8, 5, 2, batch_first=True, bidirectional=True), 10),
    "LSTM": lambda: Recurrent(nn.LSTM(8, 5, batch_first=True), 5),
    "LSTM with a projection": lambda: Recurrent(nn.LSTM(8, 5, batch_first=True, proj_size=3), 3),
    "RNN": lambda: Recurrent(nn.RNN(8, 5, batch_first=True), 5),
    "GRU cell": lambda: Recurrent(nn.GRUCell(8, 5), 5),
    "weight_norm": lambda: normed(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
    "weight_norm of torch 1": lambda: normed(nn.utils.weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral_norm": lambda: normed(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))),
    "standardised weight": lambda: normed(StandardisedConv(3, 8, 3)),
    "cosines": Cosine,
    "own kernels": OwnKernel,
}


SLOW = (
    *(
        "channels times channels",
        "einsum with a sum first",
        "einsum of three",
        "einsum without a sum",
        "times a vector",
    ),
    *(
        "tensordot",
        "added products",
        "fused attention of shared keys",
        "queries that are learned",
        "RNN",
        "LSTM with a projection",
    ),
    *("GRU of two layers and directions", "weight_norm of torch 1", "spectral_norm"),
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETWORKS])
def test_costs_equal_the_counter_on_products_of_every_kind(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]().double().eval(), torch.randn(IMAGE, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    macs, attention = gator.MacsCost(graph), gator.AttentionCost(graph)
    assert not graph.uncounted
    assert macs.full + attention.full == sum(count_macs(model, inputs)[""].values())
    for keep in (random_keep(graph, seed=0), {group.name: [0] for group in graph.groups}):
        architecture = gator.Architecture.from_keep(graph, keep)
        pruned = gator.prune(model, graph, architecture)
        assert macs(architecture) + attention(architecture) == sum(count_macs(pruned, inputs)[""].values())
        assert gator.ParamsCost(graph)(architecture) == sum(parameter.numel() for parameter in pruned.parameters())


def test_a_parameter_that_is_passed_to_a_module_is_counted() -> None:
    class Queried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.layer = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(self.query)

    model = Queried()
    assert sum(count_macs(model, torch.zeros(4, 3))[""].values()) == 2 * 15
    assert model.query.requires_grad


def test_a_cut_of_attention_written_as_matmul_passes_the_check() -> None:
    model, graph, images = (
        randomised(ZOO["swin"].build()),
        ZOO["swin"].graph,
        torch.randn(2, 3, 16, 16, dtype=torch.float64),
    )
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, seed=1, empty=0.2))
    gated = gator.GatedModel(model, graph)
    gated.load_architecture(architecture)
    assert gator.AttentionCost(graph)(architecture) > 0, "no product outside the layers would be checked"
    check_pruning(gated, gated.prune(), graph, architecture, images)


def test_a_cut_is_checked_in_full_precision_whatever_is_set() -> None:
    """TensorFloat-32 has three digits: the networks would differ by more than the tolerance."""
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before, seen = matrices.fp32_precision, set()

    def note(*_: object) -> None:
        if torch.is_inference_mode_enabled():
            seen.add((matrices.fp32_precision == "tf32", convolutions.fp32_precision == "tf32"))

    net, graph, images = randomised(ZOO["chain"].build()), ZOO["chain"].graph, torch.zeros(2, 3, 8, 8).double()
    net.register_forward_hook(note)
    gated = gator.GatedModel(net, graph)
    try:
        matrices.fp32_precision = "tf32"
        check_pruning(gated, gated.prune(), graph, gator.Architecture.full(graph), images)
        assert seen == {(False, False)}
        assert (matrices.fp32_precision, convolutions.fp32_precision) == ("tf32", "tf32")
    finally:
        matrices.fp32_precision = before


def test_the_module_that_is_counted_wrongly_is_named() -> None:
    model, graph, images = (
        randomised(ZOO["swin"].build()),
        ZOO["swin"].graph,
        torch.randn(2, 3, 16, 16, dtype=torch.float64),
    )
    forgotten = replace(graph, products=graph.products[1:])
    module = re.escape(repr(graph.products[0].module))
    with pytest.raises(
        PruneError, match=rf"MacsCost and AttentionCost say \d+: {module} runs \d+, not \d+; gator's graph"
    ):
        check_macs(model.eval(), forgotten, gator.Architecture.full(graph), images)


def test_a_product_that_sums_over_one_channel_has_no_gradient_above_it() -> None:
    graph = gator.trace(NETWORKS["einsum over channels"](), torch.zeros(IMAGE))
    cost, ones = gator.AttentionCost(graph), torch.ones(len(graph.groups), dtype=torch.float64)
    assert cost.full == 8 * 16 * 16
    assert float(cost.of(ones)) == 0  # einsum multiplies element by element then, which the counter leaves out
    assert float(cost.of(2 * ones)) == 2 * 16 * 16
    assert sorted(cost.relative_gradient(2 * ones).tolist())[-1] == 1 / 8


def test_outputs_of_a_recurrent_layer_are_memory() -> None:
    graph = gator.trace(NETWORKS["GRU"](), torch.zeros(IMAGE))
    assert gator.MemoryCost(graph).full == 4 * (16 * (6 + 8) + 16 * 5 + 4)


@pytest.mark.parametrize(
    "make", [gator.GateLoss, lambda cost, weight: gator.MixedCost({cost: weight})], ids=["loss", "mixed"]
)
def test_a_cost_of_nothing_is_refused(make: Callable[[gator.CostModel, float], object]) -> None:
    with pytest.raises(GateError, match="AttentionCost of Sequential is 0 MACs"):
        make(gator.AttentionCost(ZOO["chain"].graph), 1.0)


@pytest.mark.parametrize("name", ["sums over channels", "a matrix over channels", "over the batch"])
def test_products_of_every_kind_can_be_timed_at_any_width(name: str) -> None:
    graph = gator.trace(NETWORKS[name](), torch.zeros(IMAGE))
    widths = [row_of_ones(len(graph.groups), width) for width in (1.0, 2.0)]
    products = [op for op in graph.ops if op.kind.name in PRODUCTS]
    assert products
    for op, row in product(products, widths):
        num_in, num_out = round(float(op.num_in @ row)), round(float(op.num_out @ row))
        inputs = example_inputs(op.kind, num_in, 2, CPU, torch.float32)
        chain = OpChain(op.kind, num_in, num_out, CPU, torch.float32)
        assert chain.call(inputs, chain.weights[0]).isfinite().all()


def row_of_ones(num_groups: int, width: float) -> Tensor:
    """Return (G + 1,) equal widths of all groups, then 1."""
    return torch.tensor([width] * num_groups + [1.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["GRU", "LSTM", "GRU cell", "distances"])
def test_calls_that_a_table_lacks_are_named(name: str) -> None:
    graph = gator.trace(NETWORKS[name](), torch.zeros(IMAGE))
    kinds = {op.kind.name: op.kind for op in graph.ops}
    missing = {"GRU": "gru", "LSTM": "lstm", "GRU cell": "gru_cell", "distances": "cdist"}[name]
    with pytest.raises(LatencyError, match=rf"^{missing} on .*: this op cannot be timed alone"):
        OpChain(kinds[missing], 8, 8, CPU, torch.float32)
