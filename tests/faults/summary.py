"""What a log of tests.faults.harness says, as Markdown: what was hit, at which moments, and how each search ended.

python -m tests.faults.summary tests/faults/kills.jsonl
"""

import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

Line = dict[str, Any]
NUM_OUTCOME_CHARS = 60


def rounds(lines: list[Line]) -> list[tuple[Line, list[Line]]]:
    """Return each complete round: its end, and the faults of it. A round that was cut short counts for nothing."""
    found: list[tuple[Line, list[Line]]] = []
    faults: list[Line] = []
    for line in lines:
        if "outcome" not in line:
            faults.append(line)
            continue
        found.append((line, [fault for fault in faults if fault["seed"] == line["seed"]][-line["kills"] :]))
        faults = []
    return found


def summary(lines: list[Line]) -> str:
    """Return the page's text."""
    complete = rounds(lines)
    faults = [fault for _, hit in complete for fault in hit]
    kinds = Counter(fault["fault"] for fault in faults)
    seconds = [fault["seconds_after_start"] for fault in faults]
    low, middle, high = (
        statistics.quantiles(seconds, n=10)[0],
        statistics.median(seconds),
        statistics.quantiles(seconds, n=10)[-1],
    )
    moments = Counter((fault["rows"], fault["epochs"]) for fault in faults)
    text = [
        f"{len(faults)} faults in {len(complete)} rounds: "
        + ", ".join(f"{kind} {num}" for kind, num in kinds.most_common())
        + ".",
        f"Seconds after the last start: median {middle:.0f}, tenth {low:.0f}, nine tenths {high:.0f}; "
        f"{len(moments)} different states of the search (rows written, epochs of the running trial).",
        "\n| seed | faults | before the first row | seconds | the end |\n|---|---|---|---|---|",
    ]
    text += [
        f"| `{end['seed']}` | {end['kills']} | {sum(fault['rows'] == 0 for fault in hit)} | {end['seconds']} "
        f"| {end['outcome'][:NUM_OUTCOME_CHARS].partition(': found')[0]} |"
        for end, hit in complete
    ]
    return "\n".join(text)


if __name__ == "__main__":
    print(summary([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
