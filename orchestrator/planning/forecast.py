"""Forecast of the GPU-hours of a search before anything has run: from MACs, images and epochs."""

from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig

ASSUMED_TFLOPS = 20.0
"""Assumed throughput of a GPU during training, in 10**12 floating-point operations per second; not measured."""
MAX_IMAGES_PER_S = 20_000
"""Assumed limit for networks so small that the GPU waits for images and kernel launches; not measured."""
FLOPS_PER_MAC = 6
"""Two operations per MAC, three times: forward, and backward to the inputs and to the weights."""
GATED_FACTOR = 1.5
"""Time of a step under gates divided by one without; between 1.05 (a CPU) and 1.9 (a GPU, eager, broadcast masks)."""
TEACHER_FACTOR = 4 / 3
"""Time of a step with a teacher divided by one without: the teacher's forward pass is added."""


def gpu_hours_text(config: SearchConfig, epochs_per_trial: float) -> str:
    """Return the forecast as a sentence, with what it assumes.

    epochs_per_trial: epochs of the average trial, early stopping included.
    """
    from orchestrator.datasets import splits as datasets
    from orchestrator.models import (
        networks as models,  # late: torch takes seconds to import, and --help should not wait for it
    )

    base = config.base
    num_images = datasets.num_train(base.data)
    if num_images is None:
        return "GPU-hours: unknown, since the data is not on this machine; set base.data.num_train to the number of training images"
    macs = models.count_macs(base.model, base.data.image_size)
    hours = gpu_hours(config, epochs_per_trial, macs, num_images)
    return (
        f"about {_rounded(hours)} GPU-hours at {images_per_s(macs):,.0f} images/s of the unpruned network (assumed: "
        f"{ASSUMED_TFLOPS:g} TFLOP/s and at most {MAX_IMAGES_PER_S:,} images/s); pruned networks train faster"
    )


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def images_per_s(macs: int) -> float:
    """Return how many images per second a GPU is assumed to train on, given the network's MACs."""
    return min(ASSUMED_TFLOPS * 1e12 / (FLOPS_PER_MAC * macs), MAX_IMAGES_PER_S)


def gpu_hours(config: SearchConfig, epochs_per_trial: float, macs: int, num_images: int) -> float:
    """Return the GPU-hours of the base network, all trials and all baselines, each counted as if it were unpruned.

    macs: MACs per image.    num_images: training images, the held-out share included.
    """
    base = config.base
    trial_factor = _mean_factor(base)
    baselines = len(config.baselines) * base.num_epochs * _finetuning_factor(base)
    epochs = base.pretraining.epochs + config.search.num_trials * epochs_per_trial * trial_factor + baselines
    return epochs * num_images * (1 - base.data.holdout) / images_per_s(macs) / 3600


def _mean_factor(base: TrialConfig) -> float:
    """Return the mean cost of a trial's epoch relative to an epoch of plain training, over gating and fine-tuning."""
    finetuning = base.finetuning.epochs * _finetuning_factor(base)
    return (base.gating_epochs * GATED_FACTOR + finetuning) / base.num_epochs


def _finetuning_factor(base: TrialConfig) -> float:
    return TEACHER_FACTOR if base.finetuning.distillation.weight > 0 else 1.0
