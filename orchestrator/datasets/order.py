"""The order in which an epoch visits the images: a pure function of the seed, the epoch and the number of ranks.

It does not depend on the number of loader processes, and an interrupted epoch can resume at any batch.

The images of a row group of a Parquet shard are read together, so the order must keep them close while it shuffles them. It is
made in four steps:

    shards shuffled, row groups shuffled within each       one sequence of all images
    -> cut into ranges, one per rank and lane              a rank reads its own row groups, and so does a lane
    -> shuffled within windows of whole row groups         the shuffle buffer
    -> batch k takes the next images of lane k % LANES     loader process w of W makes the batches w, w + W, ...

If W divides LANES, each row group is read by a single process; otherwise by several, and the order is the same. An epoch that
is resumed with another number of ranks keeps its order; share_of_rank() then says which part of a global batch each rank gets.
"""

import numpy as np
from numpy.typing import NDArray

LANES = 24
"""Ranges of a rank, from which its batches come in turn. 1, 2, 3, 4, 6, 8, 12 or 24 loader processes divide them evenly."""
Indices = NDArray[np.int64]


def grouped_order(
    group_N: Indices, shard_G: Indices, *, seed: int, global_batch_size: int, num_ranks: int, buffer: int
) -> Indices:
    """Return a permutation of range(N) that keeps row groups together within a rank and a lane.

    group_N: the row group of each image, ascending.    shard_G: the shard of each row group.
    buffer: size in images of a rank's shuffle buffer.
    Images k * global_batch_size + r, + num_ranks, ... of the result are rank r's share of global batch k. Images that do not
    fill a global batch are at the end.
    """
    rng = np.random.default_rng(seed)
    sequence = _shuffled_groups(group_N, shard_G, rng)
    num_batches = len(group_N) // global_batch_size
    share_R = (global_batch_size - np.arange(num_ranks) + num_ranks - 1) // num_ranks
    batches_of_lane = (num_batches - np.arange(LANES) + LANES - 1) // LANES
    sizes = np.outer(share_R, batches_of_lane).ravel()  # rank by rank, in each lane by lane
    starts = np.concatenate([[0], np.cumsum(sizes)])  # the last range holds what fills no batch
    sequence = _shuffled_windows(sequence, group_N[sequence], starts, max(1, buffer // LANES), rng)
    batch, slot = np.divmod(np.arange(num_batches * global_batch_size), global_batch_size)
    rank, lane = slot % num_ranks, batch % LANES
    dealt = starts[rank * LANES + lane] + batch // LANES * share_R[rank] + slot // num_ranks
    return np.concatenate([sequence[dealt], sequence[len(dealt) :]])


def share_of_rank(*, global_batch_size: int, num_ranks: int, rank: int, world_size: int) -> Indices:
    """Return a rank's places in each global batch of an order that was made for num_ranks.

    With another world_size a rank takes over the shares of as few ranks of the order as possible. With every world_size-th image
    instead, all ranks would read nearly all row groups.

    >>> [share_of_rank(global_batch_size=8, num_ranks=4, rank=rank, world_size=2).tolist() for rank in range(2)]
    [[0, 4, 1, 5], [2, 6, 3, 7]]
    """
    places = np.arange(global_batch_size)
    if num_ranks == world_size:
        return places[rank::world_size]
    return np.array_split(np.argsort(places % num_ranks, kind="stable"), world_size)[rank]


def _shuffled_groups(group_N: Indices, shard_G: Indices, rng: np.random.Generator) -> Indices:
    """Return range(N) with the shards, and the row groups within each, in random order."""
    groups, starts, sizes = np.unique(group_N, return_index=True, return_counts=True)
    shard_keys = rng.random(shard_G.max(initial=0) + 1)
    shuffled = np.lexsort((rng.random(len(groups)), shard_keys[shard_G[groups]]))
    starts, sizes = starts[shuffled], sizes[shuffled]
    skipped = np.cumsum(sizes) - sizes
    return np.repeat(starts - skipped, sizes) + np.arange(len(group_N))


def _shuffled_windows(
    sequence: Indices, group_N: Indices, starts: Indices, window: int, rng: np.random.Generator
) -> Indices:
    """Return the sequence with each range's windows shuffled; a range begins at each of the starts.

    A window holds whole row groups, those that begin within `window` images: a row group in two windows might be read twice.
    The first window of a lane is shorter, by another part in each: else all would come to new row groups at the same time.
    group_N: the row group of each image of the sequence.
    """
    positions = np.arange(len(sequence))
    which = np.searchsorted(starts, positions, side="right") - 1
    begins = np.maximum.accumulate(np.where(_is_first(group_N) | _is_first(which), positions, 0))
    earlier = which % LANES * window // LANES
    is_first = _is_first((begins - starts[which] + earlier) // window) | _is_first(which)
    return sequence[np.argsort(np.cumsum(is_first) + rng.random(len(sequence)))]


def _is_first(values_N: Indices) -> NDArray[np.bool_]:
    """Return whether each value differs from the one before it."""
    return np.diff(values_N, prepend=-1) != 0
