"""The base class of all configs, the field types that they share, and the differences between two configs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from orchestrator.masking import masked


def _refuse_bool(value: object) -> object:
    # Python and pydantic accept True as 1; in a YAML file `epochs: yes` is a mistake.
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _scalar(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError("expected a number, a string, true, false or null")


def with_home(value: str) -> str:
    """Return a path in which `~` is replaced by the home folder. Raises: ValueError if there is none, or the text is empty."""
    if not value:
        raise ValueError("expected a path; . is the working directory")
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise ValueError("no such home folder, expected one of this machine; write the path without ~") from error


def absolute_path(value: str) -> str:
    """Return a path made absolute: a relative one was written for this working directory, and workers run in others."""
    return str(Path(with_home(value)).absolute())


def _without_credentials(value: str) -> str:
    # A config is written to the run directory and to MLflow, where other people read it.
    named = value.replace("gs://anonymous@", "gs://", 1)  # pyarrow's word for a bucket that is open to all
    if masked(named) != named:
        raise ValueError("expected no user, password or token in it; set them in the environment or a profile")
    return value


def none_word(value: object) -> object:
    """Return None for the word "none" in any case, else the value."""
    return None if isinstance(value, str) and value.lower() == "none" else value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1)]
Weight = Annotated[Float, Field(ge=0)]
Choice = Annotated[Any, AfterValidator(_scalar)]  # a union of types would turn 1.0 into 1, or true into 1
Location = Annotated[str, AfterValidator(_without_credentials)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
CONFIG_VERSION = 1
"""Version of search.json and config.json. It changes with the meaning of a field, not when a field with a default is added."""


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused; the string under a field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def to_json(self) -> str:
        """Return the full config as JSON text, one field a line; model_validate_json reads back an equal object."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


class SavedConfig(Config):
    """A config that is saved as a file of its own, with a version; a config that a person writes needs none."""

    def to_json(self) -> str:
        """Return the JSON text with the version in front."""
        return json.dumps({"version": CONFIG_VERSION, **self.model_dump(mode="json")}, indent=2) + "\n"

    def refused_changes(self, wanted: Self) -> list[str]:
        """Return how another config differs, as differences() does, where a run directory of this one does not allow it."""
        return differences(self, wanted)

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "version" not in values:
            return values
        if values["version"] != CONFIG_VERSION:
            raise ValueError(
                f"version {values['version']!r}, this program reads version {CONFIG_VERSION}; use the release that wrote it"
            )
        return {name: value for name, value in values.items() if name != "version"}


def differences(saved: Config, wanted: Config) -> list[str]:
    """Return the differences between two configs, one "dotted.name: A there, B here" per field; empty if they are equal.

    saved: the config in a run directory ("there").    wanted: the one given now ("here").
    """
    there, here = (dict(_leaves(config.model_dump(mode="json"))) for config in (saved, wanted))
    absent = "nothing"
    return [
        f"{name}: {there.get(name, absent)} there, {here.get(name, absent)} here"
        for name in {**there, **here}
        if there.get(name, absent) != here.get(name, absent)
    ]


def _leaves(tree: JsonValue, prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    children: Iterator[tuple[str, JsonValue]] | None = None
    if isinstance(tree, dict) and tree:
        children = iter(tree.items())
    elif isinstance(tree, list) and tree:
        children = ((str(index), child) for index, child in enumerate(tree))
    if children is None:
        yield prefix.removesuffix("."), tree
        return
    for key, child in children:
        yield from _leaves(child, f"{prefix}{key}.")
