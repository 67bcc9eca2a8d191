"""What the accuracy benchmarks share: data, the unpruned network of a seed, training, top-1."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gator
from benchmarks.row_file import PROJECT, locked
from orchestrator.config.trial import CONFIG_FIELDS, Stage, TrialConfig, with_values
from orchestrator.datasets import splits as datasets
from orchestrator.models import networks as models
from orchestrator.storage.paths import TrialPaths
from orchestrator.training.context import Context
from orchestrator.training.evaluation import evaluate, reestimate_batchnorm
from orchestrator.training.loop import Training
from orchestrator.training.ranks import Ranks
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.gating_stage import GatedSteps

CACHE = PROJECT / "runs" / "bench_accuracy"


@dataclass(frozen=True)
class Lab:
    """What the cells of one seed share."""

    config: TrialConfig

    @cached_property
    def splits(self) -> datasets.DataSplits:
        """The training, held-out and test images."""
        return datasets.load(self.config.data, self.config.seed)

    @cached_property
    def base(self) -> nn.Module:
        """The unpruned network that all cells start from, in eval mode."""
        torch.manual_seed(self.config.seed)
        network = models.build(self.config.model)
        self.once(f"base-{self.config.base_hash()}", network, lambda: self.train(network, "pretrain", self.config))
        return network.eval()

    @cached_property
    def graph(self) -> gator.ChannelGraph:
        """The channel groups of the network."""
        return gator.trace(self.base, torch.zeros(1, *self.splits.input_shape))

    @cached_property
    def macs(self) -> gator.MacsCost:
        """MACs of an image."""
        return gator.MacsCost(self.graph)

    def once(self, name: str, network: nn.Module, train: Callable[[], None]) -> None:
        """Give the network the weights that an earlier cell left under this name, or train it and leave them."""
        path = CACHE / f"{name}.safetensors"
        with locked(CACHE / f"{name}.lock"):  # another process may be training it: wait and read
            if not path.exists():
                train()
                weights = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
                save_file(weights, new := path.with_suffix(".new"))
                new.replace(path)
                return
        network.load_state_dict(load_file(path))

    def context(self, config: TrialConfig) -> Context:
        """Return what a training is done with; nothing is saved."""
        return Context(config=config, paths=TrialPaths(Path("nowhere")), splits=self.splits, ranks=Ranks(), saver=None)

    def train(
        self, network: nn.Module, stage: Stage, config: TrialConfig, *, after_backward: Any = None, **options: Any
    ) -> None:
        """Train for all epochs of a stage; options: those of orchestrator.training.loop.Training."""
        config = with_values(config, {"training.channels_last": True})  # a quarter less time on CPUs
        training = Training(network, stage, self.context(config), **options)
        num_epochs = getattr(config, CONFIG_FIELDS[stage]).epochs
        if after_backward is not None:
            training.optimizer.register_step_pre_hook(lambda *_: after_backward())
        for epoch in range(num_epochs):
            began = time.process_time()
            loss = training.run_epoch(epoch)
            print(
                f"  {stage} {epoch + 1}/{num_epochs} loss {loss:.3f} {time.process_time() - began:.0f} cpu s",
                flush=True,
            )

    def gated(self, config: TrialConfig) -> tuple[gator.GatedModel, GatedSteps]:
        """Return a copy of the unpruned network under new gates, and their part of the training steps."""
        gating = config.gating
        gate_config = gator.GateConfig(
            init_keep_prob=gating.init_keep_prob,
            magnitude_spread=gating.magnitude_spread,
            curvature=gating.curvature,
            seed=config.seed,
        )
        gated = gator.GatedModel(copy.deepcopy(self.base), self.graph, gate_config)
        return gated, GatedSteps(gated, TrialCosts(config, self.graph, torch.device("cpu")))

    def top1(self, network: nn.Module, images: datasets.ImageDataset | None = None) -> float:
        """Return the percentage of images (the test images) that the network gets right, BatchNorm's statistics re-estimated."""
        context = self.context(self.config)
        reestimate_batchnorm(network, context)
        return evaluate(network, images or self.splits.test, self.config, context.ranks)["top1"]

    def finetune(self, network: nn.Module, epochs: int) -> nn.Module:
        """Train the pruned network in place, and return it."""
        config = with_values(self.config, {"finetuning.epochs": epochs})
        self.train(network, "finetune", config)
        return network


def count_macs(network: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Return the MACs that one image takes."""
    network.eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *input_shape))
    return counter.get_total_flops() // 2
