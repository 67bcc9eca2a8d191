"""Sizes that forward passes read while they are exported, followed to the numbers and decisions that they lead to.

An exported graph holds numbers only: from `q * q.shape[1] ** -0.5` it keeps the product. What a network does for another width
or image size depends on how its own code computes these numbers.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gator.graph.numbers import (
    Decision,
    SizeFloat,
    SizeInt,
    SizeOf,
    decided,
    decisions_reported,
    formula_of,
    plain,
    with_formula,
)

TORCH_FOLDER = str(Path(torch.__file__).parent)
LOSING = {"range", "numel", "log", "log2", "log10", "exp", "isqrt", "gcd", "np", "numpy"}
"""Names in a function that may take a number apart in C, so that its formula is lost unseen."""
_SHAPE, _SIZE, _LENGTH = Tensor.shape.__get__, Tensor.size, Tensor.__len__  # type: ignore[attr-defined]
_COUNTS = (Tensor.numel, Tensor.nelement, torch.numel)
_DIMENSIONS = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim")
_DROPOUTS = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
}
_SHAPING = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.expand.default)


class SizeReads(TorchFunctionMode):
    """While active, sizes that the exported code reads are numbers with formulas, and ops keep those that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: dict[str, dict[Decision, None]] = {}
        """Key of a call -> what its own code decided, in order."""

    def __enter__(self) -> "SizeReads":
        """Begin to follow sizes."""
        self._reporting = decisions_reported(self._note)
        self._reporting.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End it."""
        super().__exit__(*error)
        self._reporting.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch; give its sizes formulas, and the nodes that it makes the formulas of its arguments."""
        kwargs, mode = kwargs or {}, get_proxy_mode()
        if mode is None:
            return func(*args, **kwargs)
        if func in (_SHAPE, _SIZE, _LENGTH, *_COUNTS):
            return _read(func, args, kwargs)
        if getattr(func, "__name__", "") in _DROPOUTS and args:
            # In eval mode they return the very tensor that they get, which would then stand for what they return wherever it is read.
            args = (torch.ops.aten.alias.default(args[0]), *args[1:])
        given = list(_numbers((args, kwargs)))
        nodes = mode.tracer.graph.nodes
        last = next(iter(reversed(nodes)), None)
        result = func(*changed(args, plain), **changed(kwargs, plain))
        made = list(itertools.takewhile(lambda node: node is not last, reversed(nodes)))[::-1]
        if any(isinstance(number, SizeInt | SizeFloat) for number in given):
            _keep_formulas(given, made)
        if isinstance(func, FunctionType) and func.__code__.co_filename.startswith(TORCH_FOLDER):
            _note_hidden_reads(given, made, tree_leaves((args, kwargs)))
        return result

    def _note(self, decision: Decision) -> None:
        mode = get_proxy_mode()
        stack = [] if mode is None else list(mode.tracer.module_stack)
        if stack:
            self.decisions.setdefault(stack[-1], {})[decision] = None


def changed(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """Return nested arguments with each leaf changed."""
    if isinstance(arguments, slice):
        return slice(*(changed(part, change) for part in (arguments.start, arguments.stop, arguments.step)))
    if isinstance(arguments, dict):
        items = {key: changed(value, change) for key, value in arguments.items()}
        return arguments if all(items[key] is arguments[key] for key in items) else type(arguments)(items)
    if isinstance(arguments, tuple | list):
        parts = [changed(part, change) for part in arguments]
        if all(new is old for new, old in zip(parts, arguments, strict=True)):
            return arguments
        return type(arguments)(*parts) if hasattr(arguments, "_fields") else type(arguments)(parts)
    return change(arguments)


def _read(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a size, all sizes or their product, with formulas; as they are to the code of torch itself."""
    found, tensor, code, node = func(*args, **kwargs), args[0], _reader().f_code, _node_of(args[0])
    if node is None or code.co_filename.startswith(TORCH_FOLDER):
        return found
    sizes = [with_formula(size, SizeOf(node, dim, size)) for dim, size in enumerate(tensor.shape)]
    if func in _COUNTS:
        return math.prod(sizes)
    if not isinstance(found, torch.Size):
        sizes = [sizes[args[1] if len(args) > 1 else kwargs.get("dim", 0)]]
    if LOSING & {*code.co_names} or func is _LENGTH:
        _lose(sizes)
    return torch.Size(sizes) if isinstance(found, torch.Size) else sizes[0]


def _reader() -> FrameType:
    """Return the frame whose code reads a size."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__":
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


def _node_of(tensor: Tensor) -> Node | None:
    mode = get_proxy_mode()
    return None if mode is None else get_proxy_slot(tensor, mode.tracer, None, lambda slot: slot.proxy.node)


def _numbers(arguments: Any) -> Iterator[Any]:
    """Yield the numbers in nested arguments."""
    found: list[Any] = []
    changed(arguments, lambda leaf: found.append(leaf) or leaf)  # type: ignore[func-returns-value]
    return filter(_is_number, found)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int | float) and not isinstance(leaf, bool)


def _keep_formulas(given: list[Any], made: list[Node]) -> None:
    """Put numbers with formulas in place of the plain ones in the arguments of nodes that a call with them has made.

    A number that cannot be found among those arguments is lost: its formula is a decision.
    """
    found = [number for node in made for number in _numbers(_sizes_given(node))]
    if list(map(plain, given)) == found:
        found = given
    else:
        for value in dict.fromkeys(map(plain, given)):
            own = [number for number in given if plain(number) == value]
            places = [place for place, number in enumerate(found) if plain(number) == value]
            for place, number in zip(places, own, strict=False):
                found[place] = number if len(own) == len(places) else value
            if len(own) != len(places):
                _lose(own)
    numbers = iter(found)
    for node in made:
        sizes = changed(_sizes_given(node), lambda leaf: next(numbers) if _is_number(leaf) else leaf)
        node.args, node.kwargs = (
            tuple(sizes.get(number, arg) for number, arg in enumerate(node.args)),
            {name: sizes.get(name, arg) for name, arg in node.kwargs.items()},
        )


def _lose(numbers: list[Any]) -> None:
    """Report numbers whose formulas are lost from here on."""
    for number in numbers:
        if formula_of(number) is not number:
            decided(plain(number), number.formula)


def _sizes_given(node: Node) -> dict[int | str, Any]:
    """Return a node's arguments by position or name, without numbers of dimensions."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else [""] * len(node.args)
    given: dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    return {key: arg for key, arg in given.items() if (key if isinstance(key, str) else names[key]) not in _DIMENSIONS}


def _note_hidden_reads(given: list[Any], made: list[Node], leaves: list[Any]) -> None:
    """Report all sizes of the tensors that a function of torch gets, if its own code has computed a size from them."""
    shaped = {plain(number) for node in made if node.target in _SHAPING for number in _numbers(node.args)}
    if shaped - {-1, *map(plain, given)}:
        for leaf in leaves:
            node = _node_of(leaf) if isinstance(leaf, Tensor) else None
            for dim, size in enumerate(leaf.shape if node is not None else ()):
                decided(size, SizeOf(node, dim, size))
