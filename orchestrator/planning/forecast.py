"""What a search will cost in GPU-hours, before anything has run: from multiply-adds, images and epochs."""

from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig

ASSUMED_TFLOPS = 20.0
"""What a GPU is taken to sustain while it trains, in 10**12 floating-point operations a second; not measured."""
MAX_IMAGES_PER_S = 20_000
"""Of a network so small that a GPU waits for its images and its launches; not measured either."""
FLOPS_PER_MAC = 6
"""Two for a multiply-add, three times: forward, and backward to the inputs and to the weights."""
GATED_FACTOR = 1.5
"""A step under gates beside one without; between 1.05 (a CPU) and 1.9 (a GPU, eager, broadcast masks)."""
TEACHER_FACTOR = 4 / 3
"""A step with a teacher, whose forward pass it waits for."""


def gpu_hours_text(config: SearchConfig, epochs_per_trial: float) -> str:
    """Return the forecast as a sentence, with what it assumes.

    epochs_per_trial: of the average trial, as early stopping leaves them.
    """
    from orchestrator.datasets import splits as datasets
    from orchestrator.models import (
        networks as models,  # late: torch takes seconds to import, and --help should not wait for it
    )

    base = config.base
    num_images = datasets.num_train(base.data)
    if num_images is None:
        return "GPU-hours are not known: the data is not on this machine; base.data.num_train may tell its size"
    macs = models.count_macs(base.model, base.data.image_size)
    hours = gpu_hours(config, epochs_per_trial, macs, num_images)
    return (
        f"about {_rounded(hours)} GPU-hours at {images_per_s(macs):,.0f} images/s of the unpruned network: an assumption, of "
        f"{ASSUMED_TFLOPS:g} TFLOP/s and at most {MAX_IMAGES_PER_S:,} images/s; pruned networks train faster"
    )


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def images_per_s(macs: int) -> float:
    """Return how many images a GPU is taken to train on in a second, by the network's multiply-adds."""
    return min(ASSUMED_TFLOPS * 1e12 / (FLOPS_PER_MAC * macs), MAX_IMAGES_PER_S)


def gpu_hours(config: SearchConfig, epochs_per_trial: float, macs: int, num_images: int) -> float:
    """Return the hours of one GPU for the base network, all trials and all baselines, each as costly as unpruned.

    macs: multiply-adds of an image.    num_images: to train on, before the held-out share is taken off.
    """
    base = config.base
    trial_factor = _mean_factor(base)
    baselines = len(config.baselines) * base.num_epochs * _finetuning_factor(base)
    epochs = base.pretraining.epochs + config.search.num_trials * epochs_per_trial * trial_factor + baselines
    return epochs * num_images * (1 - base.data.holdout) / images_per_s(macs) / 3600


def _mean_factor(base: TrialConfig) -> float:
    """Return what an epoch of a trial costs beside a plain one, over gating and fine-tuning."""
    finetuning = base.finetuning.epochs * _finetuning_factor(base)
    return (base.gating_epochs * GATED_FACTOR + finetuning) / base.num_epochs


def _finetuning_factor(base: TrialConfig) -> float:
    return TEACHER_FACTOR if base.finetuning.distillation.weight > 0 else 1.0
