"""Progress of the builds of latency tables: a bar for each on a terminal, otherwise a line every ten seconds."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class BuildProgress(Progress):
    """Shows how many timings are done and left. A grid that gets denser has more of them: its bar then moves back."""

    def __init__(self, console: Console, every_s: float = 10.0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._every_s = every_s
        self._bars: dict[str, TaskID] = {}
        self._next_line_s: dict[str, float] = {}

    def step(self, name: str, num_done: int, num_left: int, what: str) -> None:
        """Show how many timings of a table are done since its build started, and how many are known to be left.

        what: "timings" of single calls, or "whole networks".
        """
        text = f"{name}, {what}"
        if text not in self._bars:
            self._bars[text] = self.add_task(text)
        self.update(self._bars[text], completed=num_done, total=num_done + num_left)
        if self.disable and time.monotonic() >= self._next_line_s.get(text, 0.0):
            self._next_line_s[text] = time.monotonic() + self._every_s
            left_s = (self.tasks[self._bars[text]].elapsed or 0.0) / max(1, num_done) * num_left
            pace = f", {num_done} done, about {left_s:.0f} s left, more where the grid gets denser" if num_done else ""
            self.console.print(f"{name}: {num_left} {what} to go{pace}", soft_wrap=True, highlight=False)
