"""SearchConfig: params, objectives, constraints, scheduler"""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from orchestrator.config.base import Choice, Config, Count, Float, Int, SavedConfig, Seed
from orchestrator.config.domains import Domain
from orchestrator.config.metrics import NETWORK_METRICS, OBJECTIVE_METRICS, UNPRUNED, known_metric
from orchestrator.config.trial import Baseline, ModelConfig, TrialConfig

_RESERVED_NAMES = ("base", "mlartifacts", "mlflow.db")
"""Taken in the storage folder, beside the run directories: see orchestrator/storage/paths.py."""


class Objective(Config):
    """One direction of the search."""

    metric: Annotated[str, AfterValidator(lambda value: known_metric(value, OBJECTIVE_METRICS))]
    """A metric that every epoch reports."""
    mode: Literal["max", "min"]
    """Whether more or less of it is better."""


class Constraint(Config):
    """What a trial must meet to be on the front."""

    metric: Annotated[str, AfterValidator(lambda value: known_metric(value, NETWORK_METRICS))]
    """A metric of a finished trial."""
    max: Float | None = None
    """Largest value allowed."""
    min: Float | None = None
    """Smallest value allowed."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("expected max or min")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"nothing lies between min {self.min:g} and max {self.max:g}")
        return self


class Budget(Config):
    """A limit whose best network gets a name of its own in MLflow's registry, such as best-latency_ms-4."""

    metric: Annotated[str, AfterValidator(lambda value: known_metric(value, NETWORK_METRICS))]
    """A metric of a finished trial."""
    max: Float
    """Largest value allowed."""


class SearchAlgorithmConfig(Config):
    """How parameter values are suggested, and how many trials are run."""

    algorithm: Literal["random", "qmc", "optuna", "nsga2"] = "optuna"
    """random draws independently, qmc covers the space evenly (Sobol), optuna (TPE) and nsga2 learn from the trials before."""
    num_trials: Count = 16
    """Trials of the whole search."""
    max_concurrent: Count | None = None
    """Trials at once; none for as many as the cluster holds."""
    max_hours: Annotated[Float, Field(gt=0)] | None = None
    """Hours after which no further trial starts; those that run are finished. Counted anew when the search is continued."""
    max_gpu_hours: Annotated[Float, Field(gt=0)] | None = None
    """GPU hours of the epochs of all trials after which no further trial starts; a continued search counts those before too."""
    seed: Seed = 0
    """Seed of the suggestions."""
    points: tuple[dict[str, Choice], ...] = ()
    """Values to try first, a trial each: {gating.target_ratio: 0.5}; parameters that are left out are suggested."""
    descend: Literal["none", "chain", "nearest"] = "none"
    """The network and the gates that a trial starts from, as gating.start_from does. none: the unpruned network.

    chain: the trial before it, fine-tuned; one at a time, with a point for each trial; a trial that fails ends the chain.
    nearest: the trial, as pruned, that comes nearest with less pressure (a higher target, or without one a lower loss_weight), of
    those that have finished or passed their first rung.
    """

    descend_share: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Share of the epochs of each stage that a trial with a parent trains for: much of its work is done."""

    @model_validator(mode="after")
    def _chain_has_links(self) -> Self:
        if self.descend == "chain" and len(self.points) != self.num_trials:
            raise ValueError(
                f"descend chain: found {len(self.points)} points for {self.num_trials} trials, expected one for each"
            )
        return self


class SchedulerConfig(Config):
    """Which trials are stopped early."""

    type: Literal["pareto_asha", "asha", "median", "none"] = "pareto_asha"
    """pareto_asha judges all objectives together, asha and median (Ray's) the first one, none lets every trial finish."""
    grace_epochs: Count | None = None
    """Epochs before a trial may be stopped; gating and fine-tuning count together. null: those of gating and one more, so that
    networks are compared as they are cut, and after they had an epoch to recover from it."""
    reduction_factor: Annotated[Int, Field(ge=2)] = 2
    """Each rung keeps one trial of so many, and the rungs are this factor apart."""
    num_brackets: Count = 1
    """pareto_asha only: every second, third, ... trial is first judged one, two, ... rungs later."""


class ReferenceConfig(Config):
    """A network to measure beside the trials: not trained, on the same images, the same device and at the same sizes."""

    name: str
    """What its row is called."""
    model: ModelConfig
    """The network. With weights its accuracy is measured too; one that is cut has none."""
    widths: str | None = None
    """JSON file whose key channels holds the output channels of convolutions by their names in the network, which is cut to
    them; looked up in the working directory, then in the project."""

    @field_validator("name")
    @classmethod
    def _names_no_other_row(cls, name: str) -> str:
        if name in (UNPRUNED, *get_args(Baseline)) or re.match(r"trial_\d", name) or "/" in name:
            raise ValueError("expected a name that no trial, baseline or folder can have")
        return name

    @model_validator(mode="after")
    def _cut_is_untrained(self) -> Self:
        if self.widths is not None and self.model.weights is not None:
            raise ValueError(
                "widths and model.weights are both given; a network that is cut and not trained has no accuracy"
            )
        return self


class SearchConfig(SavedConfig):
    """All that one search depends on."""

    name: str
    """Name of the search and of its run directory: letters, digits, dot, dash, underscore."""
    base: TrialConfig
    """The config of a trial, but for the searched parameters."""
    params: dict[str, Domain] = Field(default_factory=dict)
    """Searched parameters: dotted name of a field of TrialConfig -> its domain."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)]
    constraints: tuple[Constraint, ...] = ()
    budgets: tuple[Budget, ...] = ()
    """Limits to name the best network for, beside the constraints, which every network of the front meets."""
    baselines: tuple[Baseline, ...] = ()
    """Plain choices to train beside the trials, at the multiply-adds and for the epochs of the best of them."""
    references: tuple[ReferenceConfig, ...] = ()
    """Networks to measure beside the trials."""
    search: SearchAlgorithmConfig = SearchAlgorithmConfig()
    scheduler: SchedulerConfig = SchedulerConfig()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("expected letters, digits, dots, dashes and underscores only, a letter or digit first")
        if name in _RESERVED_NAMES:
            raise ValueError(f"expected another name: the storage uses {', '.join(_RESERVED_NAMES)} itself")
        return name

    @field_validator("references")
    @classmethod
    def _named_apart(cls, references: tuple[ReferenceConfig, ...]) -> tuple[ReferenceConfig, ...]:
        if len({reference.name for reference in references}) < len(references):
            raise ValueError("expected every name once")
        return references

    @field_validator("baselines")
    @classmethod
    def _once_each(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(baselines)) < len(baselines):
            raise ValueError("expected every baseline once")
        return baselines

    @model_validator(mode="after")
    def _chain_is_whole(self) -> Self:
        if self.search.descend == "chain" and self.scheduler.type != "none":
            raise ValueError(
                f"search.descend chain and scheduler.type {self.scheduler.type} exclude each other: the trial after a stopped one "
                "would have nothing to start from; set scheduler.type to none"
            )
        return self

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len({objective.metric for objective in objectives}) < len(objectives):
            raise ValueError("expected every metric once")
        return objectives
