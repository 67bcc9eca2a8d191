"""The order of the tests' files: the longest first, so that of several processes none is left with them alone at the end."""

from collections import Counter
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)  # after the choice of the tests that run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by the time limit of their tests, which only long ones raise, then by their number of tests."""
    limits: dict[Path, float] = {}
    for item in items:
        raised = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0.0), float(raised.args[0]) if raised else 0.0)
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (limits[item.path], sizes[item.path]), reverse=True)
