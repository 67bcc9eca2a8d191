"""The channels that a baseline keeps and the images that it gets."""

from bisect import bisect_left

import torch

import gator
from gator.pruning.baselines import baseline
from orchestrator.config.trial import DataConfig, TrialConfig
from orchestrator.errors import ConfigError
from orchestrator.models import networks as models


def choose(config: TrialConfig, network: torch.nn.Module, macs: gator.MacsCost) -> gator.Architecture:
    """Return what a plain choice keeps of the network. Raises: GateError if it cannot cost so little."""
    pruning = config.pruning
    if pruning.choice == "smaller_image":
        return gator.Architecture.full(macs.graph)
    assert pruning.choice != "gates", pruning
    assert pruning.macs_ratio is not None, pruning
    return baseline(pruning.choice, network, macs, pruning.macs_ratio, seed=config.seed)


def data_of(config: TrialConfig) -> DataConfig:
    """Return the data as the trial sees it: smaller images where that is the choice."""
    if not config.sees_smaller_images:
        return config.data
    assert config.pruning.macs_ratio is not None, config.pruning
    return config.data.model_copy(update={"image_size": smaller_size(config, config.pruning.macs_ratio)})


def smaller_size(config: TrialConfig, macs_ratio: float) -> int:
    """Return the height and width, in pixels, at which the unpruned network costs nearest to a share of its MACs.

    Raises: ConfigError if the network cannot take images of another size.
    """
    full_size = config.data.image_size
    target = macs_ratio * _macs_at(config, full_size)
    # Half a side costs a quarter, up to the rounding in strides, so sizes far below that are not tried.
    sizes = range(max(1, int(full_size * macs_ratio**0.5 * 0.5)), full_size + 1)
    first = bisect_left(sizes, target, key=lambda size: _macs_at(config, size))
    near = [sizes[place] for place in (first - 1, first) if 0 <= place < len(sizes)]
    return min(near, key=lambda size: abs(_macs_at(config, size) - target))


def _macs_at(config: TrialConfig, image_size: int) -> int:
    try:
        return models.count_macs(config.model, image_size)
    except ConfigError as error:
        raise ConfigError(f"baselines: smaller_image cannot be made ({error}); leave it out") from error
