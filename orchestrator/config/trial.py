"""The typed configuration of a trial and of a search.

Every object is frozen, refuses unknown keys, and goes through JSON unchanged: the resolved SearchConfig is saved as
search.json before the first step, each TrialConfig as config.json, and that file alone repeats the run.
orchestrator/planning/space.py reads the YAML.

    SearchConfig ── base: TrialConfig ── model, data, pretraining, gating (cost), pruning, finetuning, training, evaluation, profile
                 ── params: {"gating.loss_weight": FloatDomain(...), ...}   what the search varies
                 ── objectives, constraints, search, scheduler
"""

import hashlib
import json
from collections.abc import Mapping
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
    _absolute,
    _none_word,
)

Baseline = Literal["uniform", "random", "magnitude", "smaller_image"]
"""The plain choices that a search may train beside its trials; see PruningConfig."""


class ModelConfig(Config):
    """The network to prune."""

    name: str
    """A torchvision classifier (resnet50), a CIFAR ResNet (resnet20_cifar), or package.module:function."""
    weights: Annotated[Location | None, BeforeValidator(_none_word)] = None
    """Where the weights come from: torchvision (DEFAULT, its best, or a name such as IMAGENET1K_V1), a .safetensors file with a
    state dict, or none (random)."""
    num_classes: Count
    """Outputs of the classifier."""
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of the model's function, such as {width: 8} for a CIFAR ResNet."""


class DataConfig(Config):
    """The images, and how they are split and batched."""

    name: str
    """A data set that orchestrator.datasets knows: digits, fashion_mnist, cifar10, image_folder, parquet, synthetic."""
    train: Location | None = None
    """Folder of the training images, for parquet also s3://... or gs://...; none where the data set knows its own place."""
    val: Location | None = None
    """Folder of the validation images, likewise."""
    image_size: Count
    """Height and width of an image in pixels, as the network sees it."""
    global_batch_size: Count
    """Training images per optimizer step, over all workers together."""
    holdout: Annotated[Float, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images kept apart for the accuracy after each epoch and for selection.

    val is touched once, at the end.
    """
    num_train: Annotated[Int, Field(ge=2)] | None = None
    """Use only so many training images, the held-out ones included; none for all."""
    augment: bool = False
    """Shift each training image at random, by up to an eighth of its size, and mirror half of cifar10's; image_folder, parquet: a
    random crop, and a flip."""
    trivial_augment: bool = False
    """image_folder, parquet: one further random change of each training image, as TrivialAugment (arXiv 2103.10158) has it."""
    mixup: Weight = 0.0
    """image_folder, parquet: mix pairs of training images, with so large an alpha (arXiv 1710.09412); 0 does not."""
    cutmix: Weight = 0.0
    """image_folder, parquet: paste a part of another training image (arXiv 1905.04899). With mixup, each batch has one of both."""
    start_size: Count | None = None
    """image_folder, parquet: size of the training images in the first epoch of a stage; none for image_size throughout."""
    full_size_epoch: Annotated[Int, Field(ge=0)] = 0
    """Epoch of a stage, counted from 0, from which on training images have image_size; they grow until then by steps of 32."""
    shuffle_buffer: Count = 2048
    """parquet: images of one worker among which the order is drawn image by image, beside the order of the row groups."""
    num_loader_workers: Annotated[Int, Field(ge=0)] = 0
    """Loader processes per worker; 0 loads in the worker itself."""

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
    """How lr goes on after the warm-up: cosine falls to zero at the end of the stage."""
    warmup_epochs: Weight = 0.0
    """Epochs, or a part of one, in which lr rises linearly from zero."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the cross-entropy."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} exceeds epochs {self.epochs}")
        return self


class CostConfig(Config):
    """Weights of the parts of the cost; each part is divided by its value for the full network."""

    macs: Weight = 1.0
    """Weight of the multiply-adds of one image."""
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
    """The stage in which gates are learned with the weights. It needs loss_weight or a target, or both."""

    epochs: Count
    """Passes over the training images with gates."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How lr goes on after the warm-up; gates that shall go on closing need a lr that does not fall."""
    loss_weight: Annotated[Float, Field(gt=0)] | None = None
    """Pressure to close channels: the cost's weight in the loss. With a target it is the largest pressure."""
    target_ratio: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Share of the full cost at which closing stops; none closes as long as the stage lasts."""
    target_of: Literal["cost", "macs"] = "cost"
    """What target_ratio is a share of: gating.cost, or the multiply-adds whatever the pressure is on."""
    target_ms: Annotated[Float, Field(gt=0)] | None = None
    """The same in milliseconds of profile.latency_table, instead of target_ratio; the cost is then latency alone."""
    cost: CostConfig = CostConfig()
    """What the pressure is on."""
    init_keep_prob: Annotated[Float, Field(gt=0.5, lt=1)] = 0.995
    """Keep probability of every channel at the start; with magnitude_spread, of a channel of mean size."""
    magnitude_spread: Annotated[Float, Field(ge=0)] = 0.0
    """How much nearer to closing the gate of a channel with small weights starts: its logit, for each mean of its group less."""
    sampling: Literal["per_sample", "per_batch"] = "per_sample"
    """A mask for each image, or one for all images of a step on one worker, which is cheaper and noisier."""
    gate_lr_scale: Annotated[Float, Field(gt=0)] = 0.2
    """Learning rate of the gates as a multiple of lr."""
    recut_every: Count | None = None
    """Epochs after which channels that have closed leave the network, which then trains faster; none for at the end only.

    The numbers stay the same, to rounding. A re-cut takes about as long as tracing the network.
    """
    start_from: Annotated[str, AfterValidator(_absolute)] | None = None
    """Folder of a finished trial of the same network, such as runs/digits/trials/trial_0003, or its cut, to go on from.

    Its network and its gates are where this stage starts; the cost remains a share of the unpruned network's.
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
    """What the pruned network learns from the answers of the unpruned one, beside the labels. Off by default."""

    weight: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Share of the loss that is the distance to the unpruned network's answers; the labels have the rest."""
    temperature: Annotated[Float, Field(gt=0)] = 4.0
    """Both networks' logits are divided by it first; larger values show more of what lies behind the first answer."""


class FinetuningConfig(StageConfig):
    """The stage in which the pruned network recovers."""

    distillation: DistillationConfig = DistillationConfig()
    """The unpruned network as a teacher; costs its forward pass in each step."""
    ema_decay: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """The network that is judged and saved has the weights' running mean, of which each step replaces 1 - ema_decay.

    0 takes the weights as they are.
    """


class PruningConfig(Config):
    """What is cut between gating and fine-tuning."""

    choice: Literal["gates"] | Baseline = "gates"
    """gates learns what to keep. The others are the plain baselines; they leave gating out and are fine-tuned only.

    uniform keeps the same share of every channel group, random and magnitude close channels anywhere; smaller_image keeps
    the whole network and shows it smaller images.
    """
    macs_ratio: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Share of the unpruned network's multiply-adds that a plain choice is to cost; gates have gating.target_ratio."""
    align: Literal[1, 8, 16, 32, "auto"] = 1
    """Bring the widths that gates have come to, at the cut, to multiples of it, within the target.

    auto takes from profile.latency_table by how many channels each group must shrink to get faster; without one it asks the device.
    """

    @model_validator(mode="after")
    def _ratio_is_for_plain_choices(self) -> Self:
        if (self.choice == "gates") != (self.macs_ratio is None):
            raise ValueError(
                f"choice {self.choice} and macs_ratio {self.macs_ratio} do not fit: gates take gating.target_ratio, every "
                "other choice needs macs_ratio"
            )
        if self.choice != "gates" and self.align != 1:
            raise ValueError(f"align {self.align} goes by the gates' probabilities; choice {self.choice} has none")
        return self


class TrainingConfig(Config):
    """How steps are computed and how often they are saved, in all stages; what is learned stays the same, to rounding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What layers compute in; auto is bfloat16 (autocast) on GPUs that have it, else float32. Weights stay float32."""
    channels_last: bool | None = None
    """Whether images and weights lie channels last in memory; none for on GPUs only."""
    compile: bool = False
    """Whether steps run under torch.compile: minutes at the start of each stage, for faster epochs on GPUs."""
    micro_batch_size: Count | None = None
    """Images per forward pass and worker; a worker's share of the global batch is accumulated from them. none for all at once."""
    checkpoint_every_s: Annotated[Float, Field(gt=0)] = 600.0
    """Seconds after which an epoch under way is saved too, besides its end: what a lost worker costs at most, to 20 steps."""


class EvaluationConfig(Config):
    """How accuracy is taken; equal for all trials."""

    bn_batches: Count = 8
    """Training batches from which BatchNorm statistics are re-estimated before every evaluation."""
    batch_size: Count = 256
    """Images per forward pass and worker, here and in the re-estimation."""


class ProfileConfig(Config):
    """How latency is taken; equal for all trials."""

    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    """Images per forward pass. The first is what latency_ms means; the others become latency_ms_b<size>."""
    clock: Literal["wall", "model"] = "wall"
    """wall times the network on the device; model computes it from MACs, without a clock, for deterministic runs."""
    num_repeats: Count = 100
    """Timed forward passes."""
    num_threads: Count = 1
    """CPU threads of a forward pass."""
    latency_table: Annotated[str, AfterValidator(_absolute)] | None = None
    """File of `orchestrator measure` for the network and the first batch size."""
    table_device: str | None = None
    """Name of the device that latency_table holds for, as it states it, if not the one on which networks are trained and timed;
    its dtype, mode and threads may then be others too."""

    @field_validator("batch_sizes")
    @classmethod
    def _distinct(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(sizes)) < len(sizes):
            raise ValueError("expected every batch size once")
        return sizes


class TrialConfig(SavedConfig):
    """All that one trial depends on."""

    model: ModelConfig
    data: DataConfig
    pretraining: StageConfig = StageConfig(epochs=0, lr=0.1)
    """Training of the base network, once for all trials; left out by default, where weights are given."""
    gating: GatingConfig
    pruning: PruningConfig = PruningConfig()
    finetuning: FinetuningConfig
    """Training of the pruned network."""
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
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
    def gating_epochs(self) -> int:
        """Epochs under gates; none where channels are chosen without them."""
        return self.gating.epochs if self.pruning.choice == "gates" else 0

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole trial, gating and fine-tuning together."""
        return self.gating_epochs + self.finetuning.epochs

    def base_hash(self) -> str:
        """Return 16 hex digits that name the base network: equal for configs that start from the same one.

        A weights file counts by its path, not its content: new weights want a new name.
        """
        parts = self.model_dump(mode="json", include={"model", "data", "pretraining", "seed"})
        for field in ("val", "num_loader_workers"):  # they do not touch the base network's weights
            del parts["data"][field]
        for field in ("trivial_augment", "mixup", "cutmix", "start_size", "full_size_epoch", "shuffle_buffer"):
            if (
                parts["data"][field] == DataConfig.model_fields[field].default
            ):  # base networks from before they were options
                del parts["data"][field]
        if self.training.precision != "auto":
            parts["precision"] = self.training.precision
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def with_values(trial: TrialConfig, values: Mapping[str, Any]) -> TrialConfig:
    """Return the config with the fields of the given dotted names replaced; all checks run again.

    Raises: pydantic.ValidationError if a value does not fit its field, KeyError if a name is no field.

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
