"""A trial that takes a second: made-up images of 8 pixels, a network of four channels, and a session without Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.datasets import splits as datasets
from orchestrator.models import networks as models
from orchestrator.models.saved import save_base
from orchestrator.storage.paths import BasePaths, TrialPaths
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.context import Context
from orchestrator.training.ranks import Ranks
from orchestrator.training.saver import Saver
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.worker import run_assignment

TINY = TrialConfig.model_validate(
    {
        "model": {"name": "resnet8_cifar", "num_classes": 4, "kwargs": {"width": 4}},
        "data": {
            "name": "synthetic",
            "image_size": 8,
            "global_batch_size": 32,
            "num_train": 160,
            "validation_share": 0.2,
        },
        "pretraining": {"epochs": 1, "lr": 0.1},
        "gating": {"epochs": 2, "lr": 0.1, "target_ratio": 0.5},
        "finetuning": {"epochs": 2, "lr": 0.05},
        "evaluation": {"bn_batches": 2, "batch_size": 48},
        "profile": {"batch_sizes": [1, 4], "clock": "model", "num_repeats": 3},
    }
)


def tiny(**values: Any) -> TrialConfig:
    """Return TINY with fields replaced; "__" stands for the dot in a field's name."""
    return with_values(TINY, {name.replace("__", "."): value for name, value in values.items()})


def assign(folder: Path, config: TrialConfig = TINY) -> Assignment:
    """Return the assignment of a trial in a new folder, with config.json and random base weights."""
    base = BasePaths(folder / "base")
    save_base(models.build(config.model), base)
    return Assignment.of(config, name="trial_0000", folder=folder / "trial", base_weights=base.weights)


def context_of(
    config: TrialConfig = TINY, train: Dataset[Any] | None = None, ranks: Ranks | None = None, is_elastic: bool = False
) -> Context:
    """Return a context outside of any trial, which saves nothing; train: images in place of the config's."""
    splits, paths = datasets.load(config.data, config.seed), TrialPaths(Path("nowhere"))
    return Context(
        config=config,
        paths=paths,
        splits=splits if train is None else replace(splits, train=train),
        ranks=ranks or Ranks(),
        saver=Saver(MemorySession(paths.root), every_s=600, stop_file=paths.stop, marker=paths.config),
        is_elastic=is_elastic,
    )


OF_THE_CLOCK = {"timestamp_ms", "train_s", "eval_s", "measure_s"}
"""Metrics that no two trials share."""


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics without those of the clock."""
    return {name: value for name, value in metrics.items() if name not in OF_THE_CLOCK}


def finish(folder: Path) -> tuple[Assignment, "MemorySession", dict[str, Any]]:
    """Run a trial to its end; return its assignment, its session with all checkpoints, and its final metrics."""
    assignment, session = assign(folder), MemorySession(folder / "checkpoints")
    return assignment, session, run_assignment(assignment, session)


class MemorySession:
    """Keeps on disk, like Ray Train, every checkpoint that was reported; starts from one of them."""

    def __init__(self, folder: Path, start_from: Path | None = None) -> None:
        self.ranks = Ranks()
        self.folder = folder
        self.start_from = start_from
        self.reports: list[dict[str, Any]] = []
        self.checkpoints: list[Path] = []
        self.leaving: tuple[str, ...] = ()

    @property
    def is_restart(self) -> bool:
        return self.start_from is not None

    def leaving_nodes(self) -> tuple[str, ...]:
        return self.leaving

    def restore(self) -> Checkpoint | None:
        return None if self.start_from is None else Checkpoint.load(self.start_from, self.ranks.device)

    def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
        kept = self.folder / f"checkpoint_{len(self.checkpoints)}"
        kept.mkdir(parents=True)
        checkpoint.save(kept)
        self.reports.append(metrics)
        self.checkpoints.append(kept)
