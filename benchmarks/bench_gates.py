"""What does a training step cost under gates? Forward, backward and optimizer, beside the same step without gates.

    python -m benchmarks.bench_gates resnet50 resnet56             eager; one thread, CPU seconds
    python -m benchmarks.bench_gates resnet56 --compile            torch.compile on both sides
    python -m benchmarks.bench_gates resnet50 --device cuda        device time and memory, bfloat16, channels_last, batch 256 at 224 px
    python -m benchmarks.bench_gates --render                      write the table, benchmarks/results/gates.md

Variants take turns, a round being one step of each; what is reported is the median over rounds of a variant's time divided by that
of the ungated step of the same round, with the tenth and ninetieth percentile.

    per_sample, per_batch    this project: one mask per group and step, pressure by weight
    target                   as per_sample, with the control towards half the MACs
    half, half_recut         as per_sample with half of each group's channels closed, which the second has cut out
    hooks                    as the paper's code does it: a hook on each side of a convolution, a draw in each, repeated to 4-D
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet50

import gator
from benchmarks.machine import machine
from benchmarks.row_file import RESULTS, RowFile
from gator.gating.gates import HardSigmoid
from orchestrator.config.trial import ModelConfig
from orchestrator.models import networks as models

ROWS = RowFile(RESULTS / "gates.jsonl")
TABLE = RESULTS / "gates.md"
VARIANTS = ("ungated", "per_sample", "per_batch", "target", "half", "half_recut", "hooks")
WARM_UP = 3
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """A network and the batch it trains on."""

    build: Callable[[], nn.Module]
    batch_size: int
    image_size: int
    num_classes: int

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Return random images and labels."""
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        return images.to(device), torch.randint(self.num_classes, (self.batch_size,)).to(device)


def cifar_resnet56() -> nn.Module:
    """Return the CIFAR ResNet-56."""
    return models.build(ModelConfig(name="resnet56_cifar", num_classes=10))


CPU = {"resnet50": Setting(resnet50, 8, 64, 1000), "resnet56": Setting(cifar_resnet56, 32, 32, 10)}
CUDA = {"resnet50": Setting(resnet50, 256, 224, 1000), "resnet56": Setting(cifar_resnet56, 1024, 32, 10)}


class HookGates(nn.Module):
    """Gates as the paper's research code applies them, written anew for this comparison."""

    def __init__(self, network: nn.Module, graph: gator.ChannelGraph) -> None:
        super().__init__()
        self.network = network
        groups = {group.name: group for group in graph.groups}
        self.logits = nn.ParameterList(nn.Parameter(torch.full((g.num_channels,), 5.2933)) for g in graph.groups)
        self.last = [torch.zeros(0)] * len(groups)
        self.weight_G = gator.MacsCost(graph).relative_gradient(
            torch.tensor([float(group.num_channels) for group in graph.groups], dtype=torch.float64)
        )
        number = {group.name: i for i, group in enumerate(graph.groups)}
        modules = dict(network.named_modules())
        starts = {offset: number[name] for name, offset in graph.offsets.items()}
        for site in graph.sites:
            self._hook_output(modules[site.module], starts[int(site.channels[0])])
        for group in graph.groups:
            for layer, side in group.layers:
                if side == "in" and isinstance(modules[layer], nn.Conv2d):
                    self._hook_input(modules[layer], number[group.name])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)

    def loss(self) -> Tensor:
        """Return the cost of what was drawn last."""
        sums = torch.stack([mask.mean(0).sum() for mask in self.last])
        return (sums * self.weight_G.to(sums)).sum()

    def _gate(self, x: Tensor, number: int) -> Tensor:
        noise = torch.logit(torch.rand(x.shape[:2], device=x.device), eps=1e-6)
        self.last[number] = mask = HardSigmoid.apply(self.logits[number] + noise)
        return x * mask[:, :, None, None].repeat(1, 1, *x.shape[2:]).to(x.dtype)

    def _hook_output(self, module: nn.Module, number: int) -> None:
        module.register_forward_hook(lambda _, __, output: self._gate(output, number))

    def _hook_input(self, module: nn.Module, number: int) -> None:
        module.register_forward_pre_hook(lambda _, inputs: (self._gate(inputs[0], number),))


def uniform_half(graph: gator.ChannelGraph) -> gator.Architecture:
    """Return half of each group's channels."""
    return gator.Architecture.from_keep(
        graph, {group.name: range(max(1, group.num_channels // 2)) for group in graph.groups}
    )


def make_step(variant: str, setting: Setting, device: str, is_compiled: bool) -> Step:
    """Return one training step of a variant, as a function."""
    torch.manual_seed(0)
    network = setting.build().to(device)
    images, labels = setting.batch(device)
    if device == "cuda":
        network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    # lr 0: all rounds do the same work, and no weights run away on random labels.
    groups: Any = [{"params": list(network.parameters()), "lr": 0.0, "weight_decay": 1e-4}]
    gate_loss: Callable[[Any], Tensor | float] = lambda _: 0.0  # noqa: E731
    if variant != "ungated":
        graph = gator.trace(copy.deepcopy(network).cpu(), torch.zeros(1, *images.shape[1:]))
    if variant == "hooks":
        network = HookGates(network, graph).to(device)
        groups = [{"params": list(network.parameters()), "lr": 0.0, "weight_decay": 1e-4}]
        gate_loss = HookGates.loss
    elif variant != "ungated":
        cost = gator.MacsCost(graph)
        sampling: Any = "per_batch" if variant == "per_batch" else "per_sample"
        gated = gator.GatedModel(network, graph, gator.GateConfig(sampling=sampling))
        if variant.startswith("half"):
            gated.load_architecture(uniform_half(graph))
        if variant == "half_recut":
            gated = gator.recut(gated)
        towards = gator.GateLoss(cost, target_ratio=0.5)
        gate_loss = partial(towards, progress=0.1) if variant == "target" else gator.GateLoss(cost, weight=1.0)
        groups, network = gated.param_groups(0.0, cost=cost), gated
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    forward = torch.compile(network.train()) if is_compiled else network.train()

    def step() -> None:
        """Train on the batch once more."""
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = cross_entropy(forward(images), labels) + gate_loss(network)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, device: str) -> float:
    """Return how long a step takes: of CPU time on a CPU, of wall time on a device that is waited for."""
    if device == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_gib(step: Step) -> float:
    """Return the largest memory a step takes on the device, everything alive included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(
    name: str, variants: Sequence[str], device: str, is_compiled: bool, num_rounds: int
) -> list[dict[str, Any]]:
    """Return one row for each variant of a network."""
    torch.set_num_threads(1)
    setting = (CPU if device == "cpu" else CUDA)[name]
    memory: dict[str, float] = {}
    steps = {}
    for variant in variants:
        before = 0.0 if device == "cpu" else torch.cuda.memory_allocated() / 2**30
        steps[variant] = make_step(variant, setting, device, is_compiled)
        for _ in range(WARM_UP):
            steps[variant]()
        memory[variant] = 0.0 if device == "cpu" else peak_gib(steps[variant]) - before
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(num_rounds):
        for variant in variants:
            times[variant].append(seconds(steps[variant], device))
    mode = "compiled" if is_compiled else "eager"
    return [
        _row(f"{name} {mode} {device} {variant}", times[variant], times["ungated"], memory[variant])
        for variant in variants
    ]


def _row(name: str, times: list[float], ungated: list[float], gib: float) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(times, ungated, strict=True)]
    deciles = statistics.quantiles(ratios, n=10)
    return {
        "model": name,
        "ms": round(1e3 * statistics.median(times), 1),
        "ratio": round(statistics.median(ratios), 3),
        "p10": round(deciles[0], 3),
        "p90": round(deciles[-1], 3),
        "n": len(times),
        "gib": round(gib, 2),
        "machine": machine("torch"),
    }


def render() -> None:
    """Write the table."""
    lines = [
        "# What a training step costs under gates",
        "",
        "`python -m benchmarks.bench_gates resnet50 resnet56`, then `--compile`. Forward, backward and SGD; one thread, CPU time, variants "
        "in turns; the ratio is the median over n rounds of gated / ungated, p10 and p90 beside it. ResNet-50: 64 px, batch 8; CIFAR "
        "ResNet-56: 32 px, batch 32; float32. The machine was shared: the spread between p10 and p90 is that of its other work, and rows "
        "move with it: compiled, per sample, 25, 40 and 60 rounds gave 1.073, 0.996 and 1.043, the last of which is in the table. "
        "A ratio's base is the ungated step of its own rounds; the ungated row is the last run's. "
        "`--device cuda` has not been run on a GPU yet.",
        "",
        "| network | mode | device | variant | ms | / ungated | p10 | p90 | n | GiB | measured on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS.read().values():
        network, mode, device, variant = row["model"].split()
        gib = row["gib"] or "-"
        lines.append(
            f"| {network} | {mode} | {device} | {variant.replace('_', ' ')} | {row['ms']} | {row['ratio']:.3f} | {row['p10']:.3f} | "
            f"{row['p90']:.3f} | {row['n']} | {gib} | {row['machine']} |"
        )
    TABLE.write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark's command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[[], *CPU])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="timed steps of each variant (25)")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    arguments = parser.parse_args(argv)
    for name in arguments.networks:
        variants = ["ungated", *(variant for variant in arguments.variants if variant != "ungated")]
        for row in measure(name, variants, arguments.device, arguments.compile, arguments.rounds):
            ROWS.write(row)
            print(
                f"{row['model']}: {row['ms']} ms, {row['ratio']} of ungated ({row['p10']} to {row['p90']})", flush=True
            )
    if arguments.render:
        render()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
