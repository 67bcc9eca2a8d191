"""The groups of images that a process has read last, and those that it will need next, which threads fetch meanwhile."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

Place = tuple[int, int]
"""A file and a group of that file."""
Group = Sequence[Tensor]
"""The bytes of the image files of a group, (bytes,) uint8 each."""
NUM_THREADS = 8
"""Threads that read ahead. A request to an object store takes 30 to 100 ms, decoding what it returns half as long."""


class GroupCache:
    """Reads groups and keeps those that were used last.

    read_file(file, groups) returns the groups of a file in their order; several threads may call it at once.
    """

    def __init__(self, read_file: Callable[[int, Sequence[int]], Sequence[Group]]) -> None:
        self._read_file = read_file
        self._kept: OrderedDict[Place, Group] = OrderedDict()
        self._coming: dict[Place, Future[Group]] = {}
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the content behind: loader processes read for themselves."""
        return {**vars(self), "_kept": OrderedDict(), "_coming": {}, "_threads": None}

    def read(self, wanted: Iterable[Place], capacity: int) -> dict[Place, Group]:
        """Return the groups, and keep the last `capacity` for later calls."""
        try:
            found = self._found(wanted)
        except BaseException:
            for group in self._coming.values():  # the process need not wait for these at its end
                group.cancel()
            self._coming.clear()
            raise
        self._keep(found, capacity)
        return found

    def _found(self, wanted: Iterable[Place]) -> dict[Place, Group]:
        found, missing = {}, dict[int, list[int]]()
        for place in sorted(set(wanted)):
            if place in self._kept:
                found[place] = self._kept[place]
            elif place in self._coming:
                found[place] = self._coming.pop(place).result()
            else:
                missing.setdefault(place[0], []).append(place[1])
        for file, groups in missing.items():
            found |= {
                (file, group): content for group, content in zip(groups, self._read_file(file, groups), strict=True)
            }
        return found

    def read_ahead(self, wanted: Iterable[Place]) -> None:
        """Begin to read groups that a later call will ask for; an error is raised by that call. Not in a process that forks."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="read-ahead")
        for file, group in dict.fromkeys(wanted):
            if (file, group) not in self._kept and (file, group) not in self._coming:
                self._coming[file, group] = self._threads.submit(self._one, file, group)

    def _one(self, file: int, group: int) -> Group:
        (content,) = self._read_file(file, [group])
        return content

    def _keep(self, found: dict[Place, Group], capacity: int) -> None:
        for place, content in found.items():
            self._kept[place] = content
            self._kept.move_to_end(place)
        while len(self._kept) > capacity:
            self._kept.popitem(last=False)
