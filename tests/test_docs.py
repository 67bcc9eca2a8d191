"""Every relative link and anchor in every Markdown file leads somewhere inside the project."""

import argparse
import importlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from orchestrator.__main__ import COMMANDS
from tests import reference

PROJECT = Path(__file__).resolve().parent.parent

FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
INLINE_LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)")  # [text](target "title"), ![alt](target)
REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s+<?([^>\s]+)", re.MULTILINE)  # [name]: target
HTML_LINK = re.compile(r"<(?:a|img|source)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", re.IGNORECASE)
HTML_ANCHOR = re.compile(r"<\w+\b[^>]*?\b(?:id|name)=\"([^\"]+)\"", re.IGNORECASE)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
EXTERNAL = re.compile(r"^(https?|mailto):")


def project_files() -> set[Path]:
    """Return what a clone holds, and what is about to be added to it."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return {PROJECT / name for name in names.split("\0") if name and (PROJECT / name).is_file()}


def targets(markdown: str) -> Iterator[str]:
    """Yield the target of every link and picture that is not inside code."""
    prose = CODE_SPAN.sub("", FENCE.sub("", markdown))
    for pattern in (INLINE_LINK, REFERENCE, HTML_LINK):
        yield from pattern.findall(prose)


def anchors(markdown: str) -> set[str]:
    """Return the anchors a page offers: its headings as GitHub names them, and its HTML ids."""
    prose = FENCE.sub("", markdown)
    seen: Counter[str] = Counter()
    found = set(HTML_ANCHOR.findall(prose))
    for heading in HEADING.findall(prose):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken_links(page: Path, files: set[Path]) -> Iterator[str]:
    """Yield "target: what is wrong" for each link of the page that leads nowhere in the files, or out of them."""
    folders = {folder for file in files for folder in file.parents}
    for target in targets(page.read_text(encoding="utf-8")):
        if EXTERNAL.match(target):
            continue
        name, _, anchor = unquote(target).partition("#")
        path = Path(f"{page.parent}/{name}").resolve() if name else page
        if name.startswith(("/", "~", "file:")):
            yield f"{target}: a path of one machine; link relative to the page"
        elif path not in files and path not in folders:
            yield f"{target}: no such file in the project"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8")):
            yield f"{target}: no such heading in {path.name}"


def test_every_link_in_every_page_resolves() -> None:
    files = project_files()
    pages = sorted(file for file in files if file.suffix == ".md")
    assert pages
    broken = [f"{page.relative_to(PROJECT)} -> {problem}" for page in pages for problem in broken_links(page, files)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_reference_is_current_and_explains_every_line(name: str) -> None:
    page = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert page == reference.PAGES[name](), "run python -m tests.reference"
    silent = [line for line in page.splitlines() if re.search(r"\|\s+\|$", line) and name != "metrics.md"]
    assert all(line.startswith("| `type` |") for line in silent), silent


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_the_default_of_each_option(name: str) -> None:
    parser = importlib.import_module(f"orchestrator.{name}")._parser()
    actions = [action for _, one in reference._parsers(name, parser) for action in one._actions]
    options = [action for action in actions if action.option_strings and action.default != argparse.SUPPRESS]
    assert options
    assert not [one.option_strings for one in options if one.default and "default" not in (one.help or "")]


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](other.md)", None),
        ("[a](other.md#two-words)", None),
        ("[a](other.md#two-words-1)", None),
        ("[a](#here-it-is-v2)", None),
        ("[a](pictures)", None),
        ('![a](pictures/front.png "The front")', None),
        ('<img alt="front" src="pictures/front.png">', None),
        ("[a][ref]\n\n[ref]: other.md", None),
        ("[a](https://example.org/missing)", None),
        ("`[a](missing.md)` and\n```\n[a](missing.md)\n```\n", None),
        ("[a](missing.md)", "no such file"),
        ("[a][ref]\n\n[ref]: missing.md", "no such file"),
        ('<a href="missing.md">a</a>', "no such file"),
        ("[a](ignored.md)", "no such file"),
        ("[a](other.md#three-words)", "no such heading"),
        ("[a](#nowhere)", "no such heading"),
        ("[a](/home/me/other.md)", "path of one machine"),
        ("[a](file:///tmp/other.md)", "path of one machine"),
    ],
)
def test_broken_links_are_told(tmp_path: Path, link: str, problem: str | None) -> None:
    page, other, picture = tmp_path / "page.md", tmp_path / "other.md", tmp_path / "pictures/front.png"
    picture.parent.mkdir()
    picture.touch()
    (tmp_path / "ignored.md").touch()
    page.write_text(f"# Here it is: `v2`\n\n{link}\n")
    other.write_text("# Two words\n\n## Two words\n")
    found = list(broken_links(page, {page, other, picture}))
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]
