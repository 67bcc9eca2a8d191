"""Forecast of the GPU-hours of a search before anything has run: from MACs, images and epochs."""

from orchestrator.config.search import SearchConfig

ASSUMED_TFLOPS = 20.0
"""Assumed throughput of a GPU during training, in 10**12 floating-point operations per second; not measured."""
MAX_IMAGES_PER_S = 20_000
"""Assumed limit for networks so small that the GPU waits for images; not measured."""
LAUNCH_S = 5e-6
"""Assumed seconds of a kernel launch, which bounds the step of a small network; not measured."""
LAUNCHES_PER_TENSOR = 3.5
"""Kernels of a plain step for each parameter tensor: 531 for the 161 of ResNet-50; see benchmarks/results/launches.md."""
FLOPS_PER_MAC = 6
"""Two operations per MAC, three times: forward, and backward to the inputs and to the weights."""
GATED_FACTOR = 1.5
"""Time of a step under gates divided by one without, where the GPU computes; between 1.05 (a CPU) and 1.9 (a GPU, eager)."""
GATED_LAUNCHES = 2.1
"""Kernels of a step under gates divided by those of one without, of ResNets; 3.8 of transformers."""
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
        return "GPU-hours: unknown, since the training images were not counted; set base.data.num_train to their number"
    macs = models.count_macs(base.model, base.data.image_size)
    num_tensors = models.num_parameter_tensors(base.model)
    hours = gpu_hours(config, epochs_per_trial, macs, num_tensors, num_images)
    plain_speed = images_per_s(macs, num_tensors, base.data.global_batch_size)
    return (
        f"about {_rounded(hours)} GPU-hours at {plain_speed:,.0f} images/s of the unpruned network (assumed: {ASSUMED_TFLOPS:g} TFLOP/s, "
        f"{LAUNCH_S * 1e6:g} us a kernel and at most {MAX_IMAGES_PER_S:,} images/s); pruned networks train faster"
    )


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def images_per_s(macs: int, num_tensors: int, batch_size: int, *, is_gated: bool = False) -> float:
    """Return how many images per second a GPU is assumed to train on.

    macs: of the network, per image.    num_tensors: its parameter tensors, each of which takes kernels in a step.
    """
    compute_s = batch_size * FLOPS_PER_MAC * macs / (ASSUMED_TFLOPS * 1e12) * (GATED_FACTOR if is_gated else 1)
    launches_s = LAUNCH_S * LAUNCHES_PER_TENSOR * num_tensors * (GATED_LAUNCHES if is_gated else 1)
    return min(batch_size / max(compute_s, launches_s), MAX_IMAGES_PER_S)


def gpu_hours(config: SearchConfig, epochs_per_trial: float, macs: int, num_tensors: int, num_images: int) -> float:
    """Return the GPU-hours of the base network, all trials and all baselines, each counted as if it were unpruned.

    macs, num_tensors: see images_per_s.    num_images: training images, the held-out share included.
    """
    base, size = config.base, config.base.data.global_batch_size
    epoch_images = num_images * (1 - base.data.validation_share)
    plain_s = epoch_images / images_per_s(macs, num_tensors, size)
    gated_s = epoch_images / images_per_s(macs, num_tensors, size, is_gated=True)
    finetuning_s = plain_s * (TEACHER_FACTOR if base.finetuning.distillation.weight > 0 else 1.0)
    trial_epoch_s = (base.gating_epochs * gated_s + base.finetuning.epochs * finetuning_s) / base.num_epochs
    trials_s = config.search.num_trials * epochs_per_trial * trial_epoch_s
    baselines_s = len(config.baselines) * base.num_epochs * finetuning_s
    return (base.pretraining.epochs * plain_s + trials_s + baselines_s) / 3600
