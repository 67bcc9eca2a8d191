"""Numbers that a forward pass computes from sizes of its values. They carry the computation, so that it can be written again.

While a network is traced, the size of a value is a SizeInt: an int with its formula. Arithmetic makes numbers with formulas of
it. A comparison, or a conversion by which the formula is lost, is a decision: another size may lead to another forward pass.
"""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.fx import Node


@dataclass(frozen=True)
class SizeOf:
    """The size of a value along a dimension."""

    value: Any
    """A Ref, or the Attribute of a parameter or buffer; while tracing, the node of the value."""
    dim: int
    found: int
    """What it was while tracing."""


@dataclass(frozen=True)
class Computed:
    """A function of sizes and numbers."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    """Each a SizeOf, a Computed, or a plain number."""


Formula = SizeOf | Computed


@dataclass(frozen=True)
class Decision:
    """What a forward pass found out about sizes while it was traced, and may have branched on."""

    formula: Formula
    found: Any


_listeners: list[Callable[[Decision], None]] = []


@contextmanager
def decisions_reported(listener: Callable[[Decision], None]) -> Iterator[None]:
    """Call `listener` with each decision that is made meanwhile."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


def decided(found: Any, formula: Formula) -> Any:
    """Report a decision; return what was found."""
    for listener in _listeners:
        listener(Decision(formula, found))
    return found


def with_formula(found: Any, formula: Formula) -> Any:
    """Return a number that carries its formula."""
    assert type(found) in (int, float), f"{found} is not a plain number"
    return SizeInt(found, formula) if type(found) is int else SizeFloat(found, formula)


def formula_of(number: Any) -> Any:
    """Return the formula of a number; anything else as it is."""
    return number.formula if isinstance(number, SizeInt | SizeFloat) else number


def plain(number: Any) -> Any:
    """Return a number without its formula; anything else as it is."""
    if isinstance(number, SizeInt):
        return int.__int__(number)
    return float.__float__(number) if isinstance(number, SizeFloat) else number


def sizes_in(formula: Any) -> Iterator[SizeOf]:
    """Yield the sizes that a formula reads."""
    if isinstance(formula, SizeOf):
        yield formula
    elif isinstance(formula, Computed):
        for arg in formula.args:
            yield from sizes_in(arg)


def renamed(value: Any, name_of: Callable[[Any], Any]) -> Any:
    """Return a formula, a decision, or a number with a formula, with other names for its values; anything else as it is."""
    if isinstance(value, SizeOf):
        return SizeOf(name_of(value.value), value.dim, value.found)
    if isinstance(value, Computed):
        return Computed(value.function, tuple(renamed(arg, name_of) for arg in value.args))
    if isinstance(value, Decision):
        return Decision(renamed(value.formula, name_of), value.found)
    return with_formula(plain(value), renamed(value.formula, name_of)) if isinstance(value, _Sized) else value


def _computes(function: Callable[..., Any], is_swapped: bool = False) -> Callable[..., Any]:
    """Return the method of a number with a formula that computes another one; swapped, the other operand comes first."""

    def compute(*operands: Any) -> Any:
        """Return the number with its formula."""
        if not all(isinstance(operand, int | float) for operand in operands):
            return NotImplemented
        ordered = operands[::-1] if is_swapped else operands
        found = function(*map(plain, ordered))
        return with_formula(found, Computed(function, tuple(map(formula_of, ordered))))

    return compute


def _decides(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method of a number with a formula that finds something out about it, and reports that."""

    def decide(*operands: Any) -> Any:
        """Return what is found, and report it."""
        if not all(isinstance(operand, int | float) for operand in operands):
            return NotImplemented
        return decided(function(*map(plain, operands)), Computed(function, tuple(map(formula_of, operands))))

    return decide


class _Sized:
    """Arithmetic and comparisons of a number with a formula."""

    formula: Formula

    __add__, __radd__ = _computes(operator.add), _computes(operator.add, True)
    __sub__, __rsub__ = _computes(operator.sub), _computes(operator.sub, True)
    __mul__, __rmul__ = _computes(operator.mul), _computes(operator.mul, True)
    __truediv__, __rtruediv__ = _computes(operator.truediv), _computes(operator.truediv, True)
    __floordiv__, __rfloordiv__ = _computes(operator.floordiv), _computes(operator.floordiv, True)
    __mod__, __rmod__ = _computes(operator.mod), _computes(operator.mod, True)
    __pow__, __rpow__ = _computes(operator.pow), _computes(operator.pow, True)
    __neg__, __pos__, __abs__ = _computes(operator.neg), _computes(operator.pos), _computes(abs)
    __floor__, __ceil__, __trunc__ = _computes(math.floor), _computes(math.ceil), _computes(math.trunc)
    __round__ = _computes(round)
    __lt__, __le__ = _decides(operator.lt), _decides(operator.le)
    __gt__, __ge__ = _decides(operator.gt), _decides(operator.ge)
    __eq__, __ne__ = _decides(operator.eq), _decides(operator.ne)
    __bool__, __hash__ = _decides(bool), _decides(hash)
    __int__, __float__ = _decides(int), _decides(float)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy is made of: the plain number when the trace is over, as of a size that a module keeps as an attribute."""
        is_traced = any(isinstance(size.value, Node) for size in sizes_in(self.formula))
        return (type(plain(self)), (plain(self),)) if is_traced else (type(self), (plain(self), self.formula))

    def __divmod__(self, other: Any) -> Any:
        """Return quotient and remainder."""
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        """Return quotient and remainder."""
        return other // self, other % self


class SizeInt(_Sized, int):
    """An int that a forward pass computed from sizes."""

    __and__, __rand__ = _computes(operator.and_), _computes(operator.and_, True)
    __or__, __ror__ = _computes(operator.or_), _computes(operator.or_, True)
    __lshift__, __rlshift__ = _computes(operator.lshift), _computes(operator.lshift, True)
    __rshift__, __rrshift__ = _computes(operator.rshift), _computes(operator.rshift, True)

    def __new__(cls, found: int, formula: Formula) -> "SizeInt":
        """Return a number with its formula."""
        number = super().__new__(cls, found)
        number.formula = formula
        return number


class SizeFloat(_Sized, float):
    """A float that a forward pass computed from sizes."""

    def __new__(cls, found: float, formula: Formula) -> "SizeFloat":
        """Return a number with its formula."""
        number = super().__new__(cls, found)
        number.formula = formula
        return number
