"""The channel graph: channels, groups of channels and whole blocks that can be removed from a network, as frozen data.

    ChannelGraph
    ├── groups   ChannelGroup: channels that are chosen one by one, and every tensor dimension they run through
    ├── locked   LockedGroup: channels that must stay, with the reason
    ├── blocks   Block: a residual branch that disappears when a group inside it is empty
    ├── layers   Product: one use of the weight of a convolution, linear or recurrent layer, for costs
    ├── products Product: one product of other values, of which attention has two, for costs
    ├── sites    GateSite: where a mask makes "closed" mean "exactly zero"
    └── ops      Op: one call that takes time, for latencies

A group is a list of tensor dimensions, not of modules: pruning is an index_select on each, and costs, gates and JSON read the same list.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from gator.graph.ops import Op
from gator.graph.plans import ForwardPlan
from gator.graph.selection import Selection


@dataclass(frozen=True, eq=False)
class ChannelDim:
    """A dimension of a parameter or buffer that carries the channels of a group."""

    tensor: str
    """Name in named_parameters() or named_buffers(): "layer1.0.conv1.weight"."""
    dim: int
    index: Tensor
    """(num_channels, repeat) int64: the entries of this dimension that belong to each channel."""
    sides: tuple[str, ...] = ()
    """Of a layer's weight: "out", "in", or both when the layer is depthwise."""

    @property
    def repeat(self) -> int:
        """Entries per channel: 1 for a convolution, height times width for a linear layer after flatten."""
        return self.index.shape[1]

    def entries(self, keep: Tensor) -> Tensor:
        """Return the entries of the channels `keep` ((k,) int64) as a flat (k * repeat,) tensor."""
        return self.index[keep].flatten()


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of which any non-empty subset may stay, each with all the tensor entries that are pruned with it."""

    name: str
    """Name of the first layer that writes the group."""
    num_channels: int
    dims: tuple[ChannelDim, ...]
    layers: frozenset[tuple[str, str]]
    """(module name, "out" or "in") of every convolution and linear layer that writes or reads the group."""
    block: str | None
    """Name of the block that is removed when this group is empty; None when its last channel must stay."""

    @property
    def members(self) -> str:
        """The layers as text: "layer1.0.conv1:out, layer1.0.conv2:in  [removes layer1.0]"."""
        layers = ", ".join(f"{module}:{side}" for module, side in sorted(self.layers))
        return layers if self.block is None else f"{layers}  [removes {self.block or 'a branch of the network'}]"

    def __str__(self) -> str:
        return f"{self.name}  {self.num_channels} channels  {self.members}"


@dataclass(frozen=True)
class LockedGroup:
    """Channels that cannot be pruned, with the reason."""

    name: str
    num_channels: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name}  {self.num_channels} channels  locked: {self.reason}"


@dataclass(frozen=True, eq=False)
class Term:
    """coefficient * the product of some widths, each linear in the widths of the groups."""

    coefficient: float
    widths: tuple[Tensor, ...]
    """(G + 1,) float64 each: entries of a dimension per channel of each group, then those outside all groups."""
    is_zero_at_one: bool = False
    """Whether the term is 0 where the first width is 1."""

    def of(self, group_widths: Tensor) -> Tensor:
        """Return the term as a scalar tensor. group_widths: (G + 1,) float64, channels of each group, then 1."""
        widths = [row @ group_widths for row in self.widths]
        is_zero = self.is_zero_at_one and float(widths[0]) <= 1
        return math.prod(widths, start=group_widths.new_tensor(0.0 if is_zero else self.coefficient))


@dataclass(frozen=True, eq=False)
class Product:
    """One product in the forward pass: a use of a layer's weight, or a product of two computed values."""

    module: str
    op: str
    """ATen's: conv2d, linear, gru, matmul, einsum, ..."""
    macs: Term
    """MACs per image."""
    outputs: Term
    """Values per image that it computes."""
    block: str | None
    """Block without which it does not run."""


@dataclass(frozen=True, eq=False)
class GateSite:
    """A value that is multiplied by the mask, so that a closed channel is exactly zero from there on."""

    module: str
    step: str | None
    """Step of the module's ForwardPlan that makes the value; None when it is what the module returns."""
    dim: int
    """Dimension of the value that carries the channels."""
    channels: Tensor
    """(size of that dimension,) int64: index into the concatenation of all groups' channels; -1 is never masked."""
    batch_dim: int | None
    """Dimension that holds the batch; None when it is computed once for all samples."""
    in_a_row: int
    """Consecutive entries of that dimension that belong to one sample: 1, or the number of windows of an image."""
    num_rows: int
    """How often the samples follow one another in that dimension: 1, or the number of frames where time comes first."""
    block: str | None
    """Block whose branch ends here: its removal makes the whole output zero."""
    normalises: bool = False
    """Whether the step is a layer normalisation over the channels, whose mean and variance are those of the open ones."""


@dataclass(frozen=True)
class Block:
    """A residual branch. When one of its inner groups is empty, the branch and the other groups are removed too."""

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
    is_overwritten: bool
    """Whether a module that the container calls writes over the sum or the shortcut inside its own forward pass."""


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """Everything that can be removed from one network, and what must stay. Made by gator.trace()."""

    model: str
    """Class name of the traced network."""
    input_shapes: tuple[tuple[int, ...], ...]
    input_dtypes: tuple[str, ...]
    """Without the prefix "torch.": "float32", "int64"."""
    selection: Selection
    """The include and exclude arguments of trace()."""
    groups: tuple[ChannelGroup, ...]
    locked: tuple[LockedGroup, ...]
    blocks: tuple[Block, ...]
    layers: tuple[Product, ...]
    products: tuple[Product, ...]
    uncounted: tuple[str, ...]
    """Ops that multiply matrices, but by widths that are not known: "aten.cdist at 'head'"; no cost counts them."""
    sites: tuple[GateSite, ...]
    ops: tuple[Op, ...]
    plans: dict[str, ForwardPlan]
    parameters: dict[str, tuple[int, ...]]
    """Shape of every parameter of the network; a tied one is here once, under its first name."""
    text: str = field(repr=False)
    """What print(graph) shows: the groups with their costs, the share of the network they reach, and locked groups with reasons."""

    @cached_property
    def offsets(self) -> dict[str, int]:
        """First channel of each group in the concatenation of all groups' channels."""
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
        """MACs per image of the unpruned network: MacsCost(graph).full."""
        extended = torch.cat([full_widths(self), torch.ones(1, dtype=torch.float64)])
        return round(sum(float(layer.macs.of(extended)) for layer in self.layers))

    @property
    def why_empty(self) -> str:
        """Why the network has no channels at all, where it has none: the ops that it runs."""
        counts = Counter(op.kind.name for op in self.ops)
        found = ", ".join(f"{name} ({count})" for name, count in counts.most_common()) or "nothing that takes time"
        return f"the exported graph has no convolution or linear layer; it runs {found}"

    def mask_of(self, keep: Mapping[str, Sequence[int]]) -> Tensor:
        """Return the (num_channels,) bool mask of kept channels by group name; groups that are not named are all False."""
        mask = torch.zeros(self.num_channels, dtype=torch.bool)
        for name, kept in keep.items():
            mask[self.offsets[name] + torch.tensor(kept, dtype=torch.int64)] = True
        return mask

    def keep_of(self, mask: Tensor) -> dict[str, list[int]]:
        """Return a (num_channels,) mask as kept channels by group name."""
        parts = mask.split([group.num_channels for group in self.groups])
        return {group.name: part.nonzero().flatten().tolist() for group, part in zip(self.groups, parts, strict=True)}

    def group_of_channel(self) -> Tensor:
        """Return the (num_channels,) int64 position in `groups` of each channel of the concatenation."""
        sizes = torch.tensor([group.num_channels for group in self.groups], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.groups)), sizes)

    def removed_blocks(self, widths: dict[str, int]) -> list[Block]:
        """Return the blocks that are removed when the groups have these widths: those with an empty inner group."""
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
        return self.text


def full_widths(graph: ChannelGraph) -> Tensor:
    """Return (G,) float64 widths of the unpruned network."""
    return torch.tensor([group.num_channels for group in graph.groups], dtype=torch.float64)
