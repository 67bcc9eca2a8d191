"""Every YAML file that ships loads and checks."""

from pathlib import Path

import pytest

from orchestrator.cluster import load_cluster
from orchestrator.space import load_space

PROJECT = Path(__file__).resolve().parents[2]
SPACES = sorted(PROJECT.glob("search_spaces/**/*.yaml"))
CLUSTERS = sorted(PROJECT.glob("clusters/*/cluster.yaml"))


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_space_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_space(str(path)).name == path.stem


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.parent.name)
def test_cluster_loads(path: Path) -> None:
    assert load_cluster(str(path)).workers_per_trial >= 1
