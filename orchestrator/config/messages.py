"""Error messages about configs: pydantic's findings with the dotted key, what was found and what was expected."""

import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.base import Config
from orchestrator.errors import ConfigError, did_you_mean
from orchestrator.masking import masked

ConfigType = TypeVar("ConfigType", bound=Config)


def validate(cls: type[ConfigType], content: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> ConfigType:
    """Return the config, or raise a ConfigError with a line for each thing that is wrong."""
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_lines(cls, error, source, overrides))) from error


def problem_lines(
    cls: type[BaseModel], error: ValidationError, source: str, overrides: Sequence[str] = ()
) -> list[str]:
    """Return pydantic's findings as messages, one line each, in the order of the config."""
    return [
        f"{source_of(_walk(cls, details['loc']).dotted, source, overrides)}: {problem(cls, details)}"
        for details in error.errors()
        # pydantic also calls a list without any valid item too short; the errors of its items are clearer.
        if not (details["type"] == "too_short" and details["input"])
    ]


def source_of(dotted: str, source: str, overrides: Sequence[str]) -> str:
    """Return the last --set that touched the field, or something below or above it; the file if none did."""
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if dotted and (f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.")):
            return f"--set {override}"
    return source


def shown(value: Any) -> str:
    """Return a value as a message shows it: as YAML writes it, at most 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = masked(repr(value))  # masked before it is shortened: half a secret would not be recognised
    return text if len(text) <= 60 else f"{text[:57]}..."


def problem(cls: type[BaseModel], details: ErrorDetails) -> str:
    """Return one of pydantic's findings as a message: dotted key, what was found, what was expected."""
    kind, found, place = details["type"], details["input"], _walk(cls, details["loc"])
    if kind == "extra_forbidden":
        assert place.owner is not None  # only models forbid keys
        hint = renamed(place.dotted) or did_you_mean(str(details["loc"][-1]), list(place.owner.model_fields))
        return f"{place.dotted} is not a field of {place.owner.__name__}{hint}"
    if kind == "missing":
        return f"{place.dotted} is missing" + (f": {place.description}" if place.description else "")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = found.get("type") if isinstance(found, dict) else found
        return f"{place.dotted}.type: found {shown(tag)}, expected 'float', 'int' or 'categorical'"
    if kind == "value_error":
        where, error = f"{place.dotted}: " if place.dotted else "", details["ctx"]["error"]
        return f"{where}{error}" if isinstance(found, dict) else f"{where}found {shown(found)}, {error}"
    return f"{place.dotted}: found {shown(found)}, expected {_expected(details)}"


RENAMED = {
    "data.val": "data.test",
    "data.holdout": "data.validation_share",
    "pruning.align": "pruning.round_to",
    "search.points": "search.points_to_evaluate",
    "qmc": "sobol",
    "optuna": "tpe",
}
"""Keys, and values of search.algorithm, by their names before the first release."""


def renamed(found: str) -> str:
    """Return the end of the message about an old key, or an old value of search.algorithm; empty for others.

    >>> renamed("base.data.val")
    '; it is called data.test now'
    """
    new = RENAMED.get(found.removeprefix("base."))
    return f"; it is called {new} now" if new else ""


_EXPECTED = {
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a string",
    "finite_number": "a finite number",
}


def _expected(details: ErrorDetails) -> str:
    if details["type"] in _EXPECTED:
        return _EXPECTED[details["type"]]
    text = details["msg"].removeprefix("Input should be ").removeprefix("Tuple should have ")
    if text.startswith(("greater", "less")):
        return f"a number {text}"
    hint = ""
    if details["type"] == "literal_error":
        names = re.findall(r"'([^']+)'", text)
        found = str(details["input"])
        hint = renamed(found) if RENAMED.get(found) in names else did_you_mean(found, names)
    return text.replace(" after validation", "") + hint.partition(" (valid")[0]


@dataclass(frozen=True)
class _Place:
    """What pydantic's location of an error corresponds to in the file."""

    dotted: str
    owner: type[BaseModel] | None
    """The class that holds, or should hold, the field."""
    description: str | None
    """The documentation of the field."""


def _walk(cls: type[BaseModel], location: tuple[int | str, ...]) -> _Place:
    here: Any = cls
    place = _Place("", None, None)
    for step in location:
        options = _options(here)
        tagged = [option for option in options if _has_tag(option, step)]
        if len(options) > 1 and tagged:  # pydantic puts the tag of a union between two names
            here = tagged[0]
            continue
        dotted = f"{place.dotted}.{step}".removeprefix(".")
        here = options[0]
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(str(step))
            place = _Place(dotted, here, field.description if field else None)
            here = field.annotation if field else None
        else:  # dict[str, X] or tuple[X, ...]
            place = _Place(dotted, None, None)
            arguments = [argument for argument in typing.get_args(here) if argument is not ...]
            here = arguments[-1] if arguments else None
    return place


def _options(annotation: Any) -> list[Any]:
    """Return the members of a union, None left out, or the annotation alone."""
    if typing.get_origin(annotation) is Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return [o for argument in typing.get_args(annotation) if argument is not type(None) for o in _options(argument)]
    return [annotation]


def _has_tag(option: Any, step: int | str) -> bool:
    if not (isinstance(option, type) and issubclass(option, BaseModel) and "type" in option.model_fields):
        return False
    return step in typing.get_args(option.model_fields["type"].annotation)
