"""Results of long runs, one JSON object a line and network, so that a run can be made in pieces."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"


def source_hash(*files: str | Path) -> str:
    """Hash of gator's sources and of these files: a result holds as long as it is the same."""
    digest = hashlib.sha256()
    for path in [*sorted((PROJECT / "gator").glob("*.py")), *map(Path, files)]:
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
        rows = self.read() | {row["model"]: row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(f".{os.getpid()}")
        new.write_text("".join(f"{json.dumps(rows[name])}\n" for name in sorted(rows)))
        new.replace(self.path)

    def missing(self, names: Iterable[str], source: str) -> list[str]:
        """Return the models that have no row of this source."""
        rows = self.read()
        return [name for name in names if rows.get(name, {}).get("source") != source]


def escaped(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_").replace("*", "\\*")
