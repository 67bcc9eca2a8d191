"""The typed config: what it refuses, and that it goes through JSON unchanged."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.base import differences
from orchestrator.config.search import Constraint, SearchConfig
from orchestrator.config.trial import ModelConfig, ProfileConfig, StageConfig, TrialConfig, with_values
from orchestrator.errors import ConfigError

TRIAL: dict[str, Any] = {
    "model": {"name": "resnet20_cifar", "num_classes": 10, "kwargs": {"width": 8}},
    "data": {"name": "digits", "image_size": 32, "global_batch_size": 64},
    "pretraining": {"epochs": 2, "lr": 0.1},
    "gating": {"epochs": 3, "lr": 0.1, "loss_weight": 1.0},
    "finetuning": {"epochs": 1, "lr": 0.01},
}
SEARCH: dict[str, Any] = {
    "name": "small",
    "base": TRIAL,
    "params": {
        "gating.loss_weight": {"type": "float", "low": 0.1, "high": 4.0, "log": True},
        "gating.epochs": {"type": "int", "low": 2, "high": 8},
        "finetuning.schedule": {"type": "categorical", "choices": ["cosine", 1, 1.0, True, None]},
    },
    "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
    "constraints": [{"metric": "macs_ratio", "max": 0.5}],
}


@pytest.fixture
def trial() -> TrialConfig:
    return TrialConfig.model_validate(TRIAL)


@pytest.fixture
def search() -> SearchConfig:
    return SearchConfig.model_validate(SEARCH)


def test_config_comes_back_equal_from_its_json(search: SearchConfig) -> None:
    assert SearchConfig.model_validate_json(search.to_json()) == search
    assert SearchConfig.model_validate(search.model_dump(mode="json")) == search


def test_choices_keep_their_types_through_json(search: SearchConfig) -> None:
    again = SearchConfig.model_validate_json(search.to_json())
    choices = again.params["finetuning.schedule"].corners()
    assert [type(choice) for choice in choices] == [str, int, float, bool, type(None)]


def test_config_is_frozen(trial: TrialConfig) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        trial.seed = 1  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    def undocumented(cls: Any) -> list[str]:
        inner = [field.annotation for field in cls.model_fields.values() if hasattr(field.annotation, "model_fields")]
        own = [
            f"{cls.__name__}.{name}"
            for name, field in cls.model_fields.items()
            if field.description is None and not hasattr(field.annotation, "model_fields")
        ]
        return own + [name for child in inner for name in undocumented(child)]

    # A field that holds another config is documented by that class; a domain's type by the field params.
    assert undocumented(SearchConfig) == []


def test_values_replace_fields_by_their_dotted_names(trial: TrialConfig) -> None:
    drawn = with_values(trial, {"gating.loss_weight": 0.3, "gating.cost.params": 0.5, "seed": 7})
    assert (drawn.gating.loss_weight, drawn.gating.cost.params, drawn.seed) == (0.3, 0.5, 7)
    assert trial.gating.loss_weight == 1.0


def test_values_go_through_the_checks_again(trial: TrialConfig) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        with_values(trial, {"gating.target_ratio": 1.5})
    with pytest.raises(KeyError, match=r"gating\.los_weight"):
        with_values(trial, {"gating.los_weight": 1.0})


@pytest.mark.parametrize(
    ("values", "is_same"),
    [
        pytest.param({"gating.lr": 0.5}, True, id="gating"),
        pytest.param({"finetuning.epochs": 9}, True, id="finetuning"),
        pytest.param({"data.num_loader_workers": 4}, True, id="loader-workers"),
        pytest.param({"pretraining.lr": 0.2}, False, id="pretraining"),
        pytest.param({"model.kwargs": {"width": 16}}, False, id="model"),
        pytest.param({"data.validation_share": 0.3}, False, id="data"),
        pytest.param({"seed": 1}, False, id="seed"),
    ],
)
def test_base_hash_names_what_the_base_network_depends_on(
    trial: TrialConfig, values: dict[str, Any], is_same: bool
) -> None:
    assert (with_values(trial, values).base_hash() == trial.base_hash()) is is_same


def test_base_hash_is_the_same_in_every_process_and_release(trial: TrialConfig) -> None:
    # Base networks of earlier runs are found by it: a new value here makes users train theirs anew.
    assert trial.base_hash() == "f50d3d8e7879a5f9"


def test_a_config_is_the_same_in_every_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each session of Ray and each edited file give a job another one, in which the same submission resumes."""
    model, files = {**TRIAL["model"], "weights": "net.safetensors"}, {"train": "images/*.tar", "test": "~/val"}

    def written() -> TrialConfig:
        return TrialConfig.model_validate({**TRIAL, "model": model, "data": {**TRIAL["data"], **files}})

    monkeypatch.chdir(tmp_path)
    before = written()
    monkeypatch.chdir("/")
    assert written() == before
    assert written().base_hash() == "31d5eb54b3de7278", "as before weights had a SHA-256"


def test_a_path_without_a_home_folder_is_refused() -> None:
    with pytest.raises(ValidationError, match="no such home folder, expected one of this machine"):
        ProfileConfig(latency_table="~nosuchuser/table.parquet")


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    """The same content elsewhere is the same base network, other content under the same name another."""
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(b"one")
    second.write_bytes(b"one")

    def trial_of(path: Path) -> TrialConfig:
        model = ModelConfig(name="resnet18", num_classes=10, weights=str(path)).with_digest()
        return TrialConfig.model_validate({**TRIAL, "model": model.model_dump()})

    before = trial_of(first)
    assert before.model.weights_sha256 == hashlib.sha256(b"one").hexdigest()
    assert trial_of(second).base_hash() == before.base_hash()
    assert before.refused_changes(trial_of(second)) == []
    first.write_bytes(b"two")
    assert trial_of(first).base_hash() != before.base_hash()
    with pytest.raises(ConfigError, match=r"a\.safetensors has the SHA-256 .*put the earlier file back"):
        before.model.with_digest()
    with pytest.raises(ValidationError, match=r"weights_sha256 is for a \.safetensors file, found weights DEFAULT"):
        ModelConfig(name="resnet18", num_classes=1000, weights="DEFAULT", weights_sha256="0" * 64)


def test_random_base_network_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"base network would be random: set model\.weights"):
        TrialConfig.model_validate({**TRIAL, "pretraining": {"epochs": 0, "lr": 0.1}})


def test_the_word_none_means_no_weights() -> None:
    model = {**TRIAL["model"], "weights": "none"}
    assert TrialConfig.model_validate({**TRIAL, "model": model}).model.weights is None


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        pytest.param("data", "validation_share", 0.0, id="no-validation"),
        pytest.param("data", "global_batch_size", 0, id="empty-batch"),
        pytest.param("gating", "lr", float("nan"), id="nan"),
        pytest.param("gating", "lr", True, id="bool-for-number"),
        pytest.param("gating", "epochs", 0, id="no-gating"),
        pytest.param("gating", "epochs", 1.5, id="half-an-epoch"),
        pytest.param("gating", "init_keep_prob", 0.5, id="closed-from-the-start"),
        pytest.param("gating", "warmup_epochs", 4, id="warmup-longer-than-stage"),
        pytest.param("gating", "cost", {"macs": 0}, id="cost-of-nothing"),
        pytest.param("gating", "cost", {"latency": 1}, id="unknown-cost"),
        pytest.param("profile", "batch_sizes", [], id="no-batch-size"),
        pytest.param("profile", "batch_sizes", [1, 1], id="batch-size-twice"),
    ],
)
def test_trial_out_of_range_is_refused(section: str, field: str, value: object) -> None:
    content = {**TRIAL, section: {**TRIAL.get(section, {}), field: value}}
    with pytest.raises(ValidationError):
        TrialConfig.model_validate(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param("name", "../elsewhere", "letters, digits", id="path-as-name"),
        pytest.param("name", "base", "storage uses", id="name-of-the-storage"),
        pytest.param("objectives", [], "at least 1", id="no-objective"),
        pytest.param("objectives", [{"metric": "top1", "mode": "max"}] * 2, "once", id="objective-twice"),
        pytest.param("objectives", [{"metric": "latency_p90_ms", "mode": "min"}], "metric", id="not-every-epoch"),
        pytest.param("constraints", [{"metric": "macs_ratio"}], "expected max or min", id="no-bound"),
        pytest.param("constraints", [{"metric": "macs", "min": 2, "max": 1}], "exceeds max", id="empty-bound"),
        pytest.param("params", {"gating.lr": {"type": "float", "low": 1, "high": 1}}, "not below", id="empty-range"),
        pytest.param(
            "params", {"gating.lr": {"type": "float", "low": 0, "high": 1, "log": True}}, "logarithm", id="log-of-zero"
        ),
        pytest.param(
            "params",
            {"gating.lr": {"type": "float", "low": 1, "high": 2, "log": True, "step": 0.1}},
            "exclude each other",
            id="log-and-step",
        ),
        pytest.param("params", {"gating.lr": {"type": "categorical", "choices": []}}, "at least 1", id="no-choice"),
    ],
)
def test_wrong_search_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SearchConfig.model_validate({**SEARCH, key: value})


@pytest.mark.parametrize(
    ("domain", "held", "not_held"),
    [
        ({"type": "int", "low": 2, "high": 9, "step": 3}, (2, 5, 8), (3, 9, 2.0, True)),
        ({"type": "float", "low": 0.1, "high": 0.7, "step": 0.2}, (0.1, 0.3, 0.5, 0.7), (0.2, 0.71, True)),
        ({"type": "float", "low": 0.1, "high": 0.7}, (0.1, 0.234), (0.05,)),
    ],
    ids=["whole numbers in steps", "numbers in steps", "numbers"],
)
def test_a_domain_holds_its_steps_alone(
    domain: dict[str, object], held: tuple[object, ...], not_held: tuple[object, ...]
) -> None:
    config = SearchConfig.model_validate({**SEARCH, "params": {"gating.lr": domain}})
    assert [config.params["gating.lr"].holds(value) for value in held] == [True] * len(held)
    assert [config.params["gating.lr"].holds(value) for value in not_held] == [False] * len(not_held)


def test_constraint_may_name_the_latency_of_another_batch_size() -> None:
    assert Constraint(metric="latency_ms_b32", max=4.0).metric == "latency_ms_b32"


def test_differences_name_each_field_that_sets_two_configs_apart(search: SearchConfig) -> None:
    content = search.model_dump(mode="json")
    content["base"]["gating"]["lr"] = 0.2
    del content["params"]["gating.epochs"]
    assert differences(search, SearchConfig.model_validate(content)) == [
        "base.gating.lr: 0.1 there, 0.2 here",
        "params.gating.epochs.type: int there, nothing here",
        "params.gating.epochs.low: 2 there, nothing here",
        "params.gating.epochs.high: 8 there, nothing here",
        "params.gating.epochs.log: False there, nothing here",
        "params.gating.epochs.step: 1 there, nothing here",
    ]
    assert differences(search, search) == []


def test_stage_defaults_are_those_of_the_paper() -> None:
    stage = StageConfig(epochs=1, lr=0.01)
    assert (stage.momentum, stage.weight_decay) == (0.9, 1e-4)
