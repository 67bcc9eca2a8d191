"""The plain choices that a search trains beside its trials: at which size, for how long, and what each keeps.

A baseline is a trial with pruning.choice other than gates. It runs through the same worker as the trials and has a row of
its own kind, but never stands on the front. Its multiply-adds are those of the best trial, and it trains for as many epochs:
what the trial, and the trials that it goes on from, spend on gating is fine-tuning here.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import torch

import gator
from gator.baselines import baseline
from orchestrator import models, pareto
from orchestrator.config import Baseline, DataConfig, SearchConfig, TrialConfig, with_values
from orchestrator.errors import ConfigError
from orchestrator.pareto import Row
from orchestrator.paths import TrialPaths


def reference(config: SearchConfig, rows: Sequence[Row]) -> Row | None:
    """Return the trial that baselines are compared with; None as long as none has finished.

    It is the most accurate of the front (best in the first objective); where the constraints leave no front, the smallest.
    """
    if front := pareto.front(rows, config.objectives, config.constraints):
        return front[0]
    return min(pareto.candidates(rows, config.objectives, ()), key=lambda row: row["macs"], default=None)


def config_of(kind: Baseline, trial: TrialConfig, macs_ratio: float) -> TrialConfig:
    """Return the config of a baseline that is to cost as much and train as long as the trial.

    macs_ratio: what the trial has come to, as in its row.
    """
    return with_values(
        trial,
        {
            "pruning.choice": kind,
            "pruning.macs_ratio": macs_ratio,
            "pruning.align": 1,
            "finetuning.epochs": epochs_of(trial),
        },
    )


def epochs_of(trial: TrialConfig) -> int:
    """Return the epochs that a trial's network has had since the base network: its own, and its ancestors' as far as it took them over."""
    num_epochs, folder = trial.num_epochs, trial.gating.start_from
    while folder is not None:
        paths = TrialPaths(Path(folder))
        is_cut = not paths.config.is_file()  # before the fine-tuning of the trial whose folder it lies in
        config = (TrialPaths(paths.root.parent) if is_cut else paths).config
        ancestor = TrialConfig.model_validate_json(config.read_bytes())
        num_epochs += ancestor.gating_epochs if is_cut else ancestor.num_epochs
        folder = ancestor.gating.start_from
    return num_epochs


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
    if config.pruning.choice != "smaller_image":
        return config.data
    assert config.pruning.macs_ratio is not None, config.pruning
    return config.data.model_copy(update={"image_size": smaller_size(config, config.pruning.macs_ratio)})


def smaller_size(config: TrialConfig, macs_ratio: float) -> int:
    """Return the height and width, in pixels, at which the unpruned network costs nearest to a share of its multiply-adds.

    Raises: ConfigError if the network takes no images of another size.
    """
    full_size = config.data.image_size
    target = macs_ratio * _macs_at(config, full_size)
    # Half a side costs a quarter, up to the rounding in strides, so sizes far below that need no try.
    sizes = range(max(1, int(full_size * macs_ratio**0.5 * 0.5)), full_size + 1)
    first = bisect_left(sizes, target, key=lambda size: _macs_at(config, size))
    near = [sizes[place] for place in (first - 1, first) if 0 <= place < len(sizes)]
    return min(near, key=lambda size: abs(_macs_at(config, size) - target))


def _macs_at(config: TrialConfig, image_size: int) -> int:
    try:
        return models.count_macs(config.model, image_size)
    except ConfigError as error:
        raise ConfigError(f"baselines: smaller_image cannot be made ({error}); leave it out") from error
