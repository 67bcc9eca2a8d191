"""A benchmark in cells, each one training: its command line, and what its tables have in common."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.row_file import RowFile, locked


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one benchmark. Several processes may fill them at once: none takes a cell that another is at."""

    rows: RowFile
    names: Callable[[int], Sequence[str]]
    """What --all runs for seeds 0 to N - 1, in this order; asked again after each cell, for some follow from what others gave."""
    source: Callable[[str], str]
    """The hash of the settings that a cell depends on; a row of another is run again and not shown."""
    measure: Callable[[str], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    """What is printed of a row when it comes."""
    render: Callable[[], object]
    """Writes what a person reads."""
    metavar: str = "METHOD:RATIO:SEED"
    num_seeds: int = 1
    forecast: Callable[[], str] | None = None
    """What --forecast prints: how long the missing cells will take."""

    def present(self) -> list[dict[str, Any]]:
        """Return the rows of today's settings."""
        return [row for name, row in self.rows.read().items() if row["source"] == self.source(name)]

    def missing(self, num_seeds: int) -> list[str]:
        """Return the names of the cells without such a row, for seeds 0 to num_seeds - 1."""
        rows = self.rows.read()
        return [name for name in self.names(num_seeds) if rows.get(name, {}).get("source") != self.source(name)]

    def fill(self, num_seeds: int, seconds: float) -> None:
        """Run what is missing and no other process is at; start none after `seconds`."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if not any(self._run_if_free(name, num_seeds) for name in self.missing(num_seeds)):
                break
        print(f"{len(self.missing(num_seeds))} cells are left")

    def _run_if_free(self, name: str, num_seeds: int) -> bool:
        with locked(self.rows.lock(name), wait=False) as is_free:
            if not is_free or name not in self.missing(num_seeds):  # another process may just have written it
                return False
            row = self.measure(name)
            self.rows.write(row)
            print(self.line(row), flush=True)
            return True

    def main(self, argv: Sequence[str] | None, doc: str | None) -> None:
        """Run the command line; doc: what --help prints first."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("cells", nargs="*", metavar=self.metavar)
        parser.add_argument("--all", action="store_true", help="every cell that the results file lacks")
        seeds_help = f"with --all: seeds 0 to N - 1 ({self.num_seeds})"
        parser.add_argument("--seeds", type=int, default=self.num_seeds, metavar="N", help=seeds_help)
        parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so many")
        if self.forecast is not None:
            parser.add_argument("--forecast", action="store_true", help="print how long --all would take, and stop")
        parser.add_argument("--render", action="store_true", help="write the results, after the cells if there are any")
        arguments = parser.parse_args(argv)
        if self.forecast is not None and arguments.forecast:
            print(self.forecast())
            return
        self.rows.fill(arguments.cells, arguments.seconds, self.measure, self.line)
        if arguments.all:
            self.fill(arguments.seeds, arguments.seconds)
        if arguments.render:
            self.render()


def top1_text(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table's cell: the mean over the seeds, its standard deviation if there are several, and their number."""
    top1 = [row["top1"] for row in rows]
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1):.2f}{spread} (n = {len(top1)})"
