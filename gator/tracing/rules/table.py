"""The table of rules: for each ATen op, how channels pass through it and whether a zero channel stays zero."""

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from gator.tracing.walk import Labels, Rule, Walk, Zeros

RULES: dict[Any, Rule] = {}


def rule(*ops: Any, zeros: Zeros) -> Callable[[Callable[[Walk, Node], Labels]], Callable[[Walk, Node], Labels]]:
    """Register a function in the table for these ops."""

    def register(function: Callable[[Walk, Node], Labels]) -> Callable[[Walk, Node], Labels]:
        RULES.update({op: Rule(function, zeros) for op in ops})
        return function

    return register
