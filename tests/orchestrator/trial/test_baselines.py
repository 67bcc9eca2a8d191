"""The plain choices beside a search's trials: as large, as long, through the same worker."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gator
from orchestrator.config.trial import Baseline, TrialConfig, with_values
from orchestrator.errors import ConfigError
from orchestrator.models import networks as models
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths, TrialPaths
from orchestrator.trial import plain_choices as baselines_plain_choices
from orchestrator.trial.worker import run_assignment
from orchestrator.tuning import baselines as baselines_baselines
from orchestrator.tuning import baselines as driver
from tests.orchestrator.planted import failed, finished, plant, search_config, stopped, unpruned
from tests.orchestrator.tiny_trial import TINY, MemorySession, assign, tiny

KINDS: tuple[Baseline, ...] = ("uniform", "random", "magnitude", "smaller_image")


def plain(kind: Baseline, macs_ratio: float) -> TrialConfig:
    return baselines_baselines.config_of(kind, TINY, macs_ratio)


def test_baseline_trains_as_long_as_the_trial_and_differs_in_nothing_else() -> None:
    config = plain("random", 0.4)
    assert (config.num_epochs, config.gating_epochs) == (TINY.num_epochs, 0)
    same = {"pruning.choice": "gates", "pruning.macs_ratio": None, "finetuning.epochs": TINY.finetuning.epochs}
    assert with_values(config, same) == TINY


@pytest.mark.parametrize("from_cut", [False, True], ids=["whole", "cut"])
def test_baseline_trains_as_long_as_the_whole_chain(tmp_path: Path, from_cut: bool) -> None:
    first, second = TrialPaths(tmp_path / "trial_0000"), TrialPaths(tmp_path / "trial_0001")
    links = {first: TINY, second: tiny(gating__start_from=str(first.root), gating__epochs=5)}
    for paths, config in links.items():
        paths.root.mkdir()
        paths.config.write_text(config.to_json())
    third = tiny(gating__start_from=str((second.cut if from_cut else second).root), finetuning__epochs=7)
    expected = [TINY.num_epochs, 5 if from_cut else 5 + TINY.finetuning.epochs, TINY.gating.epochs + 7]
    assert baselines_baselines.config_of("uniform", third, 0.5).finetuning.epochs == sum(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_baseline_runs_through_the_worker_at_its_size(kind: Baseline, tmp_path: Path) -> None:
    # the tiny network's channels are large, and a picture of 8 pixels has few smaller sizes: a width gives more of them
    config = with_values(plain(kind, 0.4), {"model.kwargs": {"width": 8}, "data.image_size": 16})
    session = MemorySession(tmp_path)
    metrics = run_assignment(assign(tmp_path, config), session)
    assert [(row["epoch"], row["stage"]) for row in session.reports[:-1]] == [(n, "finetune") for n in (1, 2, 3, 4)]
    assert metrics["macs_ratio"] == pytest.approx(0.4, rel=0.02 if kind != "smaller_image" else 0.1)
    reloaded = gator.load_pruned(tmp_path / "trial", build=lambda: models.build(config.model))
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == metrics["params"]


@pytest.mark.parametrize(("ratio", "size"), [(1.0, 16), (0.5, 11), (0.25, 8)], ids=str)
def test_smaller_image_has_the_size_whose_cost_is_nearest(ratio: float, size: int) -> None:
    # MACs go with the square of the side, rounded up where a stride halves it: 16, 8, 4 and 11, 6, 3
    assert baselines_plain_choices.smaller_size(tiny(data__image_size=16), ratio) == size


def test_network_that_takes_no_other_size_is_told() -> None:
    config = with_values(TINY, {"model.name": f"{__name__}:one_size", "model.kwargs": {}})
    with pytest.raises(
        ConfigError, match=r"smaller_image cannot be made .*one_size takes no images of \d+ pixels.*leave it out"
    ):
        baselines_plain_choices.smaller_size(config, 0.5)


def one_size(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, num_classes))


def test_best_of_the_front_is_the_reference() -> None:
    rows = [
        unpruned(),
        finished(0, 97.0, 2.0),
        finished(1, 90.0, 1.0),
        finished(2, 99.0, 3.0, macs_ratio=0.75),
        failed(3),
    ]
    found = baselines_baselines.reference(Outcome(search_config(), rows))
    assert found is not None
    assert found["trial_id"] == "trial_0000"  # trial_0002 is more accurate, but breaks macs_ratio <= 0.5


def test_smallest_is_the_reference_where_no_trial_meets_the_constraints() -> None:
    rows = [finished(0, 97.0, 2.0, macs_ratio=0.9), finished(1, 90.0, 1.0, macs_ratio=0.75), stopped(2, epoch=1)]
    found = baselines_baselines.reference(Outcome(search_config(), rows))
    assert found is not None
    assert found["trial_id"] == "trial_0001"
    assert baselines_baselines.reference(Outcome(search_config(), rows[2:])) is None


def test_baseline_with_a_row_is_not_missing() -> None:
    config = search_config(baselines=["random", "uniform"])
    row = finished(0, 90.0, 1.0) | {"trial_id": "random", "kind": "random"}
    assert Outcome(config, [unpruned(), row]).missing_baselines == ["uniform"]


def test_baselines_wait_for_the_trials_that_a_spent_budget_has_left_out(tmp_path: Path) -> None:
    config, run, said = search_config(baselines=["uniform"]), RunPaths(tmp_path / "run"), list[str]()
    plant(run, config, [unpruned(), finished(0, 97.0, 2.0)])
    plan = SimpleNamespace(config=config, run=run)
    recorder = SimpleNamespace(progress=SimpleNamespace(say=said.append))
    tuning: Any = SimpleNamespace(plan=plan, recorder=recorder)  # no run(): nothing may run
    driver.run_baselines(tuning, tmp_path / "weights.safetensors")
    assert said == [f"uniform once the other {config.search.num_trials - 1} trials have a result"]
