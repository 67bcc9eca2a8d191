"""What README and the quickstart tell a reader to type is accepted: every command of every block, without running it."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/quickstart.md", "docs/tutorial.md", "docs/reproduce.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
VERB = re.compile(r"python -m orchestrator\.(\w+)(.*)")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))


def blocks(page: str, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall((PROJECT / page).read_text(encoding="utf-8")) if found == language]


def lines_of(page: str) -> list[str]:
    lines = (line.partition(" #")[0].strip() for text in blocks(page, "") for line in text.splitlines())
    return [line for line in lines if re.match(r"(\S*python -m|make|ray job|git clone|apt-get)\b", line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_a_verb_with_arguments_that_it_takes(page: str) -> None:
    assert lines_of(page)
    for line in lines_of(page):
        if line.startswith("make"):
            assert shlex.split(line)[1] in MAKE_TARGETS, line
        elif verb := VERB.search(line):
            module = importlib.import_module(f"orchestrator.{verb[1]}")
            module._parser().parse_args(shlex.split(verb[2]))


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_five_lines_of_python_load_the_best_network(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from orchestrator import models

    (text,) = [text for text in blocks(page, "python") if "load_trial" in text]
    assert len(text.splitlines()) <= 5
    asked = []

    def load_trial(run_dir: str, trial_id: str) -> torch.nn.Module:
        asked.append((run_dir, trial_id))
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))

    monkeypatch.setattr(models, "load_trial", load_trial)
    exec(compile(text, page, "exec"), {})
    assert asked == [("runs/digits", "trial_0003")]
