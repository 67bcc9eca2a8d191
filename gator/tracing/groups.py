"""Channel groups from labels: channels that run through the same tensor dimensions form one group."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from gator.graph.graph import ChannelDim, ChannelGroup, LockedGroup
from gator.graph.plans import compact
from gator.graph.selection import Selection
from gator.tracing.labels import STATIC, Entry, LabelBook
from gator.tracing.placing import Channels
from gator.tracing.rules import pooling
from gator.tracing.walk import Walk

aten = torch.ops.aten
_NEVER = torch.iinfo(torch.int64).max
_NOT_OF_NOTHING = (
    *(aten.view.default, aten.reshape.default, aten.unflatten.int, aten.reshape_as.default, aten.view_as.default),
    *(aten.pad.default, aten.group_norm.default),
)
"""Ops that torch does not compute of no channels, or whose sizes are not known then."""


def gather_groups(book: LabelBook, selection: Selection) -> tuple[tuple[ChannelGroup, ...], tuple[LockedGroup, ...]]:
    """Return the groups and the locked groups."""
    roots = book.roots()
    entries = list(book.entries.values())
    lines = [roots[entry.labels.clamp(min=0)].where(entry.labels != STATIC, STATIC) for entry in entries]
    signature, first_seen = _signatures(lines, book.num_labels)
    reasons = list(book.lock_reasons(roots).items())
    reason_of_root = torch.full((book.num_labels,), -1)
    for number, (_, locked) in enumerate(reasons):
        reason_of_root[locked] = number
        signature[locked] += _salt(-1 - number)

    families = _families(signature, first_seen)
    dims = _dims_by_family(entries, lines, families, book.num_labels)
    sides = {(entry.tensor, entry.dim): entry.sides for entry in entries}
    groups, locked_groups, names = [], [], set[str]()
    for members, own in zip(families, dims, strict=True):
        name = _unique(_name(own, sides), names)
        layers = frozenset((_owner(dim.tensor), side) for dim in own for side in sides[dim.tensor, dim.dim])
        number = int(reason_of_root[members[0]])
        writers = {module for module, side in layers if side == "out"} or {_owner(own[0].tensor)}
        reason = reasons[number][0] if number >= 0 else selection.why_not(writers)
        if reason is None:
            groups.append(ChannelGroup(name, len(members), tuple(own), layers, block=None))
        else:
            locked_groups.append(LockedGroup(name, len(members), reason))
    return tuple(groups), tuple(locked_groups)


def parts_that_may_be_empty(
    walk: Walk, groups: tuple[ChannelGroup, ...], channels: Channels
) -> Iterator[tuple[Tensor, str]]:
    """Yield one label of each value that holds only parts of groups, and that an op reads which needs a channel."""
    sizes = torch.tensor([group.num_channels for group in groups], dtype=torch.int64)
    group_of = torch.arange(len(groups)).repeat_interleave(sizes)
    for node in walk.nodes if groups else ():
        if not _needs_a_channel(walk, node):
            continue
        labels = walk.values.get(node.all_input_nodes[0])
        if isinstance(labels, Tensor):
            found = channels.distinct(labels)
            own = found.unique()
            counts = torch.bincount(group_of[own.clamp(min=0)], minlength=len(groups))
            if len(own) and int(own[0]) >= 0 and not bool((counts == sizes).any()):
                first = (found == own[0]).nonzero()[0]
                yield (
                    compact(labels)[tuple(first)][None],
                    f"{walk.describe(node)} needs a channel of this part of a group",
                )


def _needs_a_channel(walk: Walk, node: Node) -> bool:
    """Whether torch cannot compute an op of no channels, or computes NaN."""
    rule = walk.rules.get(node.target)
    if rule is not None and rule.labels is pooling.reduction:
        return node in walk.normalisations
    is_pooling = rule is not None and rule.labels in (pooling.pooling, pooling.unfolding)
    return is_pooling or node.target in _NOT_OF_NOTHING


def _signatures(lines: list[Tensor], num_labels: int) -> tuple[Tensor, Tensor]:
    """Return per root a hash of its dimensions, with multiplicity, and the place of its first appearance."""
    signature = torch.zeros(num_labels, dtype=torch.int64)
    first_seen = torch.full((num_labels,), _NEVER)
    begin = 0
    for number, line in enumerate(lines):
        places = (line != STATIC).nonzero().flatten()
        signature.index_add_(0, line[places], torch.full((len(places),), _salt(number)))
        first_seen.scatter_reduce_(0, line[places], begin + places, "amin")
        begin += len(line)
    return signature, first_seen


def _salt(number: int) -> int:
    """Return a fixed random 62-bit number for an integer, so that the sums over different sets of them differ."""
    generator = torch.Generator().manual_seed(0x6A7E + number)
    return int(torch.randint(1, 2**62, (), generator=generator))


def _families(signature: Tensor, first_seen: Tensor) -> list[Tensor]:
    """Return the roots of equal signature together, families and roots both in order of first appearance."""
    used = (first_seen < _NEVER).nonzero().flatten()
    used = used[first_seen[used].argsort()]
    _, family, sizes = signature[used].unique(return_inverse=True, return_counts=True)
    families = used[family.argsort(stable=True)].split(sizes.tolist())
    return sorted(families, key=lambda members: int(first_seen[members[0]]))


def _dims_by_family(
    entries: list[Entry], lines: list[Tensor], families: list[Tensor], num_labels: int
) -> list[list[ChannelDim]]:
    """Return for each family the tensor dimensions it runs through, with the places of each member."""
    family_of = torch.full((num_labels,), -1)
    rank_of = torch.zeros(num_labels, dtype=torch.int64)
    for number, members in enumerate(families):
        family_of[members] = number
        rank_of[members] = torch.arange(len(members))
    dims: list[list[ChannelDim]] = [[] for _ in families]
    for entry, line in zip(entries, lines, strict=True):
        family = family_of[line.clamp(min=0)].where(line != STATIC, -1)
        for number in family.unique().tolist():
            if number >= 0:
                places = (family == number).nonzero().flatten()
                places = places[rank_of[line[places]].argsort(stable=True)]
                index = places.view(len(families[number]), -1)
                dims[number].append(ChannelDim(entry.tensor, entry.dim, index, entry.sides))
    return dims


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _name(dims: list[ChannelDim], sides: dict[tuple[str, int], tuple[str, ...]]) -> str:
    """Return the first layer that writes the channels, else the owner of the first tensor."""
    writers = (dim for dim in dims if "out" in sides[dim.tensor, dim.dim])
    return _owner(next(writers, dims[0]).tensor) or dims[0].tensor


def _unique(name: str, names: set[str]) -> str:
    """Return a name not taken yet: conv1, conv1#2, conv1#3 when a layer's outputs fall into several groups."""
    count, candidate = 1, name
    while candidate in names:
        count += 1
        candidate = f"{name}#{count}"
    names.add(candidate)
    return candidate
