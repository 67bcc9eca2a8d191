"""How many kernels does a training step launch under gates, and what does it keep for its backward pass, beside a plain step?

    python -m benchmarks.bench_launches                        all networks, in minutes on one core; needs no GPU
    python -m benchmarks.bench_launches --render               write the table, benchmarks/results/launches.md

Counted in float32 on the stand-in device of tests/gator/device, in eager mode, with a target and masks per sample. Views and empty
tensors are left out. Added to both sides: SGD as OPTIMIZER launches, and what autocast adds in bfloat16, a cast of each weight
of a convolution or linear layer forward and backward; to the gated side also one of each mask that no batch normalisation applies.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torchvision.models as vision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gator
from benchmarks.machine import machine
from benchmarks.row_file import RESULTS, RowFile, source_hash
from gator.gating import gated_norm
from gator.gating.sites import GatedBatchNorm
from orchestrator.config.trial import ModelConfig
from orchestrator.models import networks as models
from tests.gator.device.stand_in import NAME, StandIn, StandInTensor, moved

ROWS, TABLE = RowFile(RESULTS / "launches.jsonl"), RESULTS / "launches.md"
OPTIMIZER = 15
"""Launches of SGD over lists of tensors, as on CUDA, where the stand-in device runs a loop."""
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (vision.resnet50, 64),
    "resnet56_cifar": (lambda: models.build(ModelConfig(name="resnet56_cifar", num_classes=10)), 32),
    "mobilenet_v2": (vision.mobilenet_v2, 64),
    "vit_b_16": (vision.vit_b_16, 224),
    "convnext_tiny": (vision.convnext_tiny, 64),
}
"""Name -> network and pixels of an image: few, as launches do not depend on them."""


class Saved:
    """Bytes that a forward pass keeps for backward, parameters and buffers left out."""

    def __init__(self, network: nn.Module) -> None:
        self._own = {
            t.raw.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers()) if hasattr(t, "raw")
        }
        self._held: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept."""
        raw = tensor.raw if isinstance(tensor, StandInTensor) else tensor
        address = raw.untyped_storage().data_ptr()
        if address not in self._own:
            self._held[address] = raw
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of all storages that are kept."""
        return sum(raw.untyped_storage().nbytes() for raw in self._held.values())


def measure(name: str) -> dict[str, Any]:
    """Return the launches and the bytes of a plain step and of a gated one."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    network = build()
    graph = gator.trace(network, torch.zeros(1, 3, size, size))
    num_casts = 2 * sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in network.modules())
    with StandIn() as device:
        images, labels = torch.randn(2, 3, size, size).to(NAME), torch.randint(0, 10, (2,)).to(NAME)
        network = moved(network).train()
        gated = gator.GatedModel(network, graph).train()
        cost = gator.MacsCost(graph)
        gated.divide_gradient_by(cost)
        gate_loss = gator.GateLoss(cost, target_ratio=0.5)

        def step(model: nn.Module, progress: float | None) -> dict[str, int]:
            device.reset()
            saved = Saved(model)
            if progress is not None:
                gate_loss.begin_step(gated, progress)
                gated.seek(epoch=0, position=0)
            control = sum(device.launches.values())
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
                loss = cross_entropy(model(images), labels)
                loss = loss if progress is None else loss + gate_loss(gated)
            forward = sum(device.launches.values()) - control
            loss.backward()
            launches, waits = sum(device.launches.values()), sum(device.waits.values())
            with torch.no_grad():  # the optimizer's step, after which nothing that a step has kept holds
                gated.gates.logits_C.sub_(1e-3)
            model.zero_grad()
            return {
                "launches": launches,
                "control": control,
                "forward": forward,
                "bytes": saved.num_bytes,
                "waits": waits,
            }

        plain = [step(network, None) for _ in range(2)][-1]
        steps = [step(gated, progress) for progress in (0.2, 0.21, 0.22)][-1]
        with patch.object(gated_norm, "RECOMPUTED_BYTES", 0):
            large = step(gated, 0.23)
    plain["launches"] += OPTIMIZER + num_casts
    num_masks_cast = len(graph.sites) - sum(isinstance(module, GatedBatchNorm) for module in gated.network.modules())
    for gated_step in (steps, large):
        gated_step["launches"] += OPTIMIZER + num_casts + 2 * num_masks_cast
    return {
        "model": name,
        "source": source_hash(__file__),
        "channels": graph.num_channels,
        "sites": len(graph.sites),
        "plain": plain,
        "gated": steps,
        "large": large,
        "machine": machine(),
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    plain, gated, large = row["plain"], row["gated"], row["large"]
    return (
        f"| {row['model']} | {row['channels']:,} | {row['sites']} | {plain['launches']:,} | {gated['launches']:,} | "
        f"{gated['launches'] / plain['launches']:.2f} | {gated['control']} | {gated['waits']} | {gated['bytes'] / plain['bytes']:.2f} | "
        f"{large['launches'] / plain['launches']:.2f} | {large['bytes'] / plain['bytes']:.2f} |"
    )


def render() -> None:
    """Write the table."""
    rows = ROWS.read()
    head = (
        "# Kernels that a gated training step launches\n\n"
        "`python -m benchmarks.bench_launches`, then `--render`. Counted, not timed, on a device that stands in for "
        "CUDA: eager mode, a target, masks per sample; bytes saved for backward in float32. "
        "One step each, which repeats exactly. The last two columns are those of large images and batches, whose normalised values are "
        "computed again in the backward pass (gator.gating.gated_norm.RECOMPUTED_BYTES). Nothing here ran on a GPU.\n\n"
        "| network | channels | sites | plain | gated | gated / plain | of these control | host waits | saved bytes, gated / plain "
        "| large: gated / plain | large: saved bytes |\n"
        f"|{' --- |' * 11}\n"
    )
    TABLE.write_text(head + "".join(line(rows[name]) + "\n" for name in NETWORKS if name in rows))


def main() -> None:
    """Measure the networks without a row of this source, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=250.0, help="start no network after so many")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.render:
        render()
    else:
        ROWS.fill(ROWS.missing(arguments.names, source_hash(__file__)), arguments.seconds, measure, line)


if __name__ == "__main__":
    main()
