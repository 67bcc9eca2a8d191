"""What may change between two commands on one run directory, and what not."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.search import SearchConfig
from orchestrator.errors import RunDirError
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.run_dir import check_run_dir, claim
from tests.orchestrator import planted

REFERENCE = {"name": "small", "model": {"name": "resnet8_cifar", "num_classes": 10}}
OTHER = {"name": "large", "model": {"name": "resnet20_cifar", "num_classes": 10}}
FIRST: dict[str, Any] = {"baselines": ["uniform"], "references": [REFERENCE]}


def config_of(**changes: Any) -> SearchConfig:
    """Return the first search with changes; those of `search` by the names of its fields."""
    search = {"algorithm": "random", "num_trials": 6, "seed": 0}
    names = changes.keys() & search.keys() | changes.keys() & {"max_hours", "max_gpu_hours", "max_concurrent"}
    search |= {name: changes.pop(name) for name in names}
    return planted.search_config(**{**FIRST, **changes, "search": search})


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A search all of whose 6 trials have ended."""
    run = RunPaths(tmp_path / "planted")
    planted.plant(run, config_of(), planted.all_rows())
    run.recorded.write_text("a link")
    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"num_trials": 12}, {"max_hours": 2.0}, {"max_gpu_hours": 1.0}, {"max_concurrent": 1},
        {"budgets": [{"metric": "latency_ms", "max": 2.0}]}, {"baselines": ["random", "uniform"]},
        {"references": [REFERENCE, OTHER]},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_search_may_grow(run: RunPaths, changes: dict[str, Any]) -> None:
    config, results = config_of(**changes), run.results.read_bytes()
    with claim(run, config):
        assert SearchConfig.model_validate_json(run.config.read_bytes()) == config
        assert not run.recorded.exists(), "MLflow lacks what is new"
    assert run.results.read_bytes() == results


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_trials": 5}, "search.num_trials is 5, but trial_0005 in .* has started; expected at least 6"),
        ({"seed": 1}, "search.seed: 0 there, 1 here"),
        ({"algorithm": "sobol", "num_trials": 12}, "search.algorithm: random there, sobol here"),
        ({"baselines": ["random"]}, "baselines.0: uniform there, random here"),
        ({"references": [OTHER]}, "references.0.name: small there, large here"),
        ({"constraints": []}, "constraints"),
    ],
    ids=["fewer than started", "seed", "algorithm", "baseline left out", "reference left out", "constraints"],
)
def test_what_makes_another_search_is_refused(run: RunPaths, changes: dict[str, Any], message: str) -> None:
    before = run.config.read_bytes()
    with pytest.raises(RunDirError, match=message):
        check_run_dir(run, config_of(**changes))
    assert run.config.read_bytes() == before
    assert run.recorded.exists()


def test_weights_that_were_replaced_make_another_search(run: RunPaths, tmp_path: Path) -> None:
    """A run of an earlier version has no digest of its weights; where both have one, the path of the file does not matter."""

    def with_weights(digest: str | None, file: str = "net") -> SearchConfig:
        weights = {"weights": str(tmp_path / f"{file}.safetensors"), "weights_sha256": digest}
        config = config_of()
        return config.with_models({name: one.model_copy(update=weights) for name, one in config.models.items()})

    run.config.write_text(with_weights(None).to_json())
    with claim(run, with_weights("0" * 64)):
        pass
    check_run_dir(run, with_weights("0" * 64, "moved"))
    with pytest.raises(RunDirError, match=r"base\.model\.weights_sha256: 0{64} there, 1{64} here.*references\.0"):
        check_run_dir(run, with_weights("1" * 64))
    without, first, second = (with_weights(digest).base for digest in (None, "0" * 64, "1" * 64))  # of a training
    assert without.refused_changes(first) == []
    assert len(first.refused_changes(second)) == 1


def test_a_kill_right_after_the_config_has_grown_changes_nothing_else(run: RunPaths) -> None:
    config, results = config_of(num_trials=12), run.results.read_bytes()
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom orchestrator.config.search import SearchConfig\n"
        "from orchestrator.storage.paths import RunPaths\nfrom orchestrator.storage.run_dir import claim\n"
        "with claim(RunPaths(Path(sys.argv[1])), SearchConfig.model_validate_json(sys.argv[2])): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.root), config.model_dump_json()], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    with claim(run, config):
        assert SearchConfig.model_validate_json(run.config.read_bytes()) == config
    assert run.results.read_bytes() == results


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(RunDirError, match=r"\.lock is on a file system without locks \(flock: .*-o flock"),
        claim(RunPaths(tmp_path / "run"), planted.search_config()),
    ):
        pass
