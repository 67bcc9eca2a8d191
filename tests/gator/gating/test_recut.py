"""Cutting in the middle of gated training changes nothing but the time it takes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import gator
from tests.gator.gating.test_gating_laws import small_network
from tests.gator.law import close
from tests.gator.zoo import ZOO, randomised

STEPS = 8
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}  # float64 through eight steps, sums in another order; 1e-13 was seen


class Run:
    """A network in gated training in float64, whose gates close one after another."""

    def __init__(self, model: nn.Module, make_optimizer: str = "SGD", **gate_loss: float) -> None:
        self.model = model.double()
        self.graph = gator.trace(self.model, torch.zeros(2, 3, 16, 16, dtype=torch.float64))
        self.gated = gator.GatedModel(self.model, self.graph, gator.GateConfig(init_keep_prob=0.6)).double().train()
        with torch.no_grad():
            count = self.graph.num_channels
            order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
            self.gated.gates.logits_C.copy_(torch.linspace(0.05, 0.6, count)[order])
        self.cost = gator.MacsCost(self.graph)
        self.gate_loss = gator.GateLoss(self.cost, **gate_loss)
        groups = self.gated.param_groups(lr=0.02, gate_lr_scale=5.0, cost=self.cost)
        options = {"momentum": 0.9} if make_optimizer == "SGD" else {}
        self.optimizer = getattr(torch.optim, make_optimizer)(groups, **options)

    def train(self, first: int, last: int) -> list[float]:
        """Train from one step to another and return the losses."""
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
            labels = torch.randint(5, (4,), generator=generator)
            loss = cross_entropy(self.gated(images), labels) + self.gate_loss(self.gated, step / STEPS)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


def test_the_settings_of_a_step_stay() -> None:
    run = Run(small_network(), weight=1.0)
    run.gated.samples_per_step, run.gated.loss_scale = 64.0, 8.0
    cut = gator.recut(run.gated, run.optimizer)
    assert (cut.samples_per_step, cut.loss_scale) == (64.0, 8.0)


def by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a plain network's tensors."""
    return dict(module.state_dict())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("gate_loss", [{"weight": 1.0}, {"target_ratio": 0.3}], ids=["by weight", "towards a target"])
def test_recutting_changes_nothing(gate_loss: dict[str, float], optimizer: str) -> None:
    whole, cut = (Run(small_network(), optimizer, **gate_loss) for _ in range(2))
    losses = whole.train(0, STEPS)
    cut_losses = []
    for first in range(0, STEPS, 2):
        cut_losses += cut.train(first, first + 2)
        cut.gated = gator.recut(cut.gated, cut.optimizer)
    whole.gated.gates.settle()  # as the last re-cut did, and the next forward pass would
    remaining = sum(len(kept) for kept in cut.gated.built_architecture().keep.values())
    assert 0 < remaining < whole.graph.num_channels
    assert cut_losses == pytest.approx(losses, rel=1e-9)
    assert cut.gated.architecture() == whole.gated.architecture()
    assert_close(by_name(cut.gated.prune()), by_name(whole.gated.prune()), **TOLERANCE)
    logits = whole.gated.gates.logits_C[cut.gated.gates.origin_C]
    assert_close(cut.gated.gates.logits_C, logits, **TOLERANCE)


def test_the_smaller_network_runs_fewer_macs_and_costs_refer_to_the_unpruned_one() -> None:
    run = Run(small_network(), weight=1.0)
    run.train(0, STEPS)
    small = gator.recut(run.gated, run.optimizer)
    assert small.architecture() == run.gated.architecture()
    assert run.cost.of(small.kept_widths()) == run.cost(small.architecture()) < 0.8 * run.cost.full
    expected = gator.prune(run.model, run.graph, small.built_architecture())
    shapes = {name: p.shape for name, p in expected.named_parameters()}
    assert {name: p.shape for name, p in small.network.named_parameters()} == shapes


@pytest.mark.parametrize("name", ["basic", "bottleneck", "depthwise", "dense", "squeeze", "group norm", "whole groups"])
def test_every_kind_of_network_is_the_same_after_a_recut(name: str) -> None:
    case = ZOO[name]
    model = randomised(case.build()).double()
    graph = gator.trace(model, torch.zeros(case.input_shape, dtype=torch.float64))
    gated = gator.GatedModel(model, graph).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gated.gates.logits_C.copy_(torch.randn(graph.num_channels, generator=generator) - 0.3)
    small = gator.recut(gated)
    inputs = torch.randn(case.input_shape, dtype=torch.float64, generator=generator)
    assert small.gates.origin_C.numel() < graph.num_channels
    for network in (gated, small):
        network.seek(epoch=1, position=7)
        network.train()
    assert close(small(inputs), gated(inputs))  # the same noise for the same channels
    assert torch.equal(small.mask_NC, gated.mask_NC[:, small.gates.origin_C])
    assert close(small.eval()(inputs), gated.eval()(inputs))
    assert close(small.prune().eval()(inputs), gated.prune().eval()(inputs))


@pytest.mark.parametrize("num_heads", [1, 2])
def test_channels_that_a_removed_block_had_locked_stay(num_heads: int) -> None:
    layer = nn.TransformerEncoderLayer(8, num_heads, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 3)).double()
    inputs = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(model, inputs)
    assert graph.by_name["0.self_attn"].num_channels == num_heads
    gated = gator.GatedModel(model, graph).train()
    gated.load_architecture(gator.Architecture.from_keep(graph, {"0.self_attn": [], "0.linear1": [1, 2, 7]}))
    small = gator.recut(gated)
    assert {group.name for group in small.body.graph.groups} - {group.name for group in graph.groups}
    again = gator.recut(small)
    for network in (small, again, small.prune(), again.prune()):
        assert close(network.eval()(inputs), gated.eval()(inputs))
    assert small.architecture() == again.architecture() == gated.architecture()


def test_a_network_of_whole_numbers_is_cut() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    tokens = torch.arange(6).view(2, 3)
    gated = gator.GatedModel(model, graph := gator.trace(model, tokens)).eval()
    gated.load_architecture(gator.Architecture.from_keep(graph, {"0": [1, 4], "1": [0, 3, 5]}))
    assert close(gator.recut(gated).eval()(tokens), gated(tokens))


def test_a_checkpoint_of_a_recut_run_goes_on() -> None:
    run = Run(small_network(), target_ratio=0.3)
    run.train(0, 4)
    run.gated = gator.recut(run.gated, run.optimizer)
    built, states = (
        run.gated.built_architecture(),
        [copy.deepcopy(part.state_dict()) for part in (run.gated, run.optimizer, run.gate_loss)],
    )
    expected = run.train(4, STEPS)
    again = Run(small_network(), target_ratio=0.3)
    again.gated = gator.recut(again.gated, again.optimizer, built)
    for part, state in zip((again.gated, again.optimizer, again.gate_loss), states, strict=True):
        part.load_state_dict(state)
    again.gated.seek(epoch=0, position=4 * 4)
    assert again.train(4, STEPS) == pytest.approx(expected, rel=1e-12)


def test_a_checkpoint_of_before_the_line_of_the_cost_is_read() -> None:
    gate_loss = Run(small_network(), target_ratio=0.3).gate_loss
    earlier = {**gate_loss.state_dict(), "control._extra_state": True, "control.last_progress": torch.tensor(0.75)}
    gate_loss.load_state_dict(earlier)
    assert gate_loss.state_dict()["control._extra_state"] == {"has_selected": True, "last_progress": 0.75}


def test_what_was_cut_out_cannot_be_opened_again() -> None:
    run = Run(small_network(), weight=1.0)
    run.train(0, STEPS)
    small = gator.recut(run.gated, run.optimizer)
    with pytest.raises(gator.ArchitectureError, match=r"keeps \d+ channels that a re-cut has removed"):
        small.load_architecture(gator.Architecture.full(run.graph))
