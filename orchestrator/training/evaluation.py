"""exact accuracy; BatchNorm re-estimated"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import gator
from orchestrator.config.trial import TrialConfig
from orchestrator.datasets import splits as datasets
from orchestrator.datasets.loading import load_batches, random_batches
from orchestrator.datasets.seeds import mix_seed, seed_everything
from orchestrator.storage.records import EpochMetrics
from orchestrator.training.loaders import num_samples
from orchestrator.training.ranks import Ranks


def reestimate_batchnorm(network: nn.Module, config: TrialConfig, splits: datasets.DataSplits, ranks: Ranks) -> None:
    """Replace BatchNorm's statistics by those of the current weights, the same on every rank.

    Leaves the network in eval mode. The running statistics lag behind weights that move fast, differ between ranks, and
    under gates belong to sampled masks.
    """
    evaluation = config.evaluation
    batches = calibration_batches(
        splits.train,
        num_batches=evaluation.bn_batches,
        batch_size=evaluation.batch_size,
        seed=config.seed,
        device=ranks.device,
        num_loader_workers=config.data.num_loader_workers,
    )
    gator.reestimate_batchnorm(network, batches)


def accuracy_of(network: nn.Module, split: datasets.ImageDataset, config: TrialConfig, ranks: Ranks) -> EpochMetrics:
    """Return the metrics top1 and top5 over the whole split; leaves the network in eval mode."""
    accuracy = evaluate(
        network,
        split,
        batch_size=config.evaluation.batch_size,
        ranks=ranks,
        num_loader_workers=config.data.num_loader_workers,
    )
    return vars(accuracy)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of a split in percent: the label is the network's first answer, or among its first five."""

    top1: float
    top5: float


def calibration_batches(
    dataset: Dataset[Any],
    *,
    num_batches: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    num_loader_workers: int = 0,
) -> Iterator[Tensor]:
    """Yield batches of training images for BatchNorm's statistics: the same on every rank and after every epoch."""
    seed_everything(seed, "calibration", 0, 0)  # for augmentation, which draws from the global generators
    batches = random_batches(
        dataset, num_batches=num_batches, batch_size=batch_size, seed=mix_seed(seed, "calibration", 0, 0)
    )
    for images, _ in load_batches(dataset, batches, device=device, num_loader_workers=num_loader_workers):
        yield images


@torch.inference_mode()
def evaluate(
    network: nn.Module, dataset: Dataset[Any], *, batch_size: int, ranks: Ranks, num_loader_workers: int = 0
) -> Accuracy:
    """Return the accuracy over the whole split, each image counted once; leaves the network in eval mode.

    The ranks deal out whole batches, so that an image meets the same neighbours, and the same rounding, whatever the
    number of ranks: the counts are those of one process alone.
    """
    correct = ranks.sum(
        count_correct(network, dataset, batch_size=batch_size, ranks=ranks, num_loader_workers=num_loader_workers)
    )
    top1, top5 = (100 * correct.double() / num_samples(dataset)).tolist()
    return Accuracy(top1=top1, top5=top5)


@torch.inference_mode()
def count_correct(
    network: nn.Module, dataset: Dataset[Any], *, batch_size: int, ranks: Ranks, num_loader_workers: int = 0
) -> Tensor:
    """Return (2,) int64: how many of this rank's images have their label first, and among the first five."""
    network.eval()
    num_images = num_samples(dataset)
    batches = [list(range(start, min(start + batch_size, num_images))) for start in range(0, num_images, batch_size)]
    correct = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    shares = batches[ranks.rank :: ranks.world_size]
    for images, labels in load_batches(dataset, shares, device=ranks.device, num_loader_workers=num_loader_workers):
        logits = network(images)
        answers = logits.topk(min(5, logits.shape[1])).indices
        is_hit = answers == labels[:, None]
        correct += torch.stack([is_hit[:, 0].sum(), is_hit.sum()])
    return correct
