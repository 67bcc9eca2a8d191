"""Every YAML file that ships loads and checks; every space is sampled and planned."""

import json
from pathlib import Path

import optuna
import pytest

from orchestrator import search
from orchestrator.config.cluster import load_cluster
from orchestrator.config.domains import distribution
from orchestrator.config.trial import with_values
from orchestrator.planning.space import load_space
from orchestrator.reporting.paper import RESULTS
from orchestrator.tuning.samplers import make_sampler

PROJECT = Path(__file__).resolve().parents[3]
SPACES = sorted(PROJECT.glob("search_spaces/**/*.yaml"))
CLUSTERS = sorted(PROJECT.glob("clusters/*/cluster.yaml"))


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_space_is_named_after_its_file_sampled_and_planned_with_its_gpu_hours(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = load_space(str(path))
    assert space.name == path.stem
    distributions = {name: distribution(domain) for name, domain in space.params.items()}
    study = optuna.create_study(directions=["maximize"] * len(space.objectives))
    for number in range(min(space.search.num_trials, 8)):
        study.sampler = make_sampler(space.search, number, distributions)
        params = study.ask(distributions).params
        assert params.keys() == space.params.keys()
        assert with_values(space.base, params).gating != space.base.gating
    assert search.main([str(path), "--dry-run", "--run-dir", str(tmp_path)]) == 0
    assert "GPU-hours at" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "table", "group"),
    [
        ("resnet50_macs", "imagenet_resnet50", "flops"),
        ("resnet50_latency_b8", "imagenet_resnet50", "b8"),
        ("resnet56_macs", "cifar10_resnet56", "flops"),
        ("resnet56_macs_direct", "cifar10_resnet56", "direct"),
        ("resnet56_memory", "cifar10_resnet56", "memory"),
    ],
)
def test_space_of_the_paper_has_a_trial_for_each_of_its_rows(name: str, table: str, group: str) -> None:
    rows = json.loads(RESULTS.read_text())[table]
    removed = [row["flops_reduction_percent"] for row in rows if row["group"] == group and row["top1"] is not None]
    points = load_space(f"paper/{name}").search.points_to_evaluate
    # the rows' shares are printed to a hundredth of a percent
    assert [point["gating.target_ratio"] for point in points] == pytest.approx(
        [1 - share / 100 for share in removed], abs=1e-9
    )


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.parent.name)
def test_cluster_loads(path: Path) -> None:
    assert load_cluster(str(path)).workers_per_trial >= 1
