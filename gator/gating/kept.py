"""Values that a training step needs several times, computed once for as long as the tensors they depend on are unchanged."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Kept:
    """A tensor computed from others, kept until one of them changes. Copies and pickles start empty.

    A change is another tensor, or a write that torch counts in the tensor's version. Inside compiled code and of inference tensors,
    where torch counts none, nothing is kept. torch does not count what compiled code writes either: name a tensor that
    each pass creates among the sources.
    """

    def __init__(self) -> None:
        self._sources: tuple[Any, ...] = ()
        self._versions: list[int] = []
        self._value: Tensor | None = None

    def get(self, compute: Callable[[], Tensor], *sources: Any) -> Tensor:
        """Return the value for these tensors, and other objects that do not change; callers must not write to it."""
        if torch.compiler.is_compiling() or any(isinstance(x, Tensor) and x.is_inference() for x in sources):
            return compute()
        versions = [source._version for source in sources if isinstance(source, Tensor)]
        is_same = len(sources) == len(self._sources) and all(map(_is, sources, self._sources))
        if self._value is None or not is_same or versions != self._versions:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # else a step could not save for backward what evaluation left
                self._value, self._sources, self._versions = compute(), sources, versions
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def _is(one: Any, other: Any) -> bool:
    return one is other
