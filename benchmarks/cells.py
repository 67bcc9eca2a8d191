"""A benchmark in cells METHOD:RATIO:SEED, each one training: its command line, and what its tables have in common."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.row_file import RowFile


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one benchmark, whose rows have the keys "method" and "top1" beside those of every row."""

    rows: RowFile
    methods_of_ratio: dict[float, Sequence[str]]
    """What --all runs, in this order."""
    source: Callable[[str], str]
    """The hash of the settings that a method's cells depend on; a row of another is run again and not shown."""
    measure: Callable[[str], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    """What is printed of a row when it comes."""
    render: Callable[[], object]
    """Writes what a person reads."""

    def present(self) -> list[dict[str, Any]]:
        """Return the rows of today's settings."""
        return [row for row in self.rows.read().values() if row["source"] == self.source(row["method"])]

    def missing(self, num_seeds: int) -> list[str]:
        """Return the names of the cells without such a row, for seeds 0 to num_seeds - 1."""
        every = [
            (method, f"{method}:{ratio}:{seed}")
            for seed in range(num_seeds)
            for ratio, methods in self.methods_of_ratio.items()
            for method in methods
        ]
        return [name for method, name in every if self.rows.missing([name], self.source(method))]

    def main(self, argv: Sequence[str] | None, doc: str | None) -> None:
        """Run the command line; doc: what --help prints first."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("cells", nargs="*", metavar="METHOD:RATIO:SEED")
        parser.add_argument("--all", action="store_true", help="every cell that the results file lacks")
        parser.add_argument("--seeds", type=int, default=1, metavar="N", help="with --all: seeds 0 to N - 1 (1)")
        parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so many")
        parser.add_argument("--render", action="store_true", help="write the results, after the cells if there are any")
        arguments = parser.parse_args(argv)
        names = self.missing(arguments.seeds) if arguments.all else arguments.cells
        self.rows.fill(names, arguments.seconds, self.measure, self.line)
        if arguments.render:
            self.render()


def top1_text(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table's cell: the mean over the seeds, its standard deviation if there are several, and their number."""
    top1 = [row["top1"] for row in rows]
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1):.2f}{spread} (n = {len(top1)})"
