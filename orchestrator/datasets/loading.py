"""Batches of a data set on this rank's device: for training in an order that can be resumed, for evaluation in any order.

    loader = TrainLoader(splits.train, global_batch_size=256, seed=0, rank=0, world_size=2)
    loader.seek(epoch)                                    # its beginning, or the place that load_state_dict set
    for step, (images, labels) in enumerate(loader, start=loader.step): ...
    loader.state_dict()                                   # {"epoch": 3, "step": 117, "num_ranks": 2}

A data set returns what loader processes produce (from image files uint8, a quarter of the bytes of float32). If it has a
method `finish`, that turns whole batches into the network's input here, on the device.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from orchestrator.datasets.order import Indices, share_of_rank
from orchestrator.datasets.seeds import mix_seed
from orchestrator.errors import DataError, StorageError

Images = tuple[Tensor, Tensor]
CPU = torch.device("cpu")
PREFETCH_FACTOR = 2
"""Batches that each loader process prepares in advance; torch's default."""
AHEAD = 256
"""Images, in whole batches and at least one, that a loader process fetches ahead from an object store: 0.3 s of a core's decoding."""


class Batch(list[int]):
    """The indices of one rank's batch, and the seed of its random draws, which makes it independent of other batches.

    epoch: counted from 0; None outside of training.
    num_shares: number of ranks of the order whose images it holds; more than one if the number of ranks has changed.
    ahead: the indices of the batches that the same loader process makes next, in their order.
    """

    def __init__(
        self,
        indices: Iterable[int],
        *,
        epoch: int | None,
        seed: int | None,
        num_shares: int = 1,
        ahead: Sequence[int] = (),
    ) -> None:
        super().__init__(indices)
        self.epoch = epoch
        self.seed = seed
        self.num_shares = num_shares
        self.ahead = ahead


@runtime_checkable
class Finishing(Protocol):
    """A data set whose batches are finished on the device. Loader processes reuse the memory of the batches that they return."""

    def finish(self, images: Tensor, labels: Tensor, seed: int | None) -> Images:
        """Return new tensors: (N, 3, H, W) float32 images and their labels, (N,) int64, or (N, num_classes) float32 for mixed images.

        seed: seed of the batch's random draws; None outside training, when nothing is drawn.
        """


@runtime_checkable
class Ordered(Protocol):
    """A data set with an order in which its images are read efficiently."""

    def order(self, *, seed: int, global_batch_size: int, num_ranks: int) -> Indices:
        """Return a permutation of its indices; see orchestrator.datasets.order.grouped_order."""


class EpochBatches(Sampler[list[int]]):
    """The batches of one rank in one epoch: global batch k holds images k * global_batch_size, ... of the epoch's order.

    Rank r of R gets every R-th image of each global batch, from the r-th on; order.share_of_rank has the case of an Ordered data
    set whose order was made for another number of ranks. Images that do not fill the last global batch are left out; they
    differ from epoch to epoch.
    """

    def __init__(self, dataset: Dataset[Any], *, global_batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.num_images = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not promise a length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first_step = 0
        self.num_ranks = world_size
        """The number of ranks for which the order is made. A resumed epoch keeps the number that it began with."""

    def __len__(self) -> int:
        """Return the steps of a whole epoch, also when this one begins later."""
        return self.num_images // self.global_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order, share = self._order(), self._share()
        num_shares = len(set((share % self.num_ranks).tolist()))
        for step in range(self.first_step, len(self)):
            indices = order[step * self.global_batch_size + share].tolist()
            draws = mix_seed(self.seed, "draws", self.epoch, step, self.rank)
            yield Batch(indices, epoch=self.epoch, seed=draws, num_shares=num_shares)

    def _share(self) -> Indices:
        num_ranks = self.num_ranks if isinstance(self.dataset, Ordered) else self.world_size
        return share_of_rank(
            global_batch_size=self.global_batch_size, num_ranks=num_ranks, rank=self.rank, world_size=self.world_size
        )

    def _order(self) -> Indices:
        if isinstance(self.dataset, Ordered):
            return self.dataset.order(
                seed=mix_seed(self.seed, self.epoch),
                global_batch_size=self.global_batch_size,
                num_ranks=self.num_ranks,
            )
        generator = torch.Generator().manual_seed(self.seed + self.epoch)  # as in torch's DistributedSampler
        order: Indices = torch.randperm(self.num_images, generator=generator).numpy()
        return order


class TrainLoader:
    """This rank's batches of the training split, epoch by epoch, and the current position.

    `step` counts the batches of the epoch that were yielded; a yielded batch counts as trained on.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = CPU,
        num_loader_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.num_loader_workers = num_loader_workers
        self.batches = EpochBatches(
            dataset, global_batch_size=global_batch_size, seed=seed, rank=rank, world_size=world_size
        )
        self.step = 0

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return self.batches.epoch

    def __len__(self) -> int:
        """Return the steps of a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Images]:
        """Yield the batches from `step` to the end of the epoch."""
        batches = self.batches
        batches.first_step = self.step
        for images, labels in loaded(
            self.dataset, batches, device=self.device, num_loader_workers=self.num_loader_workers
        ):
            seed = mix_seed(batches.seed, "finish", self.epoch, self.step, batches.rank)
            self.step += 1
            yield finished(self.dataset, images, labels, seed)

    def seek(self, epoch: int) -> None:
        """Move to the beginning of an epoch; if it was interrupted, keep the position at which to resume it."""
        if epoch != self.epoch or self.step == len(self):
            self.batches.epoch, self.step = epoch, 0
            self.batches.num_ranks = self.batches.world_size

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, its finished steps, and the number of ranks for which its order is made."""
        return {"epoch": self.epoch, "step": self.step, "num_ranks": self.batches.num_ranks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a position, also with another number of ranks or loader processes: each image still occurs once in the epoch.

        The global batch size must be the same.
        """
        self.batches.epoch, self.step = state["epoch"], state["step"]
        self.batches.num_ranks = state["num_ranks"]


def load_batches(
    dataset: Dataset[Any],
    batches: Iterable[list[int]],
    *,
    device: torch.device = CPU,
    num_loader_workers: int = 0,
) -> Iterator[Images]:
    """Yield the images of the given indices, ready for the network, and their labels; nothing is mixed."""
    for images, labels in loaded(dataset, batches, device=device, num_loader_workers=num_loader_workers):
        yield finished(dataset, images, labels, seed=None)


def random_batches(dataset: Dataset[Any], *, num_batches: int, batch_size: int, seed: int) -> list[Batch]:
    """Return num_batches random batches, or fewer if there are not enough images; of an Ordered data set, from few row groups.

    The random draws for their images derive from the seed as well.
    """
    num_images = len(dataset)  # type: ignore[arg-type]
    if isinstance(dataset, Ordered):
        order = dataset.order(seed=seed, global_batch_size=batch_size, num_ranks=1)
    else:
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed)).numpy()
    starts = range(0, min(num_images, num_batches * batch_size), batch_size)
    return [
        Batch(order[start : start + batch_size].tolist(), epoch=None, seed=mix_seed(seed, start)) for start in starts
    ]


def loaded(
    dataset: Dataset[Any], batches: Iterable[list[int]], *, device: torch.device, num_loader_workers: int
) -> Iterator[Images]:
    """Yield the batches of the data set, not yet finished, on the device.

    A batch of a Finishing data set is valid until the next one is requested.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Announced(batches, max(1, num_loader_workers)) if _is_remote(dataset) else batches,
        num_workers=num_loader_workers,  # started again, hence seeded again, for each iteration
        prefetch_factor=PREFETCH_FACTOR if num_loader_workers else None,
        collate_fn=SharedBatches() if num_loader_workers and isinstance(dataset, Finishing) else None,
        multiprocessing_context=_start_method(dataset, num_loader_workers),
        pin_memory=device.type == "cuda",
    )
    for images, labels in _without_traceback(loader):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class SharedBatches:
    """Stacks the items of a batch in shared memory that this loader process has used before.

    New memory costs a page fault per 4 kB, a twelfth of a core's time for crops of 224 pixels. The DataLoader requests batch k
    of a process only after batch k - PREFETCH_FACTOR - 1 was consumed, so the buffer of the batch before that can be reused.
    """

    def __init__(self) -> None:
        self._slots: list[Tensor | None] = [None] * (PREFETCH_FACTOR + 2)
        self._num_made = 0

    def __call__(self, items: list[Images]) -> Images:
        """Return (N, 3, H, W) images and (N,) labels."""
        images, labels = zip(*items, strict=True)
        position = self._num_made % len(self._slots)
        self._num_made += 1
        slot = self._slots[position]
        if slot is None or slot.shape[1:] != images[0].shape or len(slot) < len(images):
            slot = self._slots[position] = torch.empty(
                (len(images), *images[0].shape), dtype=images[0].dtype
            ).share_memory_()
        return torch.stack(images, out=slot[: len(images)]), torch.stack(labels)


def _start_method(dataset: Dataset[Any], num_loader_workers: int) -> str | None:
    """Return how loader processes are started; None for torch's default.

    The client of an object store has threads, for which a forked process would wait forever.
    """
    return "forkserver" if _is_remote(dataset) and num_loader_workers else None


def _is_remote(dataset: Dataset[Any]) -> bool:
    """Return whether the data set reads from an object store."""
    return bool(getattr(dataset, "is_remote", False))


class _Announced:
    """Batches that say what their loader process will be asked for next, so that it is fetched while they are decoded.

    num_processes: number of loader processes, which make the batches in turn.
    """

    def __init__(self, batches: Iterable[list[int]], num_processes: int) -> None:
        self.batches = batches
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[list[int]] = deque()
        for batch in self.batches:
            waiting.append(batch)
            if len(waiting) > self.num_processes * max(1, AHEAD // len(batch)):
                yield self._announcing(waiting)
        while waiting:
            yield self._announcing(waiting)

    def _announcing(self, waiting: deque[list[int]]) -> Batch:
        """Return the first batch, which is taken out, with what its process makes of the others."""
        ahead = list(chain.from_iterable(islice(waiting, self.num_processes, None, self.num_processes)))
        batch = waiting.popleft()
        known = batch if isinstance(batch, Batch) else Batch(batch, epoch=None, seed=None)
        return Batch(batch, epoch=known.epoch, seed=known.seed, num_shares=known.num_shares, ahead=ahead)


def _without_traceback(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches; raise a DataError or StorageError of a loader process without the traceback that torch adds to its message."""
    try:
        yield from loader
    except (DataError, StorageError) as error:
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].rstrip()) from error


def finished(dataset: Dataset[Any], images: Tensor, labels: Tensor, seed: int | None) -> Images:
    """Return the batch as input of the network."""
    if isinstance(dataset, Finishing):
        return dataset.finish(images, labels, seed)
    return images, labels
