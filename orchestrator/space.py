"""From a search space, a YAML file with a question on top, to a checked SearchConfig.

A space is refused here, before anything starts: unknown keys, values out of range, parameters that name no field or whose domain leaves the
field's range, models and data sets that do not exist, a gating stage without pressure. One message tells all that is wrong.
"""

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ValidationError

from orchestrator.config import SearchConfig, TrialConfig, with_values
from orchestrator.errors import ConfigError, UserError, did_you_mean
from orchestrator.yaml_files import apply_overrides, find_file, problem_lines, read_yaml, source_of

# What trials may differ in. The base network, hence model, data, pretraining and seed, is one for all trials; evaluation and profile are
# the yardstick: numbers taken with two of them do not compare.
SEARCHABLE_SECTIONS = ("gating", "finetuning")


def load_space(name_or_path: str, overrides: Sequence[str] = ()) -> SearchConfig:
    """Return the search that a file in search_spaces/, or any .yaml file, describes.

    overrides: "dotted.key=value" each, as --set gives them; they go through the same checks.
    Raises: ConfigError, one line per problem.
    """
    path = find_file(name_or_path, "search_spaces/{}.yaml", "space")
    source = f"space {path.name}"
    content = read_yaml(path, source)
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
    return space


def searchable_fields() -> dict[str, type[BaseModel]]:
    """Return the dotted names that `params` may hold, and the class that holds each."""
    return {
        f"{section}.{name}": owner
        for section in SEARCHABLE_SECTIONS
        for name, owner in _scalar_fields(TrialConfig.model_fields[section].annotation)  # type: ignore[arg-type]
    }


def check_space(space: SearchConfig, source: str, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Yield a line for each way in which the parts of a well-formed search do not fit together."""
    yield from _models_and_data(space.base, source, overrides)
    yield from _pressure(space, source)
    yield from _domains(space, source, overrides)
    for index, constraint in enumerate(space.constraints):
        size = constraint.metric.removeprefix("latency_ms_b")
        if size.isdecimal() and int(size) not in space.base.profile.batch_sizes[1:]:
            yield (
                f"{source}: constraints.{index}.metric: found {constraint.metric!r}, but base.profile.batch_sizes is "
                f"{list(space.base.profile.batch_sizes)}; add {size} to it (its first size is latency_ms itself)"
            )


def _unknown_params(params: object, source: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each key of the raw `params` that names nothing searchable."""
    names = list(searchable_fields())
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
            yield f"{where}: params.{key} is no field of TrialConfig{did_you_mean(str(key), names)}"


def _models_and_data(base: TrialConfig, source: str, overrides: Sequence[str]) -> Iterator[str]:
    from orchestrator import datasets, models  # late: torch and torchvision take seconds, and a typo should not

    for key, check in (("model", models.check), ("data", datasets.check)):
        try:
            check(getattr(base, key))
        except UserError as error:
            yield f"{source_of(f'base.{key}.name', source, overrides)}: base.{error}"
    num_classes = datasets.num_classes(base.data)
    if num_classes is not None and num_classes != base.model.num_classes:
        yield (
            f"{source}: base.model.num_classes: found {base.model.num_classes}, but the data set {base.data.name} has "
            f"{num_classes} classes"
        )


def _pressure(space: SearchConfig, source: str) -> Iterator[str]:
    """Yield a line if nothing would close a gate."""
    gating = space.base.gating
    names = ("gating.loss_weight", "gating.target_ratio")
    if gating.loss_weight is None and gating.target_ratio is None and not any(name in space.params for name in names):
        yield f"{source}: nothing closes a gate: set base.gating.loss_weight or base.gating.target_ratio, or search one of them"


def _domains(space: SearchConfig, source: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each value of a domain that its field refuses; the others are at their first corner meanwhile."""
    first = {name: domain.corners()[0] for name, domain in space.params.items()}
    for name, domain in space.params.items():
        for value in domain.corners():
            try:
                with_values(space.base, first | {name: value})
            except ValidationError as error:
                where = source_of(f"params.{name}", source, overrides)
                yield f"{where}: params.{name}: {value!r} is not allowed: {error.errors()[0]['msg']}"


def _scalar_fields(owner: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    for name in owner.model_fields:
        inner = _field_class(owner, name)
        if inner is None:
            yield f"{prefix}{name}", owner
        else:
            yield from _scalar_fields(inner, f"{prefix}{name}.")


def _field_class(owner: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the class of a field that is a config itself, None for a plain value."""
    annotation = owner.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
