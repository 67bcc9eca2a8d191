"""Forward plans: the forward pass of a module as data, so that it can be regenerated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gator.graph.numbers import Decision, SizeOf


@dataclass(frozen=True)
class Ref:
    """Stands for the value of another step, or an input of the plan, in the arguments of a Step."""

    name: str


@dataclass(frozen=True)
class Attribute:
    """Stands for a parameter or buffer of the module, or one of its modules, in the arguments of a Step."""

    name: str


@dataclass(frozen=True)
class InTraining:
    """Stands for a number that holds in training mode and is 0 in eval mode, in the arguments of a Step."""

    value: float


@dataclass(frozen=True)
class Made:
    """Stands for what a module returns in a class of its own, such as a dataclass or a subclass of dict."""

    cls: type
    parts: dict[Any, Any]
    is_dataclass: bool
    is_mapping: bool


@dataclass(frozen=True, eq=False)
class Gather:
    """A value of a plan that picks entries of another one along a dimension, by views that are not rectangular once pruned."""

    source: str
    dim: int
    places: Tensor
    """(size of that dimension,) int64: which entry of the source each entry is."""


@dataclass(frozen=True, eq=False)
class Step:
    """One call in the forward pass of a module: of another module, or of a function."""

    name: str
    nodes: frozenset[str]
    """Nodes of the exported graph that the step stands for."""
    module: str | None
    """Name of the module that is called, relative to the plan's own; None for a function."""
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    """What it returns: a Ref, or Refs nested in tuples, lists and dictionaries."""

    def inputs(self) -> set[str]:
        """Return the names of the values that this step reads."""
        return {ref.name for ref in refs_in((self.args, self.kwargs))}

    def outputs(self) -> set[str]:
        """Return the names of the values that this step makes."""
        return {ref.name for ref in refs_in(self.output)}

    def attributes(self) -> set[str]:
        """Return the names of the parameters, buffers and modules that this step uses."""
        names = {self.module} if self.module is not None else set()
        given = self.args, self.kwargs
        map_nested(lambda a: names.add(a.name) if isinstance(a, Attribute) else a, given)
        return names


def refs_in(arguments: Any) -> list[Ref]:
    """Return every Ref in nested arguments."""
    refs: list[Ref] = []
    map_nested(lambda a: refs.append(a) if isinstance(a, Ref) else a, arguments)
    return refs


def map_nested(change: Callable[[Any], Any], value: Any) -> Any:
    """Return nested arguments with every leaf changed; tuples, lists, dictionaries, slices and Made keep their types."""
    if isinstance(value, (tuple, list)):
        parts = [map_nested(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: map_nested(change, part) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(map_nested(change, part) for part in (value.start, value.stop, value.step)))
    if isinstance(value, Made):
        return replace(value, parts=map_nested(change, value.parts))
    return change(value)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which channel each entry of a value belongs to."""

    channels: Tensor
    """Of the value's shape for program.SAMPLES samples, int64: index into the concatenation of all groups' channels; -1 stays."""

    def distinct(self) -> Tensor:
        """Return (n,) int64: the channels that occur in the value."""
        channels = compact(self.channels).unique()
        return channels[channels >= 0]

    def kept(self, keep_C: Tensor) -> list[Tensor] | None:
        """Return for each dimension the (size,) bool mask of what remains of it; None when that is not a rectangle.

        A value of no channels keeps the dimensions along which its channels do not vary, such as positions.
        keep_C: (all channels + 1,) bool; the last one is for what stays.
        """
        keep = keep_C[compact(self.channels)]
        masks = [_any_but(keep, dim) for dim in range(keep.dim())]
        if keep.numel() > 1 and not bool(keep.any()):
            masks = [mask | (len(mask) == 1) for mask in masks]
        rectangle = torch.ones((), dtype=torch.bool)
        for dim, mask in enumerate(masks):
            rectangle = rectangle & mask.view([-1 if other == dim else 1 for other in range(keep.dim())])
        if not torch.equal(rectangle.expand_as(keep), keep):
            return None
        return [mask.expand(size) for mask, size in zip(masks, self.channels.shape, strict=True)]


def _any_but(mask: Tensor, dim: int) -> Tensor:
    """Return (size,) bool: whether anything is set at each place of a dimension."""
    others = [other for other in range(mask.dim()) if other != dim]
    return mask.any(dim=others) if others else mask


@dataclass(frozen=True, eq=False)
class TrainingEnd:
    """What a forward() does in training mode instead of its last steps."""

    begin: int
    """How many of the plan's steps both modes run."""
    steps: tuple[Step, ...]
    output: Any


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """The forward pass of a module, to be regenerated without branches, for other widths, or with gates."""

    module: str
    """Name of the module in named_modules()."""
    inputs: tuple[tuple[str, str | None, Any], ...]
    """Parameters of forward(), in order: name, name of the value, and a default for arguments that are not values."""
    steps: tuple[Step, ...]
    output: Any
    """What forward() returns, Refs nested in tuples, lists and dictionaries."""
    constants: dict[str, Tensor]
    """Tensors that forward() makes of Python numbers, by name of the value."""
    layouts: dict[str, Layout]
    """Of the values that steps move or cut into parts."""
    gathers: dict[str, Gather]
    """Of channel shuffles, by name of the value that comes out."""
    channels: Tensor
    """(n,) int64: the channels that flow through a forward() that states sizes. It is regenerated if any of them is pruned, because
    it may compute a size from that of a value."""
    batch: tuple[str, int, int] | None
    """An input that holds the batch: name of the value, dimension, entries per sample."""
    is_overwritten: bool
    """Whether what reads the output writes over it in place, so that it must not be the input itself."""
    input_sizes: tuple[SizeOf, ...]
    """Sizes of the inputs that do not depend on the batch."""
    decisions: tuple[Decision, ...]
    """What forward() decided by sizes. It may do something else where another decision is found."""
    training: TrainingEnd | None = None
    """What training mode does otherwise; None when both modes run the same steps."""

    def common_steps(self) -> tuple[Step, ...]:
        """Return the steps that both modes run."""
        return self.steps if self.training is None else self.steps[: self.training.begin]

    def in_training(self) -> "ForwardPlan | None":
        """Return the plan of training mode; None when it is that of eval mode."""
        if self.training is None:
            return None
        steps = (*self.common_steps(), *self.training.steps)
        return replace(self, steps=steps, output=self.training.output, training=None)


def compact(labels: Tensor) -> Tensor:
    """Return labels with size 1 along every dimension of stride 0, where they only repeat."""
    for dim in range(labels.dim()):
        labels = labels.narrow(dim, 0, 1) if labels.stride(dim) == 0 else labels
    return labels
