"""The batches that a rank trains on."""

from typing import Any

from torch.utils.data import Dataset

from orchestrator.config.trial import DataConfig, Stage
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.seeds import mix_seed
from orchestrator.errors import ConfigError
from orchestrator.training.context import Context


def check_batches(data: DataConfig, num_images: int | None, num_ranks: int, *, is_elastic: bool) -> None:
    """Raise ConfigError if the ranks cannot share a global batch evenly, or the images do not fill one.

    num_images: None where the number is unknown.    is_elastic: see Context.
    """
    batch_size = data.global_batch_size
    if num_ranks > batch_size or (batch_size % num_ranks and not is_elastic):
        raise ConfigError(
            f"data.global_batch_size is {batch_size}, expected a multiple of the {num_ranks} workers of a trial; change it "
            "or the cluster's workers_per_trial"
        )
    if num_images is not None and num_images < batch_size:
        raise ConfigError(
            f"data set {data.name!r} has {num_images} images to train on once data.validation_share is taken out, expected at least "
            f"data.global_batch_size = {batch_size}; lower it or data.validation_share, or raise data.num_train"
        )


def make_loader(stage: Stage, context: Context) -> TrainLoader:
    """Return this rank's batches of the training split: step by step, the ranks' batches make up one global batch.

    Rank r holds every world_size-th image of the epoch's order, from the r-th on. Images that do not fill a global batch
    are left out.    Raises: as check_batches does.
    """
    data, ranks, dataset = context.config.data, context.ranks, context.splits.train
    check_batches(data, num_samples(dataset), ranks.world_size, is_elastic=context.is_elastic)
    return TrainLoader(
        dataset,
        global_batch_size=data.global_batch_size,
        seed=mix_seed(context.config.seed, stage),
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
        num_loader_workers=data.num_loader_workers,
    )


def num_samples(dataset: Dataset[Any]) -> int:
    """Return the length of a map-style data set; torch's Dataset does not promise one."""
    return len(dataset)  # type: ignore[arg-type]
