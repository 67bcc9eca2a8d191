"""Plain words in what people read: docstrings, messages, log lines and comments of the packages and the examples."""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for package in ("gator", "orchestrator", "examples") for path in (PROJECT / package).rglob("*.py")
)

INSTEAD_OF = {
    r"go(?:es|ne)? on(?! \w+ing)|going on": "continue, resume, start from",
    r"(?:is|are|was|were|be) told|\btells?\b(?!\()": "reports, logs, prints, says; passes",
    r"that (?:is|are) none|(?<!there )(?:is|are) no (?!longer|more\b|further)": "invalid, missing, is not a",
    r"\bours\b|\bof us\b": "the owner's name",
    r"\banew\b": "again",
    r"\bfor want of\b": "without, lacking",
    r"\bbut for\b|\ball but\b": "except",
    r"\bnobody\b|\bwhoever\b": "no reader, the caller",
    r"\bhears? (?:of|nothing)|\bhas heard\b": "receives, gets",
    r"\bbeside\b": "next to, compared with, in addition to, while",
    r"\b(?:stands?|stood)\b(?! for)|\b(?:lies?|lay)\b(?! within)": "is in, is set in",
    r"\bverbs?\b": "command",
}
"""Pattern -> what to write instead."""


@functools.cache
def texts(path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, text) of each string, docstrings included, and of each comment."""
    return tuple(_texts(path.read_text(encoding="utf-8")))


def _texts(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("pattern", INSTEAD_OF)
def test_plain_words(pattern: str) -> None:
    found = [
        f"{path.relative_to(PROJECT)}:{line} {match[0]!r}"
        for path in SOURCES
        for line, text in texts(path)
        for match in re.finditer(pattern, text)
    ]
    assert not found, f"write {INSTEAD_OF[pattern]}:\n" + "\n".join(found)
