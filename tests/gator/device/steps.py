"""Gated training of networks on the stand-in device: `python -m tests.gator.device.steps NAME...` prints a JSON line for each."""

import collections
import contextlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import gator
from tests.gator.device.networks import NETWORKS
from tests.gator.device.stand_in import NAME, StandIn, moved
from tests.gator.law import tensors_of

NUM_STEPS, RECUT_AT = 10, 6
SELECTED_AT = 0.9
"""Progress from which on one step may wait: it selects the last channels."""


def run(name: str) -> dict[str, Any]:
    """Return the most launches of a step, with and without gates, and what steps waited for.

    Raises: RuntimeError where devices mix, AssertionError where pruned and gated networks differ.
    """
    torch.manual_seed(0)
    case = NETWORKS[name]
    network = case.build()
    graph = gator.trace(network, torch.zeros(case.input_shape))  # on the CPU, as every trial does
    inputs = torch.randn(4, *case.input_shape[1:])
    with StandIn() as device:
        inputs = inputs.to(NAME)
        plain = moved(case.build()).train()
        device.reset()
        _loss(plain(inputs)).backward()
        num_plain = sum(device.launches.values())
        run = GatedRun(moved(network), graph, device, inputs)
        run.train(0, RECUT_AT)
        run.evaluate()
        run.recut()
        run.train(RECUT_AT, NUM_STEPS)
        run.evaluate()
    return {"name": name, "plain": num_plain, "gated": run.num_launches, "waits": dict(run.waits)}


class GatedRun:
    """Training of a gated network towards half its MACs, in float32."""

    def __init__(self, network: nn.Module, graph: gator.ChannelGraph, device: StandIn, inputs: Tensor) -> None:
        self.device, self.inputs = device, inputs
        self.gated, self.cost = gator.GatedModel(network, graph), gator.MacsCost(graph)
        with torch.no_grad():
            logits_C = self.gated.gates.logits_C
            logits_C.copy_(torch.linspace(0.1, 3, len(logits_C)).to(NAME))
        groups = self.gated.param_groups(1e-4, 0.2, self.cost)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, foreach=False)
        lowest = gator.gating.loss.lowest_ratio(self.cost)
        self.gate_loss = gator.GateLoss(self.cost, target_ratio=max(0.5, 1.1 * lowest))
        self.num_launches = 0
        self.waits: collections.Counter[str] = collections.Counter()

    def train(self, first: int, last: int) -> None:
        """Train some steps; count launches, those of the optimizer left out."""
        for step in range(first, last):
            progress = step / (NUM_STEPS - 1)
            self.gated.train()
            self.device.reset()
            self.gate_loss.begin_step(self.gated, progress)
            self.gated.seek(epoch=0, position=len(self.inputs) * step)
            (_loss(self.gated(self.inputs)) + self.gate_loss(self.gated)).backward()
            launches = sum(self.device.launches.values())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step > first and progress < SELECTED_AT:  # the first step moves to the device what costs and sites keep
                self.num_launches = max(self.num_launches, launches)
                self.waits += self.device.waits

    def recut(self) -> None:
        """Remove the closed channels in the middle."""
        with contextlib.suppress(gator.GateError):  # a channel shuffle, for one, is traced otherwise once it is cut
            self.gated = gator.recut(self.gated, self.optimizer)

    def evaluate(self) -> None:
        """Prune, compare, align, and estimate statistics again; raise if any of it leaves the device."""
        pruned, gated = self.gated.prune().eval(), self.gated.eval()
        for one, other in zip(tensors_of(pruned(self.inputs)), tensors_of(gated(self.inputs)), strict=True):
            assert float((one - other).abs().max()) <= 1e-3 * float(other.abs().max().clamp(min=1e-6))
        with contextlib.suppress(gator.GateError):  # no narrower network in such steps
            gator.aligned(gated, self.cost, 2, 0.6)
        gated.load_architecture(gated.architecture())
        gator.reestimate_batchnorm(pruned, [self.inputs])
        for module in (gated, pruned):
            assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {NAME}


def _loss(outputs: Any) -> Tensor:
    return sum(part.square().mean() for part in tensors_of(outputs))


def main() -> None:
    """Run the networks that the arguments name."""
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        try:
            row = run(name)
        except Exception as error:
            row = {"name": name, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
