"""The table of rules: for each ATen op, how channels pass through it and whether a zero channel stays zero."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from gator.tracing.walk import Labels, Rule, Walk, Zeros

aten = torch.ops.aten
RULES: dict[Any, Rule] = {}


def rule(*ops: Any, zeros: Zeros) -> Callable[[Callable[[Walk, Node], Labels]], Callable[[Walk, Node], Labels]]:
    """Register a function in the table for these ops, and for those of the same name that write over their input."""

    def register(function: Callable[[Walk, Node], Labels]) -> Callable[[Walk, Node], Labels]:
        RULES.update({op: Rule(function, zeros) for given in ops for op in (given, *_in_place(given))})
        return function

    return register


def named(names: str) -> tuple[Any, ...]:
    """Return the default overloads of ATen ops.

    >>> named("relu gelu")[1]
    <OpOverload(op='aten.gelu', overload='default')>
    """
    return tuple(getattr(aten, name).default for name in names.split())


def _in_place(op: Any) -> Iterator[Any]:
    packet = getattr(aten, f"{op._schema.name.removeprefix('aten::')}_", None) if hasattr(op, "_schema") else None
    names = (op._overloadname, op._overloadname.removeprefix("Tensor_")) if packet is not None else ()
    yield from (getattr(packet, name) for name in names if name in packet.overloads())  # type: ignore[union-attr]
