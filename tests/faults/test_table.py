"""README.md names a test for each fault, and the command that runs it; every file that it names exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("README.md")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[[^\]`]*\])?`")


def is_slow(file: Path, test: str) -> bool:
    """Return whether `make test` leaves the test out. Raises: StopIteration if the file has no such test."""
    tree = ast.parse(file.read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test)
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    marks += [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    ]
    return any("mark.slow" in mark for mark in marks)


def test_each_fault_names_tests_that_are_there_and_the_command_that_runs_them() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if NAMED.search(line)]
    assert len(rows) > 20
    for fault, tests, command in rows:
        named = NAMED.findall(tests)
        slow = {is_slow(TESTS / file, test) for file, test in named}
        assert command.strip() == ("`make test-all`" if slow == {True} else "`make test`"), (fault, named)


def test_every_file_that_the_page_names_exists() -> None:
    words = [word.partition("::")[0] for word in re.findall(r"`([\w/.]+\.py)[:\w]*`", PAGE.read_text())]
    folders = [PAGE.parent, TESTS]
    missing = {word for word in words if not any((folder / word).is_file() for folder in folders)}
    assert len(words) > 40
    assert not missing
