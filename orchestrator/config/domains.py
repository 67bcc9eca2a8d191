"""The domains of searched parameters: ranges of real or whole numbers, and lists of choices."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Choice, Config, Count, Float, Int

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_INNER = 1000
"""Most values between the ends of a range that are checked."""


class FloatDomain(Config):
    """A range of real numbers."""

    type: Literal["float"]
    low: Float
    """Lowest value, included."""
    high: Float
    """Highest value, included."""
    log: bool = False
    """Draw on a logarithmic scale."""
    step: Annotated[Float, Field(gt=0)] | None = None
    """Draw only low, low + step, ...; not together with log."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, self.log)
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self

    def corners(self) -> tuple[float, ...]:
        """Return the ends of the range, at which a check of how values fit together suffices."""
        return (self.low, self.high)

    def inner(self) -> Iterator[float]:
        """Yield values between the ends: those on steps, a part of them if they are many; without steps one that is not whole."""
        if self.step is None:
            yield self.low + (self.high - self.low) / math.pi
            return
        num = int((self.high - self.low) / self.step + 1e-9) + 1
        yield from (self.low + index * self.step for index in _some(range(num)))

    def middle(self) -> float:
        """Return the middle of the range, by the domain's scale and on one of its steps."""
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return value if self.step is None else self.low + round((value - self.low) / self.step) * self.step

    def holds(self, value: object) -> bool:
        """Return whether the value is in the range, ends included, and on one of its steps."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-9)


class IntDomain(Config):
    """A range of whole numbers."""

    type: Literal["int"]
    low: Int
    """Lowest value, included."""
    high: Int
    """Highest value, included."""
    log: bool = False
    """Draw on a logarithmic scale."""
    step: Count = 1
    """Draw only low, low + step, ...; 1 together with log."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other")
        return self

    def corners(self) -> tuple[int, ...]:
        """Return the ends of the range, at which a check of how values fit together suffices."""
        return (self.low, self.high)

    def inner(self) -> Iterator[int]:
        """Yield the values of the range, a part of them if they are many."""
        yield from _some(range(self.low, self.high + 1, self.step))

    def middle(self) -> int:
        """Return the middle of the range, by the domain's scale and on one of its steps."""
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return self.low + round((value - self.low) / self.step) * self.step

    def holds(self, value: object) -> bool:
        """Return whether the value is in the range, ends included, and on one of its steps."""
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and (value - self.low) % self.step == 0


class CategoricalDomain(Config):
    """A list of choices without order."""

    type: Literal["categorical"]
    choices: Annotated[tuple[Choice, ...], Field(min_length=1)]
    """The values to choose from: numbers, strings, booleans, null."""

    def corners(self) -> tuple[Choice, ...]:
        """Return the values at which a check of the domain suffices: all of them."""
        return self.choices

    def inner(self) -> Iterator[Choice]:
        """Yield nothing: all choices are corners."""
        yield from ()

    def middle(self) -> Choice:
        """Return the first choice: they have no order."""
        return self.choices[0]

    def holds(self, value: object) -> bool:
        """Return whether the value is one of the choices."""
        return value in self.choices


def _some(values: range) -> range:
    """Return at most MAX_INNER of the values, evenly spaced."""
    return values[:: math.ceil(len(values) / MAX_INNER)]


def _check_range(low: float, high: float, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low {low:g} is not below high {high:g}; a fixed value belongs in base")
    if log and low <= 0:
        raise ValueError(f"low {low:g} has no logarithm; log needs a positive low")


Domain = Annotated[FloatDomain | IntDomain | CategoricalDomain, Field(discriminator="type")]


def distribution(domain: Domain) -> "BaseDistribution":
    """Return the domain as a distribution of Optuna."""
    from optuna.distributions import (  # late: checking a YAML file needs no Optuna
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(domain, CategoricalDomain):
        return CategoricalDistribution(domain.choices)
    if isinstance(domain, IntDomain):
        return IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
