"""Gates, their loss and the target control: statistics, gradients, and when channels close."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import gator
from gator.gating import gates
from gator.gating.gates import HardSigmoid, logistic_noise
from tests.gator.zoo import ZOO


def gated_chain(**config: float) -> tuple[gator.GatedModel, gator.MacsCost]:
    """Return the zoo's chain under gates, in training mode, and its MACs."""
    model = ZOO["chain"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8))
    return gator.GatedModel(model, graph, gator.GateConfig(**config)).train(), gator.MacsCost(graph)


@pytest.mark.parametrize("keep_prob", [0.6, 0.9, 0.995])
def test_a_gate_opens_with_its_keep_probability(keep_prob: float) -> None:
    gated, _ = gated_chain(init_keep_prob=keep_prob)
    masks = gated.gates.sample(20_000)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    spread = math.sqrt(keep_prob * (1 - keep_prob) / masks.numel())
    assert abs(masks.mean().item() - keep_prob) < 5 * spread  # five standard deviations


def test_straight_through_gradient_is_that_of_the_soft_gate() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    HardSigmoid.apply(x).sum().backward()
    y = torch.sigmoid(x.detach())
    assert torch.allclose(x.grad, y * (1 - y), atol=0, rtol=1e-12)


class Scaled(nn.Module):
    """Two channels x a_c, whose sum is the output: the loss of a sample is a quadratic of its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 1) sums."""
        return self.two(self.one(x))


def test_the_second_order_gradient_is_the_change_of_a_quadratic_loss() -> None:
    """Residuals of +1 and -1: the mean gradient is 0, as at a trained network, and the squared one is the second derivative."""
    network = Scaled().double()
    a = torch.tensor([0.5, 2.0], dtype=torch.float64)
    network.one.weight.data, network.two.weight.data = a[:, None], torch.ones(1, 2, dtype=torch.float64)
    x, noise = torch.ones(4, 1, dtype=torch.float64), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    graph = gator.trace(network, x)
    changes = []
    for curvature in (0.0, 1.0):
        gated = (
            gator.GatedModel(network, graph, gator.GateConfig(init_keep_prob=1 - 1e-12, curvature=curvature))
            .double()
            .train()
        )
        (0.5 * (gated(x) - (a.sum() + noise)).square()).mean().backward()
        y = (
            gated.gates.logits_C.detach()
            + logistic_noise(0, torch.tensor(0), torch.arange(4), torch.arange(2)).double()
        )
        slope = torch.sigmoid(y) * (1 - torch.sigmoid(y))
        assert bool(gated.mask_NC.all())
        assert gated.gates.logits_C.grad is not None
        changes.append((gated.gates.logits_C.grad, slope))
    (paper, slope), (second, _) = changes
    per_sample = -noise * a / 4  # dL/dm of each sample: residual -noise times a, of a mean over 4
    assert torch.allclose(paper, (slope * per_sample).sum(0), rtol=1e-9, atol=0)
    assert torch.allclose(second, (slope * (per_sample - a.square() / 8)).sum(0), rtol=1e-9, atol=0)
    # closing a channel raises the mean loss by a^2 / 2: 1/2 (a + noise)^2 - 1/2 noise^2, the noise having mean 0
    assert torch.allclose(-(per_sample - a.square() / 8).sum(0), a.square() / 2)


def test_the_second_order_term_leaves_the_pressure_alone() -> None:
    gradients = []
    for curvature in (0.0, 4.0):
        gated, cost = gated_chain(init_keep_prob=0.9, curvature=curvature)
        gated.train()(torch.zeros(4, 3, 8, 8))
        gator.GateLoss(cost, weight=1.0)(gated).backward()
        gradients.append(gated.gates.logits_C.grad)
    assert torch.equal(*gradients)


def gradients_of_gates(gated: gator.GatedModel, scale: float = 1.0) -> Tensor:
    """Return the gradient of the gates of one batch, always the same, of `scale` times the loss."""
    gated.zero_grad()
    gated.seek(epoch=0, position=0)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (scale * gated(images).square().mean()).backward()
    gradient = gated.gates.logits_C.grad
    assert gradient is not None
    return gradient.clone()


def test_the_second_order_gradient_of_a_scaled_loss_is_scaled() -> None:
    gated, _ = gated_chain(init_keep_prob=0.7)
    gated.double()
    gated.forward = lambda x: gator.GatedModel.forward(gated, x.double())  # type: ignore[method-assign]
    plain = gradients_of_gates(gated)
    gated.loss_scale = 1024.0
    assert torch.allclose(gradients_of_gates(gated, scale=1024.0), 1024 * plain, rtol=1e-9, atol=0)


def test_a_gradient_scaler_has_to_be_named() -> None:
    gated, _ = gated_chain(init_keep_prob=0.7)
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(gator.GateError, match=r"set gated\.loss_scale = scaler\.get_scale\(\)"):
            gated(torch.zeros(2, 3, 8, 8))
        gated.loss_scale = 1.0
        gated(torch.zeros(2, 3, 8, 8))


class Extreme(nn.Module):
    """A value divided by its largest channel, and roots: ops that read the masks of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        x = self.norm(self.stem(x)) - 10
        return self.head(torch.cat([x.abs().sqrt(), x.amax(1, keepdim=True)], 1))


def test_a_copy_has_gates_of_its_own() -> None:
    torch.manual_seed(0)
    model = Extreme()
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8))
    gated = gator.GatedModel(model, graph, gator.GateConfig(init_keep_prob=0.7))
    gated.param_groups(0.1, cost=gator.MacsCost(graph))
    unused = copy.deepcopy(gated)
    expected = gradients_of_gates(gated)
    assert torch.equal(gradients_of_gates(unused), expected)
    assert torch.equal(gradients_of_gates(copy.deepcopy(gated)), expected)
    with torch.no_grad():
        copied, images = copy.deepcopy(gated.eval()), torch.randn(2, 3, 8, 8)
        expected = gated(images)
        gated.under(torch.zeros(2, 8), images)
        assert torch.equal(copied(images), expected)


def test_a_frozen_or_shallow_copy_leaves_the_gradient_as_it_is() -> None:
    gated, cost = gated_chain(init_keep_prob=0.7)
    gated.param_groups(0.1, cost=cost)
    expected = gradients_of_gates(gated)
    copy.copy(gated)
    assert torch.equal(gradients_of_gates(gated), expected)
    frozen = copy.deepcopy(gated).requires_grad_(False)
    assert copy.deepcopy(frozen).gradient_cost is not None


def test_a_pass_without_gradients_needs_no_scale() -> None:
    gated, _ = gated_chain(init_keep_prob=0.7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        gated(torch.zeros(2, 3, 8, 8))
    with pytest.raises(gator.GateError, match="no input is a tensor"):
        gated([torch.zeros(2, 3, 8, 8)])


def test_inputs_may_be_given_by_name() -> None:
    torch.manual_seed(0)
    model = Extreme()
    gated = gator.GatedModel(model, gator.trace(model, torch.zeros(2, 3, 8, 8))).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(gated(x=images), gated(images))


def test_the_largest_draw_of_the_noise_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_mix", lambda x: torch.full_like(x, -1))  # all bits are set
    assert logistic_noise(0, torch.tensor(0), torch.arange(2), torch.arange(3)).isfinite().all()


def test_noise_is_a_function_of_seed_epoch_position_and_channel() -> None:
    def draw(seed: int, epoch: int, positions: list[int]) -> Tensor:
        return logistic_noise(seed, torch.tensor(epoch), torch.tensor(positions), torch.arange(50))

    whole = draw(1, 2, [0, 1, 2, 3])
    assert torch.equal(whole, draw(1, 2, [0, 1, 2, 3]))
    assert torch.equal(whole[[1, 3]], draw(1, 2, [1, 3]))  # the second of two workers
    for other in (draw(2, 2, [0, 1, 2, 3]), draw(1, 3, [0, 1, 2, 3]), draw(1, 2, [4, 5, 6, 7])):
        assert not torch.isclose(whole, other).any()


def test_seek_places_the_batch_and_positions_go_on() -> None:
    gated, _ = gated_chain(init_keep_prob=0.6)
    gated.seek(epoch=0, position=0)
    first, second = gated.gates.sample(4), gated.gates.sample(4)
    gated.seek(epoch=0, position=1, stride=2)
    assert torch.equal(gated.gates.sample(4), torch.cat([first, second])[1::2])


def test_eval_is_deterministic_and_draws_nothing() -> None:
    gated, _ = gated_chain(init_keep_prob=0.6)
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(gated.eval()(images), gated(images))


@pytest.mark.parametrize(("weight", "expected"), [(1, 468), (4, 141)])
def test_without_a_task_all_gates_close_at_the_known_step(weight: float, expected: int) -> None:
    """lr 0.1, momentum 0.9, weight decay 1e-4, scale 0.2, keep probability 0.995.

    The expected step is that of the mean gradient. A gate's gradient is the mean of y (1 - y) over the samples, whose standard
    deviation is 2.07 times its mean at the start (and less later); `expected` steps of `num_samples` each are that many draws.
    """
    num_samples = 2048
    tolerance = 5 * 2.07 / math.sqrt(num_samples * expected)  # five standard errors: 1.1 and 1.9 %
    gated, cost = gated_chain()
    gates = gated.gates
    gate_loss = gator.GateLoss(cost, weight=weight)
    (_, group) = gated.param_groups(lr=0.1, gate_lr_scale=0.2, cost=cost, weight_decay=1e-4)
    optimizer = torch.optim.SGD([group], momentum=0.9)
    closed_at = {}
    for step in range(1, 520):
        gates.settle()
        gated._masks.drawn_NC = gates.sample(num_samples)  # the masks of a forward pass, without its convolutions
        gate_loss(gated).backward()
        optimizer.step()
        optimizer.zero_grad()
        for channel in (gates.logits_C < 0).nonzero().flatten().tolist():
            closed_at.setdefault(channel, step)
        if len(closed_at) >= gated.graph.num_channels - 2:  # each of the two groups keeps its last channel
            break
    assert len(closed_at) >= gated.graph.num_channels - 2
    assert all(abs(step - expected) <= tolerance * expected for step in closed_at.values())


@pytest.mark.parametrize("cost_name", ["macs", "params", "memory", "mixed"])
def test_the_learning_rate_of_gates_follows_the_widths(cost_name: str) -> None:
    """The paper's: a group's rate over W_g = dC/dn_g / C(full), at the widths that are left."""
    gated, _ = gated_chain()
    gated.double()
    cost = COSTS[cost_name](gated.graph)
    gates = gated.gates
    for num_open in (4, 2):  # of the first group's four
        gates.close(torch.arange(len(gates.logits_C)) < 4 - num_open)
        gradients = []
        for divided_by in (None, cost):
            gated.divide_gradient_by(divided_by)
            gates.logits_C.grad = None
            gated._masks.drawn_NC = gates.sample(32)
            (gated.mask_NC.mean(0) * torch.linspace(1, 2, len(gates.logits_C))).sum().backward()
            gradients.append(gates.logits_C.grad.clone())
            gates.seek(0, 0)
        plain, divided = gradients
        weight_G = cost.relative_gradient(gates.count(gates.keep_C))
        torch.testing.assert_close(divided, plain / weight_G[gates.group_C], rtol=1e-12, atol=0)
        assert plain.any()


def test_the_last_channel_of_a_group_outside_blocks_stays() -> None:
    gated, _ = gated_chain()
    with torch.no_grad():
        gated.gates.logits_C.copy_(torch.linspace(-2, -1, 10))
    gated(torch.randn(2, 3, 8, 8))
    assert gated.architecture().keep == {"0": (3,), "3": (5,)}  # the most probable of each


COSTS = {
    "macs": gator.MacsCost,
    "params": gator.ParamsCost,
    "memory": gator.MemoryCost,
    "mixed": lambda graph: gator.MixedCost({gator.MacsCost(graph): 1.0, gator.ParamsCost(graph): 2.0}),
}


def test_small_channels_start_nearer_to_closing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, 0.8, 1.0, 2.1]).view(4, 1, 1, 1))  # mean 1
        model[3].weight.zero_()
    graph = gator.trace(model, torch.zeros(2, 1, 1, 1))
    gated = gator.GatedModel(model, graph, gator.GateConfig(init_keep_prob=0.9, magnitude_spread=5.0))
    start = math.log(9)
    torch.testing.assert_close(
        gated.gates.logits_C.detach(), torch.tensor([0.1, start - 1, start, start + 5.5])
    )  # none closed
    assert gated.architecture() == gator.Architecture.full(graph)


@pytest.mark.parametrize(
    ("cost_name", "target", "spread"),
    [
        *(("macs", 0.7, 0.0), ("macs", 0.15, 0.0), ("params", 0.4, 0.0), ("memory", 0.6, 0.0), ("macs", 0.8, 15.0)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("macs", 0.3, 0.0), ("macs", 0.5, 0.0))),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("mixed", 0.3, 0.0), ("macs", 0.3, 15.0))),
    ],
)
def test_a_target_is_met_within_one_percent(cost_name: str, target: float, spread: float) -> None:
    model = ZOO["basic"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 32, 32))
    gated = gator.GatedModel(model, graph, gator.GateConfig(magnitude_spread=spread)).train()
    cost = COSTS[cost_name](graph)
    gate_loss = gator.GateLoss(cost, target_ratio=target)
    (_, group) = gated.param_groups(lr=0.1, cost=cost)
    optimizer = torch.optim.SGD([group], momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(graph.num_channels, generator=generator) * 0.05
    for step in range(300):
        gated.gates.settle()
        gated._masks.drawn_NC = gated.gates.sample(32)
        (gate_loss(gated, step / 299) - (importance * gated.mask_NC.mean(0)).sum() * 1e-3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert cost(gated.architecture()) / cost.full == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("progress", [-0.1, 1.1, 19.0, math.nan])
def test_progress_that_is_no_share_is_refused(progress: float) -> None:
    gated, cost = gated_chain()
    with pytest.raises(gator.GateError, match=r"expected the finished share of the gating stage, in \[0, 1\]"):
        gator.GateLoss(cost, target_ratio=0.5).begin_step(gated, progress)


def test_a_model_that_was_evaluated_is_gated_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8))
    gated, gate_loss = gator.GatedModel(model, graph), gator.GateLoss(gator.MacsCost(graph), target_ratio=0.5)
    assert all(module.training for module in gated.modules())
    assert not any(module.training for module in model.modules())
    gated.eval()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(gator.GateError, match=r"is in eval mode, .* call gated.train\(\) first"):
        gate_loss(gated, 0.5)


def test_the_last_selection_tells_equal_gates_apart() -> None:
    gated, cost = gated_chain()  # all start alike, and the stage has one step only
    gate_loss = gator.GateLoss(cost, target_ratio=0.3)
    gate_loss.begin_step(gated, 1.0)
    widths = gated.architecture().widths
    assert 0 < widths["0"] < 4
    assert cost(gated.architecture()) / cost.full == pytest.approx(0.3, abs=0.07)  # ten channels: no step is finer


def test_the_last_selection_ends_nearer_where_channels_are_large() -> None:
    """Each channel is 1.8 % of the target: leaving the last one open would end 1.1 % above it, closing it ends 0.7 % below."""
    model = nn.Sequential(nn.Conv2d(1, 100, 1), nn.ReLU(), nn.Conv2d(100, 2, 1))
    graph = gator.trace(model, torch.zeros(2, 1, 4, 4))
    gated, cost = gator.GatedModel(model, graph), gator.MacsCost(graph)
    gate_loss = gator.GateLoss(cost, target_ratio=0.5539)
    gate_loss.begin_step(gated, 1.0)
    assert gated.architecture().widths["0"] == 55
    assert cost(gated.architecture()) / cost.full == pytest.approx(0.5539, rel=0.01)


def test_the_last_selection_takes_one_round_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round for each channel took minutes on ResNet-50."""
    model = nn.Sequential(nn.Conv2d(3, 400, 1), nn.ReLU(), nn.Conv2d(400, 300, 1), nn.ReLU(), nn.Conv2d(300, 2, 1))
    graph = gator.trace(model, torch.zeros(2, 3, 4, 4))
    gated, cost = gator.GatedModel(model, graph), gator.MacsCost(graph)
    control = gator.GateLoss(cost, target_ratio=0.5).control
    assert control is not None
    rounds = []
    nums_that_fit = control._nums_that_fit
    monkeypatch.setattr(control, "_nums_that_fit", lambda *args: rounds.append(args) or nums_that_fit(*args))
    control._select(gated)
    assert len(rounds) <= len(graph.groups) + 1
    assert cost(gated.architecture()) / cost.full == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("cost_name", COSTS)
def test_channels_that_may_close_are_counted_as_one_by_one(cost_name: str) -> None:
    model = ZOO["basic"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 32, 32))
    gated, cost = gator.GatedModel(model, graph), COSTS[cost_name](graph)
    gates, control = gated.gates, gator.GateLoss(cost, target_ratio=0.5).control
    with torch.no_grad():
        gates.logits_C.copy_(torch.rand(graph.num_channels, generator=torch.Generator().manual_seed(3)))
    gates.close(gates.logits_C < 0.2)
    open_C = gates.open_C()
    order = gates.logits_C.masked_fill(~open_C, torch.inf).argsort(stable=True)
    found = control._nums_that_fit(gates, open_C, order, (0.5, 0.9, 1.0)).tolist()
    costs = []
    for num_closed in range(int(open_C.sum()) + 1):
        left_C = open_C.clone()
        left_C[order[:num_closed]] = False
        costs.append(float(control._cost_at(gates, gates.count(left_C))) / cost.full)
    fits = [
        [share >= ratio * 0.995 for share in costs] for ratio in (0.5, 0.9, 1.0)
    ]  # less the tolerance of the target
    assert found == [max((num for num, does in enumerate(row) if does), default=0) for row in fits]
    assert len(set(found)) == 3 or costs[0] < 0.9


@pytest.mark.parametrize("cost_name", COSTS)
def test_a_written_out_gradient_is_the_derivative(cost_name: str) -> None:
    graph = ZOO["basic"].graph
    cost = COSTS[cost_name](graph)
    widths_NG = torch.rand(3, len(graph.groups), dtype=torch.float64) * 5 + 1
    expected = torch.stack([cost.of(widths_G) for widths_G in widths_NG])
    torch.testing.assert_close(cost.of(widths_NG), expected, rtol=1e-12, atol=0)
    for widths_G in widths_NG.requires_grad_():
        (gradient_G,) = torch.autograd.grad(cost.of(widths_G), widths_G)
        torch.testing.assert_close(cost.relative_gradient(widths_G), gradient_G / cost.full, rtol=1e-12, atol=1e-18)


def test_a_target_may_be_of_another_cost_than_the_pressure() -> None:
    gated, macs = gated_chain()
    memory = gator.MemoryCost(gated.graph)
    with torch.no_grad():
        gated.gates.logits_C.copy_(torch.linspace(1, 5, len(gated.gates.logits_C)))  # an order to close in
    gate_loss = gator.GateLoss(memory, target_ratio=0.5, target_cost=macs)
    gated(torch.randn(4, 3, 8, 8))
    gate_loss(gated, 0.95)  # past the point where what is missing is selected
    # two of four and six of six channels: half the MACs, but eight tenths of the memory
    assert list(gated.architecture().widths.values()) == [2, 6]
    gated(torch.randn(4, 3, 8, 8))
    loss, weight = gate_loss(gated, 1.0), gate_loss.weight_now
    expected = weight * (memory.relative_gradient(gated.kept_widths()) * torch.stack([
        gated.mask_NC.mean(0)[gated.gates.group_C == group].sum() for group in range(len(gated.graph.groups))
    ])).sum()  # fmt: skip
    assert loss.item() == pytest.approx(expected.item())


def test_gradient_of_the_loss_is_that_of_the_cost() -> None:
    gated, cost = gated_chain()
    gated(torch.randn(4, 3, 8, 8))
    widths = gated.kept_widths()
    expected = cost.relative_gradient(widths)
    # C = 64 * 9 * (3 n0 + n0 n1) + 5 n1: dC/dn0 = 576 * (3 + 6), dC/dn1 = 576 * 4 + 5
    assert (expected * cost.full).tolist() == pytest.approx([576 * 9, 576 * 4 + 5])


def test_mixed_cost_is_the_weighted_mean_of_shares() -> None:
    model = ZOO["chain"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8))
    macs, params = gator.MacsCost(graph), gator.ParamsCost(graph)
    half = gator.Architecture.from_keep(graph, {"0": [0, 1], "3": [0, 1, 2]})
    mixed = gator.MixedCost({macs: 3.0, params: 1.0})
    assert mixed(half) == pytest.approx(0.75 * macs(half) / macs.full + 0.25 * params(half) / params.full)
    assert mixed(gator.Architecture.full(graph)) == pytest.approx(1.0)


def test_training_the_gated_network_trains_the_model() -> None:
    model: nn.Module = ZOO["chain"].build()
    gated = gator.GatedModel(model, gator.trace(model, torch.zeros(2, 3, 8, 8))).train()
    before = model[0].weight.clone()
    gated(torch.randn(4, 3, 8, 8)).square().sum().backward()
    torch.optim.SGD(gated.parameters(), lr=0.1).step()
    assert not torch.equal(model[0].weight, before)
    assert model[1].running_mean.abs().sum() > 0
    assert set(dict(model.named_parameters())) == {
        name.removeprefix("network.") for name, _ in gated.network.named_parameters()
    }


def other_gated() -> gator.GatedModel:
    """Return another network under gates than gated_chain()."""
    model = Extreme()
    return gator.GatedModel(model, gator.trace(model, torch.zeros(2, 3, 8, 8)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda cost: gator.GateConfig(init_keep_prob=1.0), "init_keep_prob is 1.0"),
        (
            lambda cost: gator.GateConfig(magnitude_spread=-1.0),
            "magnitude_spread is -1.0, expected a finite number >= 0",
        ),
        (lambda cost: gator.GateLoss(cost), "needs weight, target_ratio or target"),
        (lambda cost: gator.GateLoss(cost, target_ratio=0.0001), "raise the target"),
        (lambda cost: gator.GateLoss(cost, target_ratio=1.5), r"a share in \(0, 1\]"),
        (lambda cost: gator.MixedCost({cost: -1.0}), "weights >= 0"),
        (lambda cost: gated_chain()[0].param_groups(0.1, gate_lr_scale=0.0), "gate_lr_scale is 0.0"),
        (lambda cost: other_gated().param_groups(0.1, cost=cost), "the cost is of a Sequential with fingerprint"),
        (lambda cost: gator.GateLoss(cost, weight=1.0)(other_gated()), "make the cost from the graph of the gated"),
        (lambda cost: gator.aligned(other_gated(), cost, 4), "the cost is of a Sequential with fingerprint"),
        (lambda cost: gator.aligned(gated_chain()[0], cost, 1, 50.0), "target_ratio is 50.0, expected a share"),
    ],
    ids=[
        *("keep probability", "negative spread", "no pressure", "below the reachable", "above one", "negative weight"),
        *("no learning rate", "a rate by another cost", "a loss of another cost", "another cost aligned", "percent"),
    ],
)
def test_bad_settings_are_one_clear_error(make, message: str) -> None:
    _, cost = gated_chain()
    with pytest.raises(gator.GateError, match=message):
        make(cost)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nought": [0]}, "no channel group 'nought'"),
        ({"0": [0, 4]}, "expected 0 to 3"),
        ({"0": [1, 1]}, "channel 1 is given twice"),
        ({"0": []}, "keep at least one"),
    ],
    ids=["unknown group", "out of range", "twice", "empty"],
)
def test_bad_keep_is_one_clear_error(keep: dict[str, list[int]], message: str) -> None:
    _, cost = gated_chain()
    with pytest.raises(gator.ArchitectureError, match=message):
        gator.Architecture.from_keep(cost.graph, keep)


def test_gates_that_are_not_finite_are_refused() -> None:
    gated, _ = gated_chain()
    with torch.no_grad():
        gated.gates.logits_C[:3] = math.nan
    for use in (gated.architecture, gated.prune, lambda: gator.recut(gated)):
        with pytest.raises(gator.GateError, match="the logits of 3 of 10 gates are NaN or infinite"):
            use()


def test_a_target_below_the_reachable_names_the_lowest() -> None:
    _, cost = gated_chain()
    # One channel in each group: C = 64 * 9 * (3 + 1) + 5 of 64 * 9 * (12 + 24) + 30.
    with pytest.raises(gator.GateError, match=f"{(576 * 4 + 5) / (576 * 36 + 30):.4g} remain"):
        gator.GateLoss(cost, target_ratio=0.05)


def test_network_without_a_group_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(
        gator.GateError, match=r"Sequential has no channel group that can be pruned.*output of the model"
    ):
        gator.GatedModel(model, gator.trace(model, torch.zeros(2, 3, 4, 4)))
