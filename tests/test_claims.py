"""Numbers that README and docs take from a results file are in that file."""

import re
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = re.compile(r"\((?:\.\./)?(?:benchmarks/)?results/([\w.]+\.(?:md|jsonl))\)")
LINK = re.compile(r"\[[^\]]*\]\([^)]*\)")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+|(?<![\w.])\d+(?= ?%)")
"""Numbers with a decimal point, and percentages."""


def unproven(page: str, project: Path = PROJECT) -> Iterator[str]:
    """Yield the numbers of a page's sentences that link to results files, and of the tables these introduce, that the files lack.

    A sentence is a line of its own; one that ends in a colon introduces the table below it.
    """
    lines = page.splitlines()
    for index, line in enumerate(lines):
        if not (files := RESULTS.findall(line)):
            continue
        held = "".join((project / "benchmarks" / "results" / name).read_text() for name in files)
        said = [line] + (list(_table(lines[index + 1 :])) if line.rstrip().endswith(":") else [])
        for number in NUMBER.findall(LINK.sub("", " ".join(said))):
            if number not in held:
                yield f"line {index + 1}: {number} is not in {' or '.join(files)}"


def _table(below: list[str]) -> Iterator[str]:
    for line in below[1:] if below and not below[0] else below:
        if not line.startswith("|"):
            return
        yield line


def test_numbers_of_the_documents_are_in_the_results_files_they_link() -> None:
    pages = [PROJECT / "README.md", PROJECT / "benchmarks" / "README.md", *(PROJECT / "docs").glob("*.md")]
    wrong = [f"{page.name}, {problem}" for page in pages for problem in unproven(page.read_text())]
    assert not wrong, "\n".join(wrong)


def test_a_number_that_the_file_lacks_is_found(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.md").write_text("2.2 %, n = 40")
    page = "It errs by 2.2 % of 3 ms ([a](benchmarks/results/a.md)).\n\n[All](benchmarks/results/a.md):\n\n| 2.2 | 9.75 |\n"
    assert list(unproven(page, tmp_path)) == ["line 3: 9.75 is not in a.md"]
