"""What can be removed from a network, as frozen data: channels, groups of them, and whole blocks.

    ChannelGraph
    ├── groups   ChannelGroup: channels that are chosen one by one, and every tensor dimension they run through
    ├── locked   LockedGroup: channels that must stay, with the reason
    ├── blocks   Block: a residual branch that disappears when a group inside it is empty
    ├── layers   Layer: one use of a convolution or linear weight, for costs; products: those of two computed values
    ├── sites    GateSite: where a mask makes "closed" mean "exactly zero"
    └── ops      Op: one call that takes time, for latencies

A group is a list of tensor dimensions, not of modules: pruning is an index_select on each, and costs, gates and JSON read the same list.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gator.labels import compact
from gator.ops import Op
from gator.selection import Selection


@dataclass(frozen=True, eq=False)
class ChannelDim:
    """A dimension of a parameter or buffer that carries the channels of a group."""

    tensor: str
    """Name in named_parameters() or named_buffers(): "layer1.0.conv1.weight"."""
    dim: int
    index: Tensor
    """(num_channels, repeat) int64: the entries of this dimension that belong to each channel."""

    @property
    def repeat(self) -> int:
        """Entries per channel: 1 for a convolution, height times width for a linear layer after flatten."""
        return self.index.shape[1]

    def entries(self, keep: Tensor) -> Tensor:
        """Return the entries of the channels `keep` ((k,) int64) as a flat (k * repeat,) tensor."""
        return self.index[keep].flatten()


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of which any non-empty subset may stay, each with all the tensor entries that live and die with it."""

    name: str
    """Name of the first layer that writes the group."""
    num_channels: int
    dims: tuple[ChannelDim, ...]
    layers: frozenset[tuple[str, str]]
    """(module name, "out" or "in") of every convolution and linear layer that writes or reads the group."""
    block: str | None
    """Name of the block that is removed when this group is empty; None when its last channel must stay."""

    def __str__(self) -> str:
        members = ", ".join(f"{module}:{side}" for module, side in sorted(self.layers))
        removable = f"  [removes {self.block}]" if self.block else ""
        return f"{self.name}  {self.num_channels} channels  {members}{removable}"


@dataclass(frozen=True)
class LockedGroup:
    """Channels that cannot be cut, and why."""

    name: str
    num_channels: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name}  {self.num_channels} channels  locked: {self.reason}"


@dataclass(frozen=True)
class Layer:
    """One use of a convolution or linear weight in the forward pass."""

    module: str
    weight: str
    """Name of the weight. Every entry of it makes `positions` multiply-adds per image."""
    positions: int
    """Output positions per image: height times width, or tokens; 1 for a classifier. Of the input if it is transposed."""
    out_dim: int
    """Dimension of the weight along which outputs are numbered."""
    outputs: float
    """Output values per image for each entry of that dimension."""


@dataclass(frozen=True, eq=False)
class Product:
    """One product of two computed values in the forward pass, as attention has two; no weight of the network is in it."""

    module: str
    macs: float
    """Multiply-adds per image."""
    channels: Tensor
    """(n,) int64: index into the concatenation of all groups' channels, over which the multiply-adds are spread evenly; -1 stays."""
    block: str | None
    """Block without which it does not run."""


@dataclass(frozen=True, eq=False)
class GateSite:
    """A value that is multiplied by the mask, so that a closed channel is exactly zero from there on."""

    module: str
    step: str | None
    """Step of the module's Plan that makes the value; None when it is what the module returns."""
    dim: int
    """Dimension of the value that carries the channels."""
    channels: Tensor
    """(size of that dimension,) int64: index into the concatenation of all groups' channels; -1 is never masked."""
    batch_dim: int | None
    """Dimension that holds the batch; None when it is computed once for all samples."""
    per_sample: int
    """Consecutive entries of that dimension that belong to one sample: 1, or the number of windows of an image."""
    block: str | None
    """Block whose branch ends here: its removal silences the whole output."""
    normalises: bool = False
    """Whether the step is a layer normalisation over the channels, whose mean and variance are those of the open ones."""


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


@dataclass(frozen=True, eq=False)
class Gather:
    """A value of a plan that picks entries of another one along a dimension, by way of views that are no rectangle once cut."""

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
        torch.fx.node.map_aggregate(
            (self.args, self.kwargs), lambda a: names.add(a.name) if isinstance(a, Attribute) else a
        )
        return names


def refs_in(arguments: Any) -> list[Ref]:
    """Return every Ref in nested arguments."""
    refs: list[Ref] = []
    torch.fx.node.map_aggregate(arguments, lambda a: refs.append(a) if isinstance(a, Ref) else a)
    return refs


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
        """Return for each dimension the (size,) bool mask of what is left of it; None when that is no rectangle.

        keep_C: (all channels + 1,) bool; the last one is for what stays.
        """
        keep = keep_C[compact(self.channels)]
        masks = [_any_but(keep, dim) for dim in range(keep.dim())]
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
class Plan:
    """The forward pass of a module, so that it can be written again: without branches, for other widths, or with gates."""

    inputs: tuple[tuple[str, str | None, Any], ...]
    """Parameters of forward(), in order: name, name of the value, and a default for what is no value."""
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
    """(n,) int64: the channels that flow through a forward() that states sizes. It is written again if any of them is cut, for it
    may compute a size from that of a value."""
    batch: tuple[str, int, int] | None
    """An input that holds the batch: name of the value, dimension, entries per sample."""
    is_overwritten: bool
    """Whether what reads the output writes over it in place, so that it must not be the input itself."""


@dataclass(frozen=True)
class Block:
    """A residual branch. When one of its inner groups is empty the branch is gone, and so are the other groups."""

    name: str
    container: str
    """Module whose forward pass contains the branch and the addition that ends it."""
    groups: tuple[str, ...]
    tensors: frozenset[str]
    """Parameters and buffers that only the branch uses."""
    branch: frozenset[str]
    """Steps of the container's plan that make up the branch."""
    nodes: frozenset[str]
    """Ops of the exported graph in it, those of the modules it calls included."""
    addition: str
    """Step that adds the branch to the shortcut."""
    output: str
    """Step whose value the branch adds."""
    shortcut: str
    """Step (or the container's input) that remains of the addition."""


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All that is known about what can be removed from one network. Made by gator.trace()."""

    model: str
    """Class name of the traced network."""
    input_shapes: tuple[tuple[int, ...], ...]
    selection: Selection
    """What trace() was told to include and exclude."""
    groups: tuple[ChannelGroup, ...]
    locked: tuple[LockedGroup, ...]
    blocks: tuple[Block, ...]
    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    sites: tuple[GateSite, ...]
    ops: tuple[Op, ...]
    plans: dict[str, Plan]
    parameters: dict[str, tuple[int, ...]]
    """Shape of every parameter of the network; a tied one stands here once, under its first name."""

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each group's channels begin in the concatenation of all groups' channels."""
        offsets, total = {}, 0
        for group in self.groups:
            offsets[group.name] = total
            total += group.num_channels
        return offsets

    @cached_property
    def num_channels(self) -> int:
        """Number of channels of all groups together."""
        return sum(group.num_channels for group in self.groups)

    @cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        """Return the groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def full_macs(self) -> int:
        """Multiply-adds per image of the unpruned network: MacsCost(graph).full."""
        return sum(layer.positions * math.prod(self.parameters[layer.weight]) for layer in self.layers)

    def group_of_channel(self) -> Tensor:
        """Return the (num_channels,) int64 position in `groups` of each channel of the concatenation."""
        sizes = torch.tensor([group.num_channels for group in self.groups], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.groups)), sizes)

    def removed_blocks(self, widths: dict[str, int]) -> list[Block]:
        """Return the blocks that are gone when the groups have these widths: one empty inner group is enough."""
        return [block for block in self.blocks if any(widths[name] == 0 for name in block.groups)]

    def mismatch(self, model: nn.Module) -> str | None:
        """Return how the parameters of `model` differ from those of the traced network; None when they fit."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in {**self.parameters, **shapes}:
            if shapes.get(name) != self.parameters.get(name):
                return (
                    f"the graph was traced on another network: parameter {name!r} has shape {shapes.get(name, 'missing')} in the "
                    f"model, {self.parameters.get(name, 'missing')} in the graph; trace this model"
                )
        return None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the structure: equal for equal groups, sizes and tensor entries, whatever the weights are."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(f"{group.name}:{group.num_channels}:{group.block}".encode())
            for dim in group.dims:
                digest.update(f"{dim.tensor}:{dim.dim}:{dim.index.flatten().tolist()}".encode())
        return digest.hexdigest()[:16]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __str__(self) -> str:
        """Return groups with what they cost, the share of the network that can be reached, and what is locked and why."""
        from gator.summary import summarise  # late: costs, on which summaries rest, are made of graphs

        return str(summarise(self))
