"""What MLflow's records cost a search: every write of a finished search again, into a new SQLite store, timed.

    python -m benchmarks.bench_tracking runs/digits        writes benchmarks/results/tracking.md

The share is of what the trials' workers trained, evaluated and measured; their start-up is left out, which would make it
smaller. The writes happen in the driver, which waits for trials anyway; so this is what they would cost at most.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.row_file import RESULTS
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import read_metrics
from orchestrator.tracking.tracker import PROGRESS_SHARE, Tracker

NUM_TURNS = 5
Seconds = dict[str, list[float]]


def main() -> None:
    """Time the writes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a finished search, such as runs/digits")
    recorded = RunPaths(parser.parse_args().run_dir)
    outcome = Outcome.load(recorded)
    wall: Seconds = defaultdict(list)
    cpu: Seconds = defaultdict(list)
    for _ in range(NUM_TURNS):
        with tempfile.TemporaryDirectory() as folder:
            _record_again(recorded, outcome, StoragePaths(Path(folder)), wall, cpu)
    text = _table(outcome, wall, cpu)
    (RESULTS / "tracking.md").write_text(text)
    print(text)


def _record_again(recorded: RunPaths, outcome: Outcome, storage: StoragePaths, wall: Seconds, cpu: Seconds) -> None:
    """Send the search to a store of its own, as the driver did while it ran."""
    run = storage.run(outcome.config.name)
    ignored = shutil.ignore_patterns("ray", "search_id", "*.safetensors")
    shutil.copytree(recorded.root, run.root, ignore=ignored)

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        """Add what the block takes."""
        began = time.perf_counter(), time.process_time()
        yield
        wall[what].append(time.perf_counter() - began[0])
        cpu[what].append(time.process_time() - began[1])

    with timed("opening the store, once"):
        tracker = Tracker.open(outcome.config, run, storage)
    tracker._progress_due = float("inf")  # it has a line of its own
    for row in outcome.rows:
        if row["kind"] != "trial":
            tracker.trial_started(row["trial_id"], {}, outcome.config.base, kind=row["kind"])
            continue
        with timed("a trial: its start, epochs and end"):
            tracker.trial_started(row["trial_id"], {}, outcome.config.base)
            for metrics in read_metrics(run.trial(row["trial_id"]).metrics):
                tracker.epoch(row["trial_id"], metrics)
            tracker.trial_ended(row["trial_id"], row, row["status"])
            if row["status"] == "finished":
                tracker.remeasured(row)  # as on a CPU, where latencies are taken anew at the end
    with timed("showing the front, now and then"):
        tracker._progress_due = 0.0
        tracker.show(lambda: outcome)
    with timed("the end, once"):
        tracker.search_ended(lambda: outcome)


def _table(outcome: Outcome, wall: Seconds, cpu: Seconds) -> str:
    trials = [row for row in outcome.rows if row["kind"] == "trial" and row["status"] == "finished"]
    worked = statistics.median(row["train_s"] + row["eval_s"] + row["measure_s"] for row in trials)
    lines = [
        f"{machine('mlflow')}; the search {outcome.config.name}, {len(trials)} finished trials of "
        f"{worked:.1f} s of work (median); {NUM_TURNS} turns, medians and the largest.",
        "",
        "| write | n | wall ms | largest | CPU ms | largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for what in wall:
        numbers = [1000 * number(side[what]) for side in (wall, cpu) for number in (statistics.median, max)]
        lines.append(f"| {what} | {len(wall[what])} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")
    share = statistics.median(wall["a trial: its start, epochs and end"]) / worked
    whole = sum(sum(seconds) for what, seconds in wall.items() if what != "opening the store, once") / NUM_TURNS
    spent = sum((row["train_s"] or 0) + (row["eval_s"] or 0) + (row["measure_s"] or 0) for row in outcome.rows)
    lines += [
        "",
        f"A trial's records take {share:.2%} of its work (wall time over wall time; at most 1 % is allowed), all writes of the "
        f"search but the making of the store {whole / spent:.2%} of all its work. Making the store, MLflow's migrations, is paid "
        f"once for all searches of a storage; showing the front is held to {PROGRESS_SHARE:.1%} of the search; exporting the front "
        "is not in it.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
