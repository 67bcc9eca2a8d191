"""Labels: the channel that each entry of a tensor belongs to.

While tracing, every value that carries channels has a label tensor of its own shape. Entries with the same label are
pruned together; STATIC entries cannot be pruned. Labels that vary along one dimension only are stored expanded (stride 0), so an
op that moves data (view, permute, chunk, cat, ...) is followed by applying the same op to the labels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

STATIC = -1


@dataclass
class Entry:
    """A dimension of a parameter or buffer with the label of each of its entries."""

    tensor: str
    dim: int
    labels: Tensor
    """(size,) int64."""
    sides: tuple[str, ...]
    """Of a layer's weight: "out", "in", or both when the layer is depthwise, or the weight that of two layers."""


class LabelBook:
    """All labels of one trace: which of them are tied together, and which must stay."""

    def __init__(self) -> None:
        self.num_labels = 0
        self.entries: dict[tuple[str, int], Entry] = {}
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._locks: list[tuple[Tensor, str]] = []

    def fresh(self, count: int) -> Tensor:
        """Return (count,) unused labels."""
        self.num_labels += count
        return torch.arange(self.num_labels - count, self.num_labels)

    def tie(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Tie the entries at the same place of two label tensors (broadcast together).

        A label that meets STATIC is locked with `reason`.
        """
        one, other = _compact(*torch.broadcast_tensors(one, other))
        static = (one == STATIC) | (other == STATIC)
        if bool(static.any()):
            self.lock(torch.maximum(one, other)[static], reason)
            one, other = one[~static], other[~static]
        self._ties.append((one, other))

    def lock(self, labels: Tensor | None, reason: str) -> None:
        """Lock the channels with these labels: they must stay."""
        if labels is not None and labels.numel() > 0:
            labels = _compact(labels)[0].unique()
            self._locks.append((labels[labels != STATIC], reason))

    def bind(self, tensor: str, dim: int, labels: Tensor, sides: tuple[str, ...] = ()) -> Tensor:
        """Bind these labels to a dimension of a parameter or buffer. Returns the labels that it has from now on."""
        known = self.entries.get((tensor, dim))
        if known is None:
            self.entries[tensor, dim] = Entry(tensor, dim, labels, sides)
            return labels
        self.entries[tensor, dim] = replace(known, sides=tuple(dict.fromkeys((*known.sides, *sides))))
        self.tie(known.labels, labels, f"{tensor} is also used for channels that cannot be pruned")
        return known.labels

    def state(self) -> tuple[int, dict[tuple[str, int], Entry], int, int]:
        """Return what restore() needs to take back all that is added from now on."""
        return self.num_labels, dict(self.entries), len(self._ties), len(self._locks)

    def restore(self, state: tuple[int, dict[tuple[str, int], Entry], int, int]) -> None:
        """Take back all that was added since state()."""
        self.num_labels, self.entries, num_ties, num_locks = state
        del self._ties[num_ties:], self._locks[num_locks:]

    def roots(self) -> Tensor:
        """Return (num_labels,) int64: equal numbers for labels that are tied together."""
        one = torch.cat([torch.empty(0, dtype=torch.int64), *(tie[0] for tie in self._ties)])
        other = torch.cat([torch.empty(0, dtype=torch.int64), *(tie[1] for tie in self._ties)])
        return connected_components(self.num_labels, one, other)

    def lock_reasons(self, roots: Tensor) -> dict[str, Tensor]:
        """Return the roots locked for each reason, first reason first; a root locked twice keeps its first reason."""
        taken = torch.zeros(self.num_labels, dtype=torch.bool)
        reasons: dict[str, list[Tensor]] = {}
        for labels, reason in self._locks:
            locked = roots[labels].unique()
            reasons.setdefault(reason, []).append(locked[~taken[locked]])
            taken[locked] = True
        return {reason: torch.cat(parts) for reason, parts in reasons.items()}


def connected_components(count: int, one: Tensor, other: Tensor) -> Tensor:
    """Return (count,) int64: the smallest node reachable from each node over the undirected edges one[i] - other[i].

    >>> connected_components(4, torch.tensor([0, 2]), torch.tensor([2, 3])).tolist()
    [0, 1, 0, 0]
    """
    root = torch.arange(count)
    while True:
        low, high = torch.minimum(root[one], root[other]), torch.maximum(root[one], root[other])
        if torch.equal(low, high):
            return root
        root.scatter_reduce_(0, high, low, "amin")
        while not torch.equal(root, root[root]):
            root = root[root]


def varying_dims(labels: Tensor) -> list[int]:
    """Return the dimensions along which labels differ."""
    return [dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0]


def along(labels: Tensor, dim: int) -> Tensor | None:
    """Return the (size,) labels along one dimension, or None when they differ along another one too."""
    dim %= labels.dim()
    if set(varying_dims(labels)) - {dim}:
        return None
    for other in reversed(range(labels.dim())):
        if other != dim:
            labels = labels.select(other, 0)
            dim -= other < dim
    return labels.contiguous()


def spread(labels: Tensor, dim: int, shape: Iterable[int]) -> Tensor:
    """Return (size,) labels as the labels of a tensor of this shape that carries them along `dim`."""
    shape = list(shape)
    view = [1] * len(shape)
    view[dim] = len(labels)
    return labels.view(view).expand(shape)


def resized(labels: Tensor, shape: Iterable[int]) -> Tensor:
    """Return labels for another number of positions: dimensions along which they do not vary take the sizes of `shape`."""
    varying = varying_dims(labels)
    for dim in range(labels.dim()):
        labels = labels if dim in varying else labels.narrow(dim, 0, 1)
    return labels.expand(list(shape))


def collapse(labels: Tensor) -> Tensor:
    """Return equal labels with stride 0 along every dimension on which they do not differ, and without the memory of the others."""
    (distinct,) = narrowed(labels)
    for dim in varying_dims(labels):
        first = distinct.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(distinct), distinct):
            distinct = first
    return distinct.clone().expand(labels.shape)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two label tensors are equal; compares only where they vary, since most have stride 0 along every dimension except one."""
    return one.shape == other.shape and torch.equal(*_compact(one, other))


def narrowed(*labels: Tensor) -> tuple[Tensor, ...]:
    """Return label tensors with size 1 along the dimensions on which none of them varies."""
    varying = {dim for tensor in labels for dim in varying_dims(tensor)}
    for dim in range(labels[0].dim()):
        if dim not in varying:
            labels = tuple(tensor.narrow(dim, 0, min(1, tensor.shape[dim])) for tensor in labels)
    return labels


def _compact(*labels: Tensor) -> list[Tensor]:
    """Return label tensors of equal shape, flat, without the dimensions along which none of them varies."""
    return [tensor.reshape(-1) for tensor in narrowed(*labels)]
