"""Reads a search space from YAML and checks it: returns a SearchConfig, or reports all problems in one error.

Refused before anything starts: unknown keys, values out of range, parameters that name no field or whose domain exceeds
the field's range, models and data sets that do not exist, a gating stage without pressure.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.config.messages import problem, problem_lines, renamed, source_of
from orchestrator.config.metrics import BY_NAME, split_column
from orchestrator.config.rungs import rungs_of
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.config.yaml_files import apply_overrides, find_file, read_extended
from orchestrator.errors import ConfigError, UserError, did_you_mean

# What trials may differ in. All trials share the base network, hence model, data, pretraining and seed;
# evaluation and profile are the yardstick: numbers taken with two of them do not compare.
SEARCHABLE_SECTIONS = ("gating", "pruning", "finetuning")
# The corners of twelve ranges. Of a larger space only a part is checked here; a trial checks its own values again.
MAX_COMBINATIONS = 4096


def load_space(name_or_path: str, overrides: Sequence[str] = ()) -> SearchConfig:
    """Return the search that a file in search_spaces/, or any .yaml file, describes.

    A file with the key `extends` holds only the differences from the file that the key names, in the same folder.
    overrides: "dotted.key=value" each, as from --set; they are checked in the same way.
    Raises: ConfigError, one line per problem.
    """
    path = find_file(name_or_path, "search_spaces/{}.yaml", "space")
    source = f"space {path.name}"
    content = read_extended(path, source)
    apply_overrides(content, overrides)
    problems = list(_unknown_params(content.get("params"), source, overrides))
    try:
        space = SearchConfig.model_validate(content)
    except ValidationError as error:
        problems = problem_lines(SearchConfig, error, source, overrides) + problems
    if not problems:
        problems = list(check_space(space, source, overrides))
    if problems:
        raise ConfigError("\n".join(problems))
    return space.with_models({name: model.with_digest() for name, model in space.models.items()})


def searchable_fields() -> list[str]:
    """Return the dotted names that `params` may hold."""
    return [name for name in _scalar_fields(TrialConfig, "") if name.partition(".")[0] in SEARCHABLE_SECTIONS]


def one_trial(space: SearchConfig) -> TrialConfig:
    """Return the config of a training without a search.

    Searched parameters are fixed: to the value in `base` if given, else to the first entry of
    search.points_to_evaluate, else to the middle of the range. Raises: ConfigError if those values do not fit together.
    """
    point = space.search.points_to_evaluate[0] if space.search.points_to_evaluate else {}
    values = {
        name: point.get(name, domain.middle()) for name, domain in space.params.items() if not _states(space.base, name)
    }
    if reason := _unfit(space.base, values):
        raise ConfigError(f"space {space.name}: {reason}; choose values with --set base.gating....")
    return with_values(space.base, values)


def _states(config: BaseModel, dotted: str) -> bool:
    """Return whether the field was set explicitly."""
    name, _, rest = dotted.partition(".")
    return name in config.model_fields_set and (not rest or _states(getattr(config, name), rest))


def check_space(space: SearchConfig, source: str, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Yield a line for each conflict between the parts of a well-formed search."""
    out_of_range = list(_domains_out_of_range(space, source, overrides))
    yield from out_of_range or _unfit_combinations(space, source)
    yield from _unfit_points(space, source)
    yield from _model_and_data(space.base, source, overrides)
    yield from _references(space, source)
    yield from _chain(space.base, source, overrides)
    yield from _unmeetable(space, source)
    rungs = rungs_of(space)
    if space.scheduler.type == "pareto_asha" and space.scheduler.num_brackets > max(1, len(rungs)):
        yield (
            f"{source}: scheduler.num_brackets: found {space.scheduler.num_brackets}, but there are only {len(rungs)} rungs, and "
            "each bracket has one fewer than the one before; lower it, or grace_epochs or reduction_factor"
        )
    sizes = space.base.profile.batch_sizes
    metrics = {f"constraints.{index}": limit.metric for index, limit in enumerate(space.constraints)}
    metrics |= {f"budgets.{index}": limit.metric for index, limit in enumerate(space.budgets)}
    for key, metric in metrics.items():
        _, size = split_column(metric)
        if size is not None and size not in sizes[1:]:
            yield (
                f"{source}: {key}.metric: found {metric!r}, but base.profile.batch_sizes is {list(sizes)}; add {size} to it "
                "(the first size is latency_ms itself)"
            )


def _unknown_params(params: object, source: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each key of the raw `params` that is not a searchable field."""
    names = searchable_fields()
    for key in params if isinstance(params, dict) else ():
        if key in names:
            continue
        where = source_of(f"params.{key}", source, overrides)
        section = str(key).partition(".")[0]
        if section in TrialConfig.model_fields and section not in SEARCHABLE_SECTIONS:
            reason = (
                "is the same for all trials"
                if section in ("evaluation", "profile")
                else "shapes the base network that all trials share"
            )
            yield f"{where}: params.{key} cannot be searched: {section} {reason}; set base.{key} instead"
        else:
            yield f"{where}: params.{key} is not a field of TrialConfig{renamed(str(key)) or did_you_mean(str(key), names)}"


def _domains_out_of_range(space: SearchConfig, source: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each bound or choice of a domain that its field refuses, or for values between its bounds."""
    for name, domain in space.params.items():
        where, corners = source_of(f"params.{name}", source, overrides), domain.corners()
        refused = (line for value in (*corners, *domain.inner()) for line in _refused(space.base, name, value))
        yield from (f"{where}: params.{line}" for line in itertools.islice(refused, len(corners)))


def _refused(base: TrialConfig, name: str, value: Any) -> Iterator[str]:
    """Yield what the field itself has against a value."""
    try:
        with_values(base, {name: value})
    except ValidationError as error:
        # Errors of a section depend on other parameters too; _unfit_combinations reports them.
        own = (details for details in error.errors() if details["loc"] == tuple(name.split(".")))
        yield from (problem(TrialConfig, details) for details in own)


def _unfit_combinations(space: SearchConfig, source: str) -> Iterator[str]:
    """Yield a line for the first combination of extreme values that is not a valid trial, if there is one."""
    combinations = itertools.product(*(domain.corners() for domain in space.params.values()))
    for values in itertools.islice(combinations, MAX_COMBINATIONS):
        drawn = dict(zip(space.params, values, strict=True))
        reason = _unfit(space.base, drawn)
        if reason:
            at = "; params can reach " + ", ".join(f"{name}={value}" for name, value in drawn.items()) if drawn else ""
            yield f"{source}: {reason}{at}"
            return


def _unfit_points(space: SearchConfig, source: str) -> Iterator[str]:
    """Yield a line for each value of search.points_to_evaluate that is outside its domain or not searched."""
    for index, point in enumerate(space.search.points_to_evaluate):
        where = f"{source}: search.points_to_evaluate.{index}"
        for name, value in point.items():
            if name not in space.params:
                yield f"{where}: {name} is not searched{did_you_mean(name, list(space.params))}"
            elif not space.params[name].holds(value):
                yield f"{where}: {name}: found {value!r}, expected a value of its domain in params"


def _unmeetable(space: SearchConfig, source: str) -> Iterator[str]:
    """Yield a line for each metric whose constraints contradict each other."""
    for metric in dict.fromkeys(constraint.metric for constraint in space.constraints):
        mine = [constraint for constraint in space.constraints if constraint.metric == metric]
        low = max([0.0, *(one.min for one in mine if one.min is not None)])
        high = min([BY_NAME[split_column(metric)[0]].most, *(one.max for one in mine if one.max is not None)])
        if low > high:
            yield f"{source}: constraints: {metric} must be at least {low:g} and at most {high:g}, which no network is"


def _unfit(base: TrialConfig, values: dict[str, Any]) -> str | None:
    """Return what is wrong with the trial of these values; None if it is valid."""
    try:
        trial = with_values(base, values)
    except ValidationError as error:
        return "; ".join(f"base.{problem(TrialConfig, details)}" for details in error.errors())
    if trial.gating.loss_weight is trial.gating.target_ratio is trial.gating.target_ms is None:
        return (
            "base.gating has neither loss_weight nor target_ratio nor target_ms, so no channel would close; "
            "set one of them, or search it under params"
        )
    return None


def _model_and_data(base: TrialConfig, source: str, overrides: Sequence[str]) -> Iterator[str]:
    from orchestrator.datasets import splits as datasets
    from orchestrator.models import (
        networks as models,  # late: torch and torchvision take seconds to import, and reporting a typo should not
    )

    for key, check in (("model", models.check), ("data", datasets.check)):
        try:
            check(getattr(base, key))
        except UserError as error:
            yield f"{source_of(f'base.{key}.name', source, overrides)}: base.{error}"
    num_classes = datasets.num_classes(base.data)
    if num_classes not in (None, base.model.num_classes):
        yield (
            f"{source_of('base.model.num_classes', source, overrides)}: base.model.num_classes: found "
            f"{base.model.num_classes}, expected {num_classes}, the number of classes of data set {base.data.name}"
        )


def _references(space: SearchConfig, source: str) -> Iterator[str]:
    from orchestrator.models import networks as models  # late, like models and datasets above

    for index, reference in enumerate(space.references):
        try:
            models.check(reference.model)
        except UserError as error:
            yield f"{source}: references.{index}.{error}"


def _chain(base: TrialConfig, source: str, overrides: Sequence[str]) -> Iterator[str]:
    if base.gating.start_from is None:
        return
    from orchestrator.storage import run_dir as chain  # late, like models and datasets above

    try:
        chain.check(base.gating.start_from)
    except UserError as error:
        yield f"{source_of('base.gating.start_from', source, overrides)}: base.{error}"


def _scalar_fields(cls: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the dotted names of the fields that hold one value each."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _scalar_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
