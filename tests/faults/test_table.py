"""docs/reliability.md names a test for each fault, and says which command runs it."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
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
