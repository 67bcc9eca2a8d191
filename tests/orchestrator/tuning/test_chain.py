"""gating.start_from as a search space has it."""

from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.planning.space import load_space


def test_start_without_a_finished_trial_is_refused_with_the_space(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"base.gating.start_from: .*/nowhere has no weights.safetensors, so no network"
    ):
        load_space("digits", [f"base.gating.start_from={tmp_path}/nowhere"])


def test_trial_without_gates_is_no_start(tmp_path: Path) -> None:
    for name in ("weights.safetensors", "architecture.json"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"has no gates.safetensors, so no gates to start from"):
        load_space("digits", [f"base.gating.start_from={tmp_path}"])


def test_start_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    for name in ("weights.safetensors", "architecture.json"):
        (tmp_path / name).touch()
    (tmp_path / "gates.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match=r"gating.start_from: .*gates.safetensors is a link"):
        load_space("digits", [f"base.gating.start_from={tmp_path}"])


def test_relative_start_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("weights.safetensors", "architecture.json", "gates.safetensors"):
        (tmp_path / name).touch()
    space = load_space("digits", ["base.gating.start_from=."])
    assert space.base.gating.start_from == str(tmp_path)
