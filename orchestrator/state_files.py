"""Small files that are read again: whatever is wrong with one is told in one message, with what to do."""

import json
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says. Raises: ValueError if it is none, or is nested deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_text(path: Path, error: type[OrchestratorError], advice: str) -> str:
    """Return the text of a file. Raises: `error`, with the advice, if it is missing, unreadable, no UTF-8, or no plain file."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("there is no such file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read ({problem}); {advice}") from problem


def read_json(path: Path, error: type[OrchestratorError], advice: str) -> dict[str, Any]:
    """Return the mapping in a JSON file. Raises: `error`, with the advice, if it cannot be read or holds anything else."""
    text = read_text(path, error, advice)
    try:
        content = parse_json(text)
    except ValueError as problem:
        raise error(f"{path} is damaged ({problem}); {advice}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} is damaged (found a {type(content).__name__}, expected a mapping); {advice}")
    return content
