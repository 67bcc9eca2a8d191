"""The licences of what this project needs, read from the installed packages.

python -m tests.licences > docs/licences.md
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
HEAD = """# Licences of what this project needs

Written by `python -m tests.licences` from the metadata of the installed packages; what they need in turn is not listed.
`gator` needs the first two; the others are extras: search for `orchestrator`, onnx to export, bench and test for benchmarks and tests only.

| package | needed for | version | licence |
|---|---|---|---|"""


def requirements() -> list[tuple[str, str]]:
    """Return (package, what it is needed for) for every line of pyproject.toml."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    groups = {"gator": project["dependencies"], **project["optional-dependencies"]}
    lines = [(_name(line), group) for group, lines in groups.items() for line in lines]
    return [(name, group) for name, group in lines if name != project["name"]]


def licence(package: str) -> str:
    """Return what an installed package says of its licence: an SPDX expression, a classifier, or its own short words."""
    try:
        found = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return "not installed here"
    classifiers = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier", []) if line.startswith("License")]
    words = (found.get("License") or "").strip().splitlines()
    return found.get("License-Expression") or ", ".join(classifiers) or (words[0][:60] if words else "not stated")


def version(package: str) -> str:
    """Return the version that is installed; a dash if none is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return match[0]


def table() -> str:
    """Return the page."""
    rows = [f"| {name} | {group} | {version(name)} | {licence(name)} |" for name, group in requirements()]
    return "\n".join([HEAD, *rows])


if __name__ == "__main__":
    print(table())
