"""The widths of the values and parameters of a walk, as functions of the widths of the groups.

tensor legend: G groups
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gator.graph.graph import ChannelGroup
from gator.graph.plans import compact
from gator.tracing.labels import STATIC, collapse, varying_dims
from gator.tracing.walk import Walk


class Widths:
    """Reads which channels the dimensions of values carry. Needs a finished walk."""

    def __init__(self, walk: Walk, groups: Sequence[ChannelGroup], channel_of_label: Tensor) -> None:
        """channel_of_label: (num_labels,) int64, each label's channel in the concatenation of the groups; -1 for none."""
        self.walk, self._channel_of_label = walk, channel_of_label
        self._sizes = torch.tensor([group.num_channels for group in groups], dtype=torch.int64)
        self._group_of_channel = torch.repeat_interleave(torch.arange(len(groups)), self._sizes)

    def channels(self, value: Any) -> Tensor | None:
        """Return the channel of each entry of a value, -1 for none; stride 0 along every dimension on which it does not differ.

        The features of a head have labels of their own and are one channel. None: the value carries no channels.
        """
        labels = self.walk.values.get(value)
        return self._channels_of(labels) if isinstance(labels, Tensor) else None

    def parts(self, value: Any) -> list[tuple[tuple[int, ...], Tensor]]:
        """Return the dimensions of a value or parameter that carry channels, together those that carry them jointly.

        With each: (n,) channels of their entries, -1 for none. No dimension with the one channel that the whole value belongs to.
        """
        name = self.walk.tensors.get(getattr(value, "name", ""))
        entries = [entry for entry in self.walk.book.entries.values() if entry.tensor == name]
        parts: list[tuple[tuple[int, ...], Tensor]]
        parts = [((entry.dim,), self._channels_of(entry.labels)) for entry in entries]
        channels = self.channels(value)
        if channels is not None:
            parts.append((tuple(varying_dims(channels)), compact(channels).flatten()))
        return [(dims, own) for dims, own in parts if bool((own >= 0).any())]

    def row(self, channels: Tensor, size: float | None = None) -> Tensor:
        """Return (G + 1,) entries per channel of each group, then those of no group. size: entries in all, if not those given."""
        counts = torch.bincount(self._group_of_channel[channels[channels >= 0]], minlength=len(self._sizes))
        row = torch.cat([counts.double() / self._sizes, (channels < 0).sum()[None].double()])
        return row if size is None else row * (size / max(1, len(channels)))

    def static(self, size: float) -> Tensor:
        """Return the (G + 1,) row of so many entries outside all groups."""
        return torch.cat(
            [torch.zeros(len(self._sizes), dtype=torch.float64), torch.tensor([size], dtype=torch.float64)]
        )

    def along(self, value: Any, dim: int) -> Tensor:
        """Return the (G + 1,) row of one dimension of a value, which alone carries channels; of a number one entry."""
        shape = self.walk.shape(value) or (1,)
        places = (), (dim % len(shape),)
        own = next((own for dims, own in self.parts(value) if dims in places), None)
        return self.static(shape[dim]) if own is None else self.row(own.expand(shape[dim]))

    def _channels_of(self, labels: Tensor) -> Tensor:
        own = compact(labels)
        return collapse(self._channel_of_label[own.clamp(min=0)].where(own != STATIC, -1).expand(labels.shape))
