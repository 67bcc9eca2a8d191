"""The order of an epoch: every image once, the same for any number of loader processes, to be gone on with anywhere."""

import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.loading import (
    PREFETCH_FACTOR,
    EpochBatches,
    SharedBatches,
    TrainLoader,
    _Announced,
    load_batches,
    random_batches,
)
from orchestrator.datasets.order import LANES, Indices, grouped_order
from orchestrator.datasets.stored import grouped
from orchestrator.datasets.stored.group_cache import GroupCache
from orchestrator.errors import DataError

GROUP_SIZE, GROUPS_PER_SHARD = 4, 5


def groups(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    group_N = np.arange(num_images) // GROUP_SIZE
    return group_N, np.arange(group_N.max() + 1) // GROUPS_PER_SHARD


class Grouped(Dataset[tuple[Tensor, Tensor]]):
    """Numbered images in row groups of four."""

    is_remote = False

    def __init__(self, num_images: int) -> None:
        self.group_N, self.shard_G = groups(num_images)

    def __len__(self) -> int:
        return len(self.group_N)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(index), torch.tensor(0)

    def order(self, *, seed: int, global_batch_size: int, num_ranks: int) -> Indices:
        return grouped_order(
            self.group_N, self.shard_G, seed=seed, global_batch_size=global_batch_size, num_ranks=num_ranks, buffer=64
        )


def loader(num_images: int, rank: int, world_size: int, batch_size: int, workers: int = 0) -> TrainLoader:
    return TrainLoader(
        Grouped(num_images),
        global_batch_size=batch_size * world_size,
        seed=7,
        rank=rank,
        world_size=world_size,
        num_loader_workers=workers,
    )


def shares(loaders: list[TrainLoader]) -> list[list[list[int]]]:
    """Return the image numbers of every batch of every rank, from where the loaders stand."""
    return [[images.tolist() for images, _ in one] for one in loaders]


def flat(shares: list[list[list[int]]]) -> list[int]:
    return [image for rank in shares for batch in rank for image in batch]


@pytest.mark.parametrize("num_images", [1, 7, 100, 1003], ids="{} images".format)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7], ids="{} ranks".format)
def test_every_image_has_one_place_in_the_order(num_images: int, num_ranks: int) -> None:
    order = grouped_order(*groups(num_images), seed=0, global_batch_size=5 * num_ranks, num_ranks=num_ranks, buffer=64)
    assert sorted(order) == list(range(num_images))


def test_ranks_that_share_no_batch_evenly_get_every_image_once() -> None:
    loaders = [TrainLoader(Grouped(1003), global_batch_size=8, seed=7, rank=rank, world_size=3) for rank in range(3)]
    seen = shares(loaders)
    assert [[len(batch) for batch in rank] for rank in seen] == [[3] * 125, [3] * 125, [2] * 125]
    assert len(set(flat(seen))) == 1000
    groups_of_rank = [{image // GROUP_SIZE for image in flat([rank])} for rank in seen]
    shared = len(groups_of_rank[0] & groups_of_rank[1]) + len(groups_of_rank[1] & groups_of_rank[2])
    assert shared < 40  # a rank reads its own row groups, but for those at the ends of its eight ranges


@pytest.mark.parametrize(("num_images", "world_size"), [(96, 1), (100, 2), (1003, 3), (119, 5)])
def test_ranks_get_every_image_once_but_for_what_fills_no_global_batch(num_images: int, world_size: int) -> None:
    seen = shares([loader(num_images, rank, world_size, batch_size=4) for rank in range(world_size)])
    num_steps = num_images // (4 * world_size)
    assert [len(batches) for batches in seen] == [num_steps] * world_size
    assert len(set(flat(seen))) == len(flat(seen)) == 4 * world_size * num_steps


def test_what_is_left_out_changes_with_the_epoch() -> None:
    one = loader(103, 0, 1, batch_size=8)  # 7 of 103 are left out
    left_out = []
    for epoch in range(3):
        one.seek(epoch)
        left_out.append(frozenset(range(103)) - set(flat(shares([one]))))
    assert [len(left) for left in left_out] == [7, 7, 7]
    assert len(set(left_out)) == 3


def test_order_is_a_function_of_seed_and_epoch_and_mixes_all_images() -> None:
    orders = [flat(shares([loader(1000, 0, 1, batch_size=10)])) for _ in range(2)]
    assert orders[0] == orders[1]
    other = loader(1000, 0, 1, batch_size=10)
    other.seek(1)
    assert flat(shares([other])) != orders[0]
    assert abs(np.corrcoef(orders[0], range(1000))[0, 1]) < 0.5  # 50 shards in random order: spread 0.14
    assert np.mean(np.diff(orders[0]) == 1) < 0.25  # 0.75 for whole row groups of four in their order


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores, on purpose
@pytest.mark.parametrize("workers", [1, 3])
def test_loader_processes_do_not_change_the_order(workers: int) -> None:
    assert shares([loader(103, 1, 2, 6, workers)]) == shares([loader(103, 1, 2, 6)])


def test_row_groups_are_read_by_one_rank_and_one_of_its_lanes() -> None:
    num_images, world_size, batch_size = 6400, 2, 10
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank, batches in enumerate(shares([loader(num_images, r, world_size, batch_size) for r in range(world_size)])):
        for step, batch in enumerate(batches):
            for image in batch:
                readers.setdefault(image // GROUP_SIZE, set()).add((rank, step % LANES))
    num_shared = sum(len(found) > 1 for found in readers.values())
    assert num_shared <= world_size * LANES  # only those at the borders of the ranges


class CountedReads(GroupCache):
    """A loader process's cache that counts row groups instead of reading them."""

    def __init__(self) -> None:
        super().__init__(self._count)
        self.num_read = 0

    def _count(self, file: int, groups: Sequence[int]) -> list[list[Tensor]]:
        self.num_read += len(groups)
        return [[]] * len(groups)


def test_lanes_come_to_new_row_groups_in_turn() -> None:
    group_N = np.arange(40_000) // 32
    order = grouped_order(group_N, group_N // 32, seed=0, global_batch_size=32, num_ranks=1, buffer=2048)
    seen = set[int]()
    fresh = []
    for first in range(0, 40_000 - 32, 32):
        groups_of_batch = set(group_N[order[first : first + 32]].tolist())
        fresh.append(len(groups_of_batch - seen))
        seen |= groups_of_batch
    per_round = np.add.reduceat(fresh[LANES : LANES * 45], range(0, LANES * 44, LANES))
    assert per_round.mean() == pytest.approx(LANES, rel=0.1)
    assert per_round.max() < 2 * LANES  # 3 * LANES in every third round, if all began alike


def test_batches_say_what_their_process_reads_next() -> None:
    batches = [[number] * 64 for number in range(12)]  # two processes make six each, and look four ahead: 256 images
    said = list(_Announced(batches, num_processes=2))
    assert [batch[0] for batch in said] == list(range(12))
    ahead = [list(dict.fromkeys(batch.ahead)) for batch in said]
    assert ahead[0] == [2, 4, 6, 8]
    assert ahead[1] == [3, 5, 7, 9]
    assert ahead[9:] == [[11], [], []]
    assert list(dict.fromkeys(next(iter(_Announced([[0] * 999, [1] * 999], 1))).ahead)) == [1]


def test_reading_ahead_ends_with_an_error_and_begins_again() -> None:
    is_away = [True]

    def read_file(file: int, groups: Sequence[int]) -> list[list[Tensor]]:
        if is_away[0]:
            raise DataError(f"file {file} is away")
        return [[torch.tensor(group)] for group in groups]

    cache = GroupCache(read_file)
    cache.read_ahead([(0, group) for group in range(64)])
    with pytest.raises(DataError, match="file 0 is away"):
        cache.read([(0, 1)], capacity=4)
    assert not cache._coming
    is_away[0] = False
    cache.read_ahead([(0, 2)])
    assert [int(group[0]) for group in cache.read([(0, 1), (0, 2)], capacity=4).values()] == [2, 1]


@pytest.mark.parametrize(
    ("num_ranks", "world_size", "workers", "expected"),
    [(2, 2, 8, 1.0), (2, 2, 6, 1.0), (2, 2, 3, 1.0), (8, 4, 6, 1.0), (4, 3, 8, 1.5), (3, 4, 6, 2.0), (2, 2, 5, 2.7)],
)
def test_row_groups_are_read_about_once(
    num_ranks: int, world_size: int, workers: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    group_N = np.arange(40_000) // 32
    shards = SimpleNamespace(group_N=group_N, shard_G=np.arange(1250) // 64, classes=["a"], labels_N=group_N)
    shards.largest_group = 32
    data = DataConfig(name="parquet", image_size=8, global_batch_size=96, augment=True)
    images = grouped.GroupedImages(shards, np.arange(40_000), data, augment=False)  # type: ignore[arg-type]
    monkeypatch.setattr(grouped, "get_worker_info", lambda: SimpleNamespace(num_workers=workers))
    num_read = num_used = 0
    for rank in range(world_size):
        batches = EpochBatches(images, global_batch_size=96, seed=0, rank=rank, world_size=world_size)
        batches.num_ranks = num_ranks
        asked = list(batches)
        for worker in range(workers):
            reader = CountedReads()
            for batch in asked[worker::workers]:
                reader.read([(0, group) for group in set(group_N[batch].tolist())], images._capacity(batch))
                num_used += len(batch)
            num_read += 32 * reader.num_read
    assert num_read / num_used == pytest.approx(expected, rel=0.2)  # each end of a rank's 24 ranges lies in a row group


@pytest.mark.parametrize("resumed_by", [1, 2, 3, 4], ids="{} ranks".format)
def test_epoch_goes_on_at_the_batch_where_it_stopped_with_any_number_of_ranks(resumed_by: int) -> None:
    begun = [loader(200, rank, 2, batch_size=6) for rank in range(2)]
    whole = shares([loader(200, rank, 2, batch_size=6) for rank in range(2)])
    for one in begun:
        for _, _ in zip(range(5), one, strict=False):
            pass
    state = begun[0].state_dict()
    assert state == {"epoch": 0, "step": 5, "num_ranks": 2}
    continued = [loader(200, rank, resumed_by, batch_size=12 // resumed_by) for rank in range(resumed_by)]
    for one in continued:
        one.load_state_dict(state)
        one.seek(0)
    rest = shares(continued)
    assert sorted(flat(rest)) == sorted(flat([batches[5:] for batches in whole]))
    for step in range(len(rest[0])):  # and every step has the very same global batch
        ours, theirs = (
            {image for rank in side for image in rank[at]} for side, at in ((rest, step), (whole, step + 5))
        )
        assert ours == theirs
    continued[0].seek(1)
    assert continued[0].state_dict() == {"epoch": 1, "step": 0, "num_ranks": resumed_by}


def test_resumed_epoch_is_the_same_with_another_number_of_loader_processes() -> None:
    whole = shares([loader(103, 0, 1, batch_size=8)])[0]
    continued = loader(103, 0, 1, batch_size=8, workers=2)
    continued.load_state_dict({"epoch": 0, "step": 4, "num_ranks": 1})
    assert shares([continued]) == [whole[4:]]


def test_random_batches_of_grouped_images_touch_few_groups() -> None:
    batches = random_batches(Grouped(4000), num_batches=4, batch_size=20, seed=0)
    drawn = [image for batch in batches for image in batch]
    assert len(set(drawn)) == len(drawn) == 80
    assert len({image // GROUP_SIZE for image in drawn}) <= 40  # 80 images drawn one by one lie in about 77 groups


class Pixels(Grouped):
    """Numbered images of one pixel, finished where they are used."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, 1, 1), index, dtype=torch.uint8), torch.tensor(index)

    def finish(self, images: Tensor, labels: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        return images.float(), labels


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_is_used_again_is_not_in_use(workers: int) -> None:
    batches = [list(range(first, min(first + 5, 243))) for first in range(0, 243, 5)]  # 49, of which the last is short
    seen = []
    for images, labels in load_batches(Pixels(243), batches, num_loader_workers=workers):
        time.sleep(0.005)  # the loader processes are as far ahead as they may be
        assert images[:, 0, 0, 0].tolist() == labels.tolist()
        seen.append(labels.tolist())
    assert seen == batches


def test_loader_process_uses_its_memory_again() -> None:
    stack = SharedBatches()
    items = [[(torch.full((3, 1, 1), number, dtype=torch.uint8), torch.tensor(number))] * 2 for number in range(6)]
    made = [stack(batch)[0] for batch in items]
    assert all(images.is_shared() for images in made)
    assert len({images.data_ptr() for images in made}) == PREFETCH_FACTOR + 2
    assert [int(images[0, 0, 0, 0]) for images in made] == [4, 5, 2, 3, 4, 5]
