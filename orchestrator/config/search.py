"""SearchConfig: everything that a search depends on, from its parameters and objectives to its scheduler."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from orchestrator.config.base import Choice, Config, Count, Float, Int, SavedConfig, Seed, differences
from orchestrator.config.domains import Domain
from orchestrator.config.metrics import NETWORK_METRICS, OBJECTIVE_METRICS, UNPRUNED, known_metric
from orchestrator.config.trial import Baseline, ModelConfig, TrialConfig

_RESERVED_NAMES = ("base", "mlartifacts", "mlflow.db")
"""Names in the storage folder that are not run directories: see orchestrator/storage/paths.py."""
_MAY_CHANGE = ("num_trials", "max_concurrent", "max_hours", "max_gpu_hours")
"""Fields of `search` that may differ when the search is resumed: no value that a trial gets depends on them."""
_MAY_GROW = ("baselines", "references")
"""Fields of a search that may get further entries when it is resumed."""


class Objective(Config):
    """A metric that the search maximises or minimises."""

    metric: Annotated[str, AfterValidator(lambda value: known_metric(value, OBJECTIVE_METRICS))]
    """A metric that every epoch reports."""
    mode: Literal["max", "min"]
    """Whether larger or smaller values are better."""


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
            raise ValueError(f"min {self.min:g} exceeds max {self.max:g}")
        return self


class Budget(Config):
    """A limit; the best network within it gets an alias in MLflow's registry, such as best-latency_ms-4."""

    metric: Annotated[str, AfterValidator(lambda value: known_metric(value, NETWORK_METRICS))]
    """A metric of a finished trial."""
    max: Float
    """Largest value allowed."""


class SearchAlgorithmConfig(Config):
    """How parameter values are suggested, and how many trials are run."""

    algorithm: Literal["random", "sobol", "tpe", "nsga2"] = "tpe"
    """random draws independently, sobol covers the space evenly, tpe and nsga2 learn from the trials before."""
    num_trials: Count = 16
    """Trials of the whole search; a resumed search may have more."""
    max_concurrent: Count | None = None
    """Trials at once; none for as many as the cluster holds."""
    max_hours: Annotated[Float, Field(gt=0)] | None = None
    """Hours after which no further trial starts; running ones finish. A resumed search counts from zero."""
    max_gpu_hours: Annotated[Float, Field(gt=0)] | None = None
    """GPU hours of all trials' epochs after which no further trial starts; a resumed search includes the hours spent before."""
    seed: Seed = 0
    """Seed of the sampler."""
    points_to_evaluate: tuple[dict[str, Choice], ...] = ()
    """Values to try first, one trial each: {gating.target_ratio: 0.5}; the sampler suggests the parameters that are left out."""
    descend: Literal["none", "chain", "nearest"] = "none"
    """Which network and gates a trial starts from, like gating.start_from. none: the unpruned network.

    chain: the trial before it, fine-tuned; one at a time, with a point for each trial; a trial that fails ends the chain.
    nearest: among the trials that have finished or passed their first rung, the pruned network of the one with the next lower
    pressure (a higher target, or without one a lower loss_weight).
    """

    descend_share: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """Share of each stage's epochs for which a trial with a parent trains, since it starts from a partly pruned network."""

    @model_validator(mode="after")
    def _chain_has_links(self) -> Self:
        if self.descend == "chain" and len(self.points_to_evaluate) != self.num_trials:
            raise ValueError(
                f"descend chain: found {len(self.points_to_evaluate)} points for {self.num_trials} trials, expected one for each"
            )
        return self


class SchedulerConfig(Config):
    """Which trials are stopped early."""

    type: Literal["pareto_asha", "asha", "median", "none"] = "pareto_asha"
    """pareto_asha judges all objectives together, asha and median (Ray's) the first one, none lets every trial finish."""
    grace_epochs: Count | None = None
    """Epochs before a trial may be stopped; gating and fine-tuning count together. null: the gating epochs and one more, so that
    pruned networks are compared, after one epoch of recovery."""
    reduction_factor: Annotated[Int, Field(ge=2)] = 2
    """Each rung keeps one of this many trials, and each rung has this many times the epochs of the one before."""
    num_brackets: Count = 1
    """pareto_asha only: every second, third, ... trial is first judged one, two, ... rungs later."""


class ReferenceConfig(Config):
    """A network to compare the trials with: measured but not trained, on the same images, device and batch sizes."""

    name: str
    """Name of its row in results.parquet."""
    model: ModelConfig
    """The network. Its accuracy is measured too if it has weights and is not pruned to `widths`."""
    widths: str | None = None
    """JSON file whose key `channels` maps names of convolutions to numbers of output channels, to which the network is pruned;
    looked up in the working directory, then in the project."""

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
                "widths and model.weights are both set; a network that is pruned and not trained has no useful accuracy; set one"
            )
        return self


class SearchConfig(SavedConfig):
    """Everything that a search depends on."""

    name: str
    """Name of the search and of its run directory: letters, digits, dot, dash, underscore."""
    base: TrialConfig
    """The config of a trial; the searched parameters replace some of its fields."""
    params: dict[str, Domain] = Field(default_factory=dict)
    """Searched parameters: dotted name of a field of TrialConfig -> its domain."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)]
    """What the front is over; the first one decides which network is best."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds that every network of the front meets."""
    budgets: tuple[Budget, ...] = ()
    """Limits within which the best network gets an alias, in addition to the constraints, which every network of the front meets."""
    baselines: tuple[Baseline, ...] = ()
    """Baselines to train after the trials, with the MACs and the epochs of the best trial."""
    references: tuple[ReferenceConfig, ...] = ()
    """Networks to measure for comparison."""
    search: SearchAlgorithmConfig = SearchAlgorithmConfig()
    """How many trials there are, and how their parameters are chosen."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Which trials are stopped early, and when."""

    def refused_changes(self, wanted: Self) -> list[str]:
        """Return the differences that make it another search; another number of trials, for example, does not."""
        theirs = wanted.models
        saved = self.with_models({name: one.seen_from(theirs.get(name, one)) for name, one in self.models.items()})
        search = {name: getattr(wanted.search, name) for name in _MAY_CHANGE}
        grown = {
            name: getattr(wanted, name)
            for name in _MAY_GROW
            if all(one in getattr(wanted, name) for one in getattr(saved, name))
        }
        updates = {"search": self.search.model_copy(update=search), "budgets": wanted.budgets, **grown}
        return differences(saved.model_copy(update=updates), wanted)

    def resuming(self, saved: Self) -> Self:
        """Return the config with which the run of a saved one continues.

        Weights whose SHA-256 the saved one lacks, as it is of an earlier version, go without: the base network stays the same one.
        """
        if saved.refused_changes(self):
            return self
        lacks = [name for name, one in saved.models.items() if one.weights_sha256 is None]
        without = {"weights_sha256": None}
        return self.with_models(
            {name: one.model_copy(update=without) if name in lacks else one for name, one in self.models.items()}
        )

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The network that is pruned and the references, by the names of their rows."""
        return {UNPRUNED: self.base.model, **{one.name: one.model for one in self.references}}

    def with_models(self, models: Mapping[str, ModelConfig]) -> Self:
        """Return the config with other networks, by the names of `models`."""
        base = self.base.model_copy(update={"model": models[UNPRUNED]})
        references = tuple(one.model_copy(update={"model": models[one.name]}) for one in self.references)
        return self.model_copy(update={"base": base, "references": references})

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
