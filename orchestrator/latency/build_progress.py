"""How far the builds of latency tables are: a bar each on a terminal, a line now and then elsewhere."""

import math
import time
from collections.abc import Callable
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Steps(Protocol):
    """What a build tells its progress to."""

    def step(self, name: str, num_done: int, num_left: int, what: str) -> None:
        """Take note that so many timings of a table were done since its build began, and how many are known to be left.

        what: "timings" of single calls, or "whole networks".
        """


class Bars:
    """A bar with the time left for each table. A grid that gets denser has more to go: the bar then falls back."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, name: str, num_done: int, num_left: int, what: str) -> None:
        """See Steps."""
        text = f"{name}, {what}"
        if text not in self._bars:
            self._bars[text] = self._progress.add_task(text, total=None)
        bar = self._bars[text]
        self._progress.update(bar, completed=num_done, total=num_done + num_left)


class Lines:
    """A line now and then, with the time left at the pace so far: for the first step of a table, and every_s seconds later."""

    def __init__(self, say: Callable[[str], None], every_s: float = 10.0) -> None:
        self._say = say
        self._every_s = every_s
        self._began: dict[str, float] = {}
        self._told: dict[tuple[str, str], float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, name: str, num_done: int, num_left: int, what: str) -> None:
        """See Steps."""
        now = time.monotonic()
        began = self._began.setdefault(name, now)
        if now - self._told.get((name, what), -math.inf) < self._every_s:
            return
        self._told[name, what] = now
        text = f"{name}: {num_left} {what} to go"
        if num_done:
            seconds = (now - began) / num_done * num_left
            text += f", {num_done} done, about {seconds:.0f} s left, more where the time bends"
        self._say(text)


def shown_on(console: Console) -> Bars | Lines:
    """Return bars for a terminal, lines for anything else."""
    return (
        Bars(console)
        if console.is_terminal
        else Lines(lambda text: console.print(text, soft_wrap=True, highlight=False))
    )
