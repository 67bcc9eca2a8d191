"""Accuracy, counted exactly, and BatchNorm's statistics, estimated again before a network is judged."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import gator
from orchestrator.config.trial import TrialConfig
from orchestrator.datasets.loading import load_batches, random_batches
from orchestrator.datasets.seeds import mix_seed, seed_everything
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.context import Context
from orchestrator.training.loaders import num_samples
from orchestrator.training.ranks import Ranks


def reestimate_batchnorm(network: nn.Module, context: Context) -> None:
    """Replace BatchNorm's statistics by those of the current weights, the same on every rank.

    Leaves the network in eval mode. The running statistics lag behind weights that move fast, differ between ranks, and
    under gates belong to sampled masks.
    """
    batches = calibration_batches(context.splits.train, context.config, context.ranks.device)
    gator.reestimate_batchnorm(network, batches)


def calibration_batches(dataset: Dataset[Any], config: TrialConfig, device: torch.device) -> Iterator[Tensor]:
    """Yield batches of training images for BatchNorm's statistics: the same on every rank and after every epoch."""
    seed_everything(config.seed, "calibration", 0, 0)  # for augmentation, which draws from the global generators
    batches = random_batches(
        dataset,
        num_batches=config.evaluation.bn_batches,
        batch_size=config.evaluation.batch_size,
        seed=mix_seed(config.seed, "calibration", 0, 0),
    )
    for images, _ in load_batches(dataset, batches, device=device, num_loader_workers=config.data.num_loader_workers):
        yield images


def evaluate(network: nn.Module, dataset: Dataset[Any], config: TrialConfig, ranks: Ranks) -> EpochMetrics:
    """Return top1 and top5 in percent over the whole split, each image counted once; leaves the network in eval mode.

    The ranks deal out whole batches, so that an image meets the same neighbours, and the same rounding, whatever the
    number of ranks: the counts are those of one process alone.
    """
    correct = ranks.sum(count_correct(network, dataset, config, ranks))
    top1, top5 = (100 * correct.double() / num_samples(dataset)).tolist()
    return {"top1": top1, "top5": top5}


@torch.inference_mode()
def count_correct(network: nn.Module, dataset: Dataset[Any], config: TrialConfig, ranks: Ranks) -> Tensor:
    """Return (2,) int64: how many of this rank's images have their label first, and among the first five."""
    network.eval()
    num_images, size = num_samples(dataset), config.evaluation.batch_size
    batches = [list(range(start, min(start + size, num_images))) for start in range(0, num_images, size)]
    correct = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    shares = batches[ranks.rank :: ranks.world_size]
    num_workers = config.data.num_loader_workers
    for images, labels in load_batches(dataset, shares, device=ranks.device, num_loader_workers=num_workers):
        logits = network(images)
        answers = logits.topk(min(5, logits.shape[1])).indices
        is_hit = answers == labels[:, None]
        correct += torch.stack([is_hit[:, 0].sum(), is_hit.sum()])
    return correct
