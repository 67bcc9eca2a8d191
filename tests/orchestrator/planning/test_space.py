"""Spaces that extend one another, and searches whose trials go on from the one before."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.domains import IntDomain
from orchestrator.config.rungs import num_concurrent
from orchestrator.errors import ConfigError
from orchestrator.planning.forecast import GATED_LAUNCHES, gpu_hours, images_per_s
from orchestrator.planning.plan import SearchPlan
from orchestrator.planning.space import load_space
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import StoragePaths
from orchestrator.trial.assignment import Assignment
from orchestrator.tuning.descend import parent_chooser
from orchestrator.tuning.schedulers import NoRule, RuleScheduler
from orchestrator.tuning.trials import request_maker
from tests.orchestrator import planted

BASE = """
name: first
base:
  model:       {name: resnet8_cifar, num_classes: 4}
  data:        {name: synthetic, image_size: 16, global_batch_size: 64}
  pretraining: {epochs: 1, lr: 0.1}
  gating:      {epochs: 2, lr: 0.1, target_ratio: 0.5}
  finetuning:  {epochs: 1, lr: 0.02}
objectives:
  - {metric: top1, mode: max}
  - {metric: latency_ms, mode: min}
"""


def write(folder: Path, **texts: str) -> str:
    """Write YAML files and return the path of the last one."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


def test_an_extending_file_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    second = "extends: first.yaml\nname: second\nbase: {gating: {epochs: 5}}\nobjectives: [{metric: top1, mode: max}]\n"
    third = "extends: second.yaml\nname: third\nbase: {gating: {lr: 0.3}}\n"
    space = load_space(write(tmp_path, first=BASE, second=second, third=third), ["base.finetuning.epochs=9"])
    gating = space.base.gating
    assert (space.name, gating.epochs, gating.lr, gating.target_ratio) == ("third", 5, 0.3, 0.5)
    assert [objective.metric for objective in space.objectives] == ["top1"]
    assert space.base.finetuning.epochs == 9


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"second": "extends: none.yaml\n"}, r"second\.yaml: extends: .*none\.yaml not found"),
        ({"second": "extends: [a]\n"}, r"extends: found \['a'\], expected a YAML file"),
        (
            {"first": "extends: second.yaml\n", "second": "extends: first.yaml\n"},
            "extends: second.yaml extends this file in turn",
        ),
        ({"first": BASE, "second": "extends: first.yaml\nbase: {gatin: {}}\n"}, "did you mean gating"),
    ],
    ids=["absent", "no-name", "circle", "typo"],
)
def test_a_wrong_extension_is_told(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_space(write(tmp_path, **texts))


def test_weights_files_of_the_base_and_of_references_get_their_digest(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(b"one")
    model = f"{{name: resnet8_cifar, num_classes: 4, weights: {tmp_path}/net.safetensors}}"
    references = f"references: [{{name: other, model: {model}}}]\n"
    space = load_space(write(tmp_path, space=BASE + references), [f"base.model={model}"])
    digest = hashlib.sha256(b"one").hexdigest()
    assert [one.weights_sha256 for one in space.models.values()] == [digest, digest]


def chained(**search: Any) -> Any:
    points = [{"gating.loss_weight": weight} for weight in (0.5, 1.0, 2.0)]
    given = {"num_trials": 3, "points_to_evaluate": points, "descend": "chain"} | search
    return planted.search_config(search=given, scheduler={"type": "none"})


def test_each_trial_of_a_chain_starts_from_the_one_before_it(tmp_path: Path) -> None:
    storage = StoragePaths(tmp_path)
    plan = SearchPlan(config=chained(), cluster=ClusterConfig(), storage=storage, run=storage.run("planted"))
    write_atomic(plan.run.config, plan.config.to_json())
    make, parent_of = (
        request_maker(plan, tmp_path / "weights.safetensors"),
        parent_chooser(plan, RuleScheduler(NoRule())),
    )
    assert parent_of is not None
    trial_ids = [f"trial_{number:04d}" for number in range(3)]
    starts = [
        Assignment.from_dict(make(name, {}, parent_of(name, {}))["assignment"]).config.gating.start_from
        for name in trial_ids
    ]
    assert starts == [None, str(plan.run.trial("trial_0000").root), str(plan.run.trial("trial_0001").root)]
    assert num_concurrent(plan.config, capacity=8) == 1
    assert "each starts from the one before it" in plan.text()


def test_a_chain_has_a_point_for_each_trial_and_no_early_stopping() -> None:
    with pytest.raises(ValidationError, match="found 3 points for 4 trials"):
        chained(num_trials=4)
    with pytest.raises(ValidationError, match=r"chain and scheduler\.type asha exclude each other"):
        chained().model_validate(chained().model_dump() | {"scheduler": {"type": "asha"}})


@pytest.mark.parametrize("key", ["chain", "lineage", "lineage_share"])
def test_a_key_that_descend_has_replaced_is_unknown(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"search.{key} is not a field of .*descend"):
        load_space("digits", [f"search.{key}=1"])


def test_gpu_hours_count_every_image_of_every_epoch() -> None:
    config = planted.search_config(baselines=["uniform"])  # 1 epoch of pretraining, 4 trials of 2 gated + 1 plain
    # 2e9 MACs: 1,667 images/s, far below what launches allow; half the epochs; gated steps take half as long again
    epochs = 1 + 4 * 1.5 * (2 * 1.5 + 1) / 3 + 3
    expected = epochs * 60_000 * 0.9 / (20e12 / (6 * 2e9)) / 3600
    assert gpu_hours(config, 1.5, macs=2_000_000_000, num_tensors=8, num_images=60_000) == pytest.approx(expected)
    tiny = gpu_hours(config, 1.5, macs=1000, num_tensors=8, num_images=60_000)
    assert tiny == pytest.approx(
        (1 + 4 * 1.5 + 3) * 60_000 * 0.9 / 20_000 / 3600
    )  # both kinds of steps wait for images


def test_a_small_deep_network_is_bound_by_launches() -> None:
    """161 tensors at 3.5 kernels of 5 us: 2.8 ms for a batch of 32, however little they compute."""
    plain, gated = (images_per_s(1000, 161, 32, is_gated=is_gated) for is_gated in (False, True))
    assert plain == pytest.approx(32 / (161 * 3.5 * 5e-6))
    assert plain / gated == pytest.approx(GATED_LAUNCHES)


def test_the_target_of_a_trial_is_of_one_thing() -> None:
    with pytest.raises(ValidationError, match="target_of macs is for target_ratio"):
        planted.search_config(
            base=planted.tiny_base(gating=1)
            | {
                "gating": {"epochs": 1, "lr": 0.1, "target_ms": 2, "target_of": "macs"},
                "profile": {"latency_table": "table.parquet"},
            }
        )


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("base.data.val=/images", "data.test"),
        ("base.data.holdout=0.2", "data.validation_share"),
        ("base.pruning.align=8", "pruning.round_to"),
        ("params.pruning.align={type: categorical, choices: [1, 8]}", "pruning.round_to"),
        ("search.points=[{}]", "search.points_to_evaluate"),
        ("search.algorithm=qmc", "sobol"),
        ("search.algorithm=optuna", "tpe"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(override: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {override.partition('=')[0]}=.*; it is called {new} now$"):
        load_space("digits", [override])


def test_an_old_value_of_one_key_is_no_hint_for_another() -> None:
    with pytest.raises(ConfigError, match=r"scheduler.type: found 'optuna', expected .*") as caught:
        load_space("digits", ["scheduler.type=optuna"])
    assert "tpe" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "domain", "message"),
    [
        ("gating.epochs", "{type: float, low: 2, high: 8}", r"params\.gating\.epochs: found 3\.9\d+"),
        ("gating.epochs", "{type: float, low: 2, high: 8, step: 1.5}", r"params\.gating\.epochs: found 3\.5"),
        ("pruning.round_to", "{type: int, low: 1, high: 8}", r"params\.pruning\.round_to: found 2"),
    ],
)
def test_a_range_whose_ends_alone_fit_is_refused(name: str, domain: str, message: str) -> None:
    """A mean of 2 and 8 would be whole; 2 + 6 / pi = 3.9 is not."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_space("digits", [f"params.{name}={domain}"])
    assert len(str(caught.value).splitlines()) <= 2


def test_a_range_of_whole_steps_fits_a_whole_number() -> None:
    load_space("digits", ["params.finetuning.epochs={type: float, low: 2, high: 8, step: 2}"])
    domain = IntDomain(type="int", low=1, high=10**12)
    assert (len(list(domain.inner())), next(domain.inner())) == (1000, 1)


@pytest.mark.parametrize("section", ["constraints", "budgets"])
def test_a_limit_for_a_batch_size_that_is_not_timed_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.0\.metric: found 'latency_ms_b7', .* add 7 to it"):
        load_space("digits", [f"{section}=[{{metric: latency_ms_b7, max: 4}}]"])
