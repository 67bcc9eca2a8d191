"""TrialConfig: everything that a trial depends on, one class for each section of `base` in a search space.

Every object is frozen, refuses unknown keys, and is the same after a round trip through JSON: the resolved SearchConfig is saved
as search.json before the first step, each TrialConfig as config.json, and that file alone is enough to repeat the run.
orchestrator/planning/space.py reads the YAML.

    SearchConfig ── base: TrialConfig ── model, data, pretraining, gating (cost), pruning, finetuning, training, evaluation, profile
                 ── params: {"gating.loss_weight": FloatDomain(...), ...}   what the search varies
                 ── objectives, constraints, search, scheduler
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, field_validator, model_validator

from orchestrator.config.base import (
    Config,
    Count,
    Float,
    Int,
    Location,
    SavedConfig,
    Seed,
    Weight,
    absolute_path,
    differences,
    none_word,
)
from orchestrator.errors import ConfigError

Baseline = Literal["uniform", "random", "magnitude", "smaller_image"]
"""The baselines that a search may train to compare its trials with; see PruningConfig."""


def _is_file_name(weights: str | None) -> bool:
    return weights is not None and weights.endswith(".safetensors") and "://" not in weights


class ModelConfig(Config):
    """The network to prune."""

    name: str
    """A torchvision classifier (resnet50), a CIFAR ResNet (resnet20_cifar), or package.module:function."""
    weights: Annotated[Location | None, BeforeValidator(none_word)] = None
    """Source of the weights: torchvision (DEFAULT, its best, or a name such as IMAGENET1K_V1), a .safetensors file with a
    state dict, or none (random)."""
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the weights file: the file must have it. It is filled in when a space is read; base networks are distinguished by it."""
    num_classes: Count
    """Outputs of the classifier."""
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of the model's function, such as {width: 8} for a CIFAR ResNet."""

    @model_validator(mode="after")
    def _digest_is_of_a_file(self) -> Self:
        if self.weights_sha256 is not None and not _is_file_name(self.weights):
            raise ValueError(f"weights_sha256 is for a .safetensors file, found weights {self.weights}; remove it")
        return self

    def with_digest(self) -> Self:
        """Return the config with the SHA-256 of its weights file, if this machine sees one. Raises: ConfigError if it has another."""
        if self.weights is None or not _is_file_name(self.weights) or not Path(self.weights).is_file():
            return self
        with open(self.weights, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self.weights_sha256 not in (None, found):
            raise ConfigError(
                f"model.weights: {self.weights} has the SHA-256 {found}, expected {self.weights_sha256} (model.weights_sha256); put "
                "the earlier file back, or start another search with the new one"
            )
        return self.model_copy(update={"weights_sha256": found})

    def seen_from(self, other: "ModelConfig") -> Self:
        """Return the config as one for the weights of another one: the file's path does not matter where both have its digest.

        A config of an earlier version has no digest, and gets the other one's.
        """
        name = "weights_sha256" if self.weights_sha256 is None else "weights"
        known = other.weights_sha256 is not None
        return self.model_copy(update={name: getattr(other, name)} if known else {})


class DataConfig(Config):
    """The images, and how they are split and batched."""

    name: str
    """A data set that orchestrator.datasets knows: digits, fashion_mnist, cifar10, synthetic, or one in files (docs/data.md)."""
    train: Location | None = None
    """Folder of the training images, also s3://... or gs://..., or files in it named by `*`; none if the data set has a default folder."""
    test: Location | None = None
    """Folder of the test images, likewise; they are used once, at the end."""
    image_size: Count
    """Height and width in pixels of the network's input."""
    global_batch_size: Count
    """Training images per optimizer step, summed over all workers."""
    validation_share: Annotated[Float, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images that is held out as the validation split: for the accuracy after each epoch, and for selection."""
    num_train: Annotated[Int, Field(ge=2)] | None = None
    """Number of training images to use, the held-out ones included; none for all."""
    augment: bool = False
    """Shift each training image at random, by up to an eighth of its size, and mirror half of cifar10's; images in files: a
    random crop, and a flip."""
    trivial_augment: bool = False
    """Images in files: one more random change of each training image, as in TrivialAugment (arXiv 2103.10158)."""
    mixup: Weight = 0.0
    """Images in files: Mixup alpha (arXiv 1710.09412); 0 disables Mixup."""
    cutmix: Weight = 0.0
    """Images in files: CutMix alpha (arXiv 1905.04899); 0 disables CutMix. With mixup, each batch gets one of the two."""
    start_size: Count | None = None
    """Images in files: size of the training images in the first epoch of a stage; none for image_size throughout."""
    full_size_epoch: Annotated[Int, Field(ge=0)] = 0
    """Epoch of a stage, counted from 0, from which training images have image_size; until then they grow in steps of 32 pixels."""
    shuffle_buffer: Count = 2048
    """parquet, hf_parquet, webdataset: size in images of a worker's shuffle buffer; row groups are shuffled as well."""
    num_loader_workers: Annotated[Int, Field(ge=0)] = 0
    """Loader processes per worker; 0 loads in the worker itself."""
    cache: Location | None = None
    """Folder on each node's own disk for copies of what is read from an object store; none reads from the store each time."""
    cache_gb: Annotated[Float, Field(gt=0)] = 200.0
    """Size of the cache in GB (10^9 bytes); the copies that were used longest ago make room; image_folder copies what fits."""
    image_column: str | None = None
    """hf_parquet: the column of the images; none for the only one that can be it."""
    label_column: str | None = None
    """hf_parquet: the column of the labels, likewise."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        wanted = [
            name
            for name in ("trivial_augment", "mixup", "cutmix", "start_size")
            if getattr(self, name) not in (False, 0, None)
        ]
        if wanted and not self.augment:
            raise ValueError(f"{', '.join(wanted)} without augment; set augment: true")
        if (self.start_size is None) != (self.full_size_epoch == 0):
            raise ValueError("start_size and full_size_epoch belong together; set both or none")
        if self.start_size is not None and self.start_size > self.image_size:
            raise ValueError(f"start_size {self.start_size} exceeds image_size {self.image_size}")
        return self


class StageConfig(Config):
    """One stage of training: SGD with momentum, a warm-up and a schedule."""

    epochs: Annotated[Int, Field(ge=0)]
    """Passes over the training images; 0 leaves the stage out."""
    lr: Annotated[Float, Field(gt=0)]
    """Learning rate after the warm-up, for the whole global batch."""
    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Weight = 1e-4
    """L2 penalty of SGD, on every parameter."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """lr after the warm-up; cosine falls to zero at the end of the stage."""
    warmup_epochs: Weight = 0.0
    """Epochs, also fractions of one, in which lr rises linearly from zero."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} exceeds epochs {self.epochs}")
        return self


class CostConfig(Config):
    """Weights of the terms of the cost; each term is divided by its value for the full network."""

    macs: Weight = 1.0
    """Weight of the MACs of one image."""
    params: Weight = 0.0
    """Weight of the number of parameters."""
    memory: Weight = 0.0
    """Weight of the activation memory of one image."""
    latency: Weight = 0.0
    """Weight of the milliseconds that profile.latency_table predicts for one forward pass."""

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        *names, last = type(self).model_fields
        if not any(self.model_dump().values()):
            raise ValueError(f"{', '.join(names)} and {last} are all zero; at least one must be positive")
        return self


class GatingConfig(StageConfig):
    """The stage in which gates are learned together with the weights. It needs loss_weight, a target, or both."""

    epochs: Count
    """Passes over the training images under gates."""
    schedule: Literal["constant", "cosine"] = "constant"
    """lr after the warm-up; gates only keep closing if it does not fall to zero."""
    loss_weight: Annotated[Float, Field(gt=0)] | None = None
    """Pressure to close channels: the weight of the cost in the loss. With a target it is the upper limit of the pressure."""
    target_ratio: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Share of the full cost at which channels stop closing; none lets them close until the stage ends."""
    target_of: Literal["cost", "macs"] = "cost"
    """What target_ratio is a share of: gating.cost, or the MACs, whatever gating.cost is."""
    target_ms: Annotated[Float, Field(gt=0)] | None = None
    """Target in milliseconds by profile.latency_table, instead of target_ratio; the cost is then latency alone."""
    cost: CostConfig = CostConfig()
    """The cost that gates are pressed to reduce."""
    init_keep_prob: Annotated[Float, Field(gt=0.5, lt=1)] = 0.995
    """Initial keep probability of every channel; with magnitude_spread, of a channel with the mean L1 norm of its group."""
    magnitude_spread: Annotated[Float, Field(ge=0)] = 0.0
    """Initial gate logit offset per unit of relative L1 norm; 0 initialises all gates equally, larger values start small channels
    closer to closing."""
    curvature: Annotated[Float, Field(ge=0)] = 1.0
    """Share of the second-order term in the gates' gradient: what closing a channel costs by its squared gradients. 0 is the paper's."""
    sampling: Literal["per_sample", "per_batch"] = "per_sample"
    """One mask per image, or one for all images of a step on a worker, which is cheaper and noisier."""
    gate_lr_scale: Annotated[Float, Field(gt=0)] = 0.2
    """Learning rate of the gates as a multiple of lr."""
    recut_every: Count | None = None
    """Epochs between removals of closed channels from the network, which makes training faster; none removes them at the end only.

    The results stay the same, up to rounding. A removal takes about as long as tracing the network.
    """
    start_from: Annotated[str, AfterValidator(absolute_path)] | None = None
    """Folder of a finished trial of the same network to start from, such as runs/digits/trials/trial_0003, or its subfolder `cut`.

    This stage starts with the network and gates of that trial; the cost remains a share of the unpruned network's cost.
    """

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_ms is None:
            return self
        if self.target_ratio is not None:
            raise ValueError(
                f"target_ratio {self.target_ratio:g} and target_ms {self.target_ms:g} are both set; set one"
            )
        if self.target_of != "cost":
            raise ValueError(f"target_of {self.target_of} is for target_ratio; target_ms is a target of the latency")
        if self.cost != CostConfig(macs=0, latency=self.cost.latency or 1):
            raise ValueError("target_ms needs a cost in milliseconds: set cost to {macs: 0, latency: 1}")
        return self


class DistillationConfig(Config):
    """Distillation: the pruned network also learns from the outputs of the unpruned one. Off by default."""

    weight: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Share of the distillation loss in the total loss; the rest is the loss on the labels."""
    temperature: Annotated[Float, Field(gt=0)] = 4.0
    """Divisor of both networks' logits; larger values give the less likely classes more weight."""


class FinetuningConfig(StageConfig):
    """The stage in which the pruned network recovers."""

    distillation: DistillationConfig = DistillationConfig()
    """The unpruned network as a teacher; adds its forward pass to each step."""
    ema_decay: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Decay of the running mean of the weights, which is what is evaluated and saved; each step replaces 1 - ema_decay of it.

    0 uses the weights themselves.
    """


class PruningConfig(Config):
    """What is pruned between gating and fine-tuning."""

    choice: Literal["gates"] | Baseline = "gates"
    """gates learns which channels to keep. The others are baselines, which skip gating and are only fine-tuned.

    uniform keeps the same share of every channel group, random and magnitude remove channels from any group; smaller_image
    keeps the whole network and feeds it smaller images.
    """
    macs_ratio: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Share of the unpruned network's MACs that a baseline has; gates use gating.target_ratio."""
    round_to: Literal[1, 4, 8, 16, 32, "auto"] = 1
    """Round the widths that gates have learned to multiples of this when the network is pruned, within the target.

    auto finds for each group by how many channels it must shrink to get faster, from profile.latency_table or else on the device.
    """

    @model_validator(mode="after")
    def _ratio_is_for_plain_choices(self) -> Self:
        if (self.choice == "gates") != (self.macs_ratio is None):
            raise ValueError(
                f"choice {self.choice} and macs_ratio {self.macs_ratio} do not fit: gates use gating.target_ratio, every "
                "other choice needs macs_ratio"
            )
        if self.choice != "gates" and self.round_to != 1:
            raise ValueError(
                f"round_to {self.round_to} goes by the gates' probabilities; choice {self.choice} has none"
            )
        return self


class TrainingConfig(Config):
    """How training steps are computed and how often they are saved, in all stages; results stay the same, up to rounding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the layers; auto is bfloat16 (autocast) on GPUs that support it, else float32. Weights stay float32."""
    channels_last: bool | None = None
    """Whether images and weights are stored channels-last; none for on GPUs only."""
    compile: bool = False
    """Whether steps run under torch.compile: minutes at the start of each stage, for faster epochs on GPUs."""
    micro_batch_size: Count | None = None
    """Images per forward pass and worker; a worker's share of the global batch is accumulated from them. none for all at once."""
    checkpoint_every_s: Annotated[Float, Field(gt=0)] = 600.0
    """Seconds between checkpoints within an epoch, in addition to the one at its end: what a lost worker costs at most, give or take
    20 steps."""


class EvaluationConfig(Config):
    """How accuracy is measured; the same for all trials."""

    bn_batches: Count = 8
    """Training batches from which BatchNorm statistics are re-estimated before every evaluation."""
    batch_size: Count = 256
    """Images per forward pass and worker, here and in the re-estimation."""


class ProfileConfig(Config):
    """How latency is measured; the same for all trials."""

    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    """Images per forward pass. The first size is reported as latency_ms, each other one as latency_ms_b<size>."""
    clock: Literal["wall", "model"] = "wall"
    """wall times the network on the device; model computes latency from MACs, without a clock, for deterministic runs."""
    runtime: Literal["auto", "eager", "compile", "cuda_graph", "onnxruntime", "tensorrt"] = "auto"
    """What runs the networks that are timed: PyTorch (eager, compile, cuda_graph), or the exported file by ONNX Runtime, on a GPU
    also through its provider of TensorRT. auto is cuda_graph on GPUs, else eager."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Precision of the networks that are timed; accuracy is taken in float32. auto is float16 on GPUs, else float32; onnxruntime
    runs float32, tensorrt float32 or float16."""
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Memory layout of the images and weights that are timed; auto is channels_last on GPUs, else contiguous, which onnxruntime
    and tensorrt take."""
    num_repeats: Count = 100
    """Timed forward passes."""
    num_threads: Count = 1
    """CPU threads of a forward pass."""
    latency_table: Annotated[str, AfterValidator(absolute_path)] | None = None
    """File that `orchestrator measure` wrote for the network and the first batch size."""
    table_device: str | None = None
    """Name of the device of latency_table, as the table states it, if networks are trained and timed on another one; dtype, runtime
    and threads may then differ too."""

    @model_validator(mode="before")
    @classmethod
    def _mode_is_now_runtime(cls, values: Any) -> Any:
        if isinstance(values, dict) and "mode" in values:
            raise ValueError(f"mode is now called runtime; write runtime: {values['mode']}")
        return values

    @model_validator(mode="after")
    def _runtime_has_it(self) -> Self:
        dtypes = {"onnxruntime": ("auto", "float32"), "tensorrt": ("auto", "float32", "float16")}.get(self.runtime)
        if dtypes is not None and self.dtype not in dtypes:
            raise ValueError(f"dtype {self.dtype} with runtime {self.runtime}; expected {' or '.join(dtypes)}")
        if dtypes is not None and self.layout == "channels_last":
            raise ValueError(
                f"layout channels_last with runtime {self.runtime}, which chooses its own; set layout: auto"
            )
        return self

    @field_validator("batch_sizes")
    @classmethod
    def _distinct(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(sizes)) < len(sizes):
            raise ValueError("expected every batch size once")
        return sizes


class TrialConfig(SavedConfig):
    """Everything that a trial depends on."""

    model: ModelConfig
    """The network that is pruned, and its weights."""
    data: DataConfig
    """The images, and how they are read."""
    pretraining: StageConfig = StageConfig(epochs=0, lr=0.1)
    """Training of the base network, once for all trials; skipped by default, for models with weights."""
    gating: GatingConfig
    """Training with gates: what closes channels, and how far."""
    pruning: PruningConfig = PruningConfig()
    """How the network is pruned after gating."""
    finetuning: FinetuningConfig
    """Training of the pruned network."""
    training: TrainingConfig = TrainingConfig()
    """Settings of all stages: precision, compilation, checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How accuracy is measured."""
    profile: ProfileConfig = ProfileConfig()
    """How latency is measured."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images, the gates' noise and the held-out split."""

    @model_validator(mode="after")
    def _base_is_trained(self) -> Self:
        if self.model.weights is None and self.pretraining.epochs == 0:
            raise ValueError(
                "the base network would be random: set model.weights (DEFAULT or a file), or pretraining.epochs above 0"
            )
        return self

    @model_validator(mode="after")
    def _latency_is_known(self) -> Self:
        gating = self.gating
        if (gating.target_ms is not None or gating.cost.latency > 0) and self.profile.latency_table is None:
            raise ValueError(
                "gating.target_ms and gating.cost.latency read profile.latency_table; set it to a table's file"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if self.num_epochs == 0:
            raise ValueError(f"pruning.choice {self.pruning.choice} leaves gating out; set finetuning.epochs above 0")
        return self

    @property
    def has_gates(self) -> bool:
        """Whether gates learn which channels are kept."""
        return self.pruning.choice == "gates"

    @property
    def sees_smaller_images(self) -> bool:
        """Whether the whole network is kept and gets smaller images."""
        return self.pruning.choice == "smaller_image"

    @property
    def gating_epochs(self) -> int:
        """Epochs under gates; 0 if channels are chosen without them."""
        return self.gating.epochs if self.has_gates else 0

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole trial, gating and fine-tuning together."""
        return self.gating_epochs + self.finetuning.epochs

    def refused_changes(self, wanted: Self) -> list[str]:
        """Return the differences that make it another training; the path of a weights file whose SHA-256 is known does not."""
        return differences(self.model_copy(update={"model": self.model.seen_from(wanted.model)}), wanted)

    def base_hash(self) -> str:
        """Return 16 hex digits that name the base network: the same for configs that start from the same one.

        A weights file counts by its content, once its SHA-256 is known; the images count by their path.
        """
        parts = self.model_dump(mode="json", include={"model", "data", "pretraining", "seed"})
        if (digest := parts["model"].pop("weights_sha256")) is not None:
            parts["model"]["weights"] = f"sha256:{digest}"
        for field in (
            "test",
            "num_loader_workers",
            "cache",
            "cache_gb",
        ):  # they do not affect the base network's weights
            del parts["data"][field]
        options = ("trivial_augment", "mixup", "cutmix", "start_size", "full_size_epoch", "shuffle_buffer")
        for field in (*options, "image_column", "label_column"):
            if (
                parts["data"][field] == DataConfig.model_fields[field].default
            ):  # base networks from before they were options
                del parts["data"][field]
        if self.training.precision != "auto":
            parts["precision"] = self.training.precision
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def with_values(trial: TrialConfig, values: Mapping[str, Any]) -> TrialConfig:
    """Return the config with the fields of the given dotted names replaced; all checks run again.

    Raises: pydantic.ValidationError if a value does not fit its field, KeyError if a name is not a field.

    >>> with_values(trial, {"gating.loss_weight": 0.3}).gating.loss_weight   # doctest: +SKIP
    0.3
    """
    tree = trial.model_dump()
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if leaf not in node:
            raise KeyError(name)
        node[leaf] = value
    return TrialConfig.model_validate(tree)


Stage = Literal["pretrain", "gate", "finetune"]
CONFIG_FIELDS: dict[Stage, str] = {"pretrain": "pretraining", "gate": "gating", "finetune": "finetuning"}
