"""Results of long runs, one JSON object a line and network, so that a run can be made in pieces."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
LOCKS = PROJECT / "runs" / "locks"


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file against other processes; yields whether it is held, which is always so when waiting. It is free when its process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def digest(settings: Any) -> str:
    """Return twelve hex digits of settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def source_hash(*files: str | Path) -> str:
    """Hash of gator's sources and of these files: a result holds as long as it is the same."""
    digest = hashlib.sha256()
    for path in [*sorted((PROJECT / "gator").rglob("*.py")), *map(Path, files)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class RowFile:
    """Rows with the keys "model" and "source", at most one for each model."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the rows by model, sorted."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {row["model"]: row for row in map(json.loads, lines)}

    def write(self, row: dict[str, Any]) -> None:
        """Put a row in, in place of an older one of the same model."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.lock("rows")):
            rows = self.read() | {row["model"]: row}
            new = self.path.with_suffix(f".{os.getpid()}")
            new.write_text("".join(f"{json.dumps(rows[name])}\n" for name in sorted(rows)))
            new.replace(self.path)

    def lock(self, name: str) -> Path:
        """Return the file that a process holds while it makes this row; "rows": while it writes one."""
        return LOCKS / f"{digest(str(self.path))}-{name}"

    def missing(self, names: Iterable[str], source: str) -> list[str]:
        """Return the models that have no row of this source."""
        rows = self.read()
        return [name for name in names if rows.get(name, {}).get("source") != source]

    def fill(
        self, names: Sequence[str], seconds: float, measure: Callable[[str], dict[str, Any]], line: Callable[[Any], str]
    ) -> None:
        """Write the row of each name as it comes, and print its line; start none after `seconds`."""
        began = time.monotonic()
        for position, name in enumerate(names):
            if time.monotonic() - began > seconds:
                print(f"{len(names) - position} of {len(names)} networks are left")
                return
            row = measure(name)
            self.write(row)
            print(line(row), flush=True)


def json_of_process(module: str, name: str, timeout_s: float) -> dict[str, Any] | str:
    """Return what `python -m module --json name` prints last, or why it printed nothing; its memory ends with it."""
    command = [sys.executable, "-m", module, "--json", name]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return f"not done in {timeout_s:g} s"
    if done.returncode:
        return f"the process ended with {done.returncode}: {done.stderr[-300:]}"
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def escaped(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
