"""Networks that are measured beside the trials: accuracy with weights, size and time with widths alone."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torchvision.models import SwinTransformer, resnet50

import gator
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import UNPRUNED
from orchestrator.config.search import ReferenceConfig
from orchestrator.config.trial import ModelConfig, with_values
from orchestrator.errors import ConfigError
from orchestrator.models import networks as models_networks
from orchestrator.models import registry as models_registry
from orchestrator.reporting.figures import REFERENCE_LABEL, front_figure
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.paths import RunPaths
from orchestrator.trial import fixed_networks
from orchestrator.trial.fixed_networks import architecture_of, measure_fixed
from orchestrator.trial.remeasure import remeasure
from tests.orchestrator import planted
from tests.orchestrator.tiny_trial import TINY

SHIPPED = "search_spaces/paper/architecture_latency_0.5.json"
MODEL = ModelConfig(name="resnet8_cifar", num_classes=4, kwargs={"width": 8})  # twice as wide as the trials'


def test_the_published_architecture_has_its_published_size() -> None:
    graph = gator.trace(models_registry.skeleton(resnet50), torch.zeros(2, 3, 224, 224, device="meta"))
    architecture = architecture_of(graph, SHIPPED)
    stated = json.loads((Path(__file__).resolve().parents[3] / SHIPPED).read_text())
    assert gator.MacsCost(graph)(architecture) == stated["true_macs"]
    assert not architecture.removed_blocks


def test_a_network_with_weights_is_judged_and_one_of_given_widths_only_timed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models_networks.build(MODEL)
    save_file(network.state_dict(), tmp_path / "wide.safetensors")
    weights = str(tmp_path / "wide.safetensors")
    wide = measure_fixed("wide", MODEL.model_copy(update={"weights": weights}), TINY, ClusterConfig())
    assert wide["kind"] == "reference"
    assert 0 <= wide["top1"] <= 100
    assert wide["macs"] == models_networks.count_macs(MODEL, 8)
    assert wide["macs_ratio"] == pytest.approx(wide["macs"] / models_networks.count_macs(TINY.model, 8))

    (tmp_path / "narrow.json").write_text(json.dumps({"channels": {"layer1": {"0": {"conv1": 3}}}}))
    narrow = measure_fixed("narrow", MODEL, TINY, ClusterConfig(), widths=str(tmp_path / "narrow.json"))
    # five of eight inner channels of a block are gone: two 3x3 convolutions of 8 channels at 8 x 8 pixels
    assert wide["macs"] - narrow["macs"] == 2 * 5 * 8 * 9 * 64
    assert narrow["latency_ms"] == pytest.approx(narrow["macs"] / 1e7)  # the clock of TINY
    assert "top1" not in narrow


def tiny_swin(num_classes: int) -> nn.Module:
    """Return torchvision's Swin on 8 px."""
    return SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=num_classes)


def test_an_unpruned_transformer_has_all_of_its_macs() -> None:
    base = with_values(TINY, {"model.name": f"{__name__}:tiny_swin", "model.kwargs": {}})
    row, _ = fixed_networks._measure_fixed(
        UNPRUNED, base.model.model_dump_json(), base.model_dump_json(), None, None, "cpu", False
    )
    assert row["macs_ratio"] == 1


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"layer1.0.conv1": 9}, "share 8 channels, found .9. for them"),
        ({"layer1.0.conv2": 4, "conv1": 5}, r"conv1, layer1\.0\.conv2 share 8 channels, found .4, 5."),
        ({"layer9.conv1": 4}, r"layer9\.conv1 is not a layer whose channels can be pruned"),
    ],
    ids=["too-wide", "not-equal", "unknown"],
)
def test_widths_that_do_not_fit_are_told(tmp_path: Path, channels: dict[str, int], message: str) -> None:
    (tmp_path / "widths.json").write_text(json.dumps({"channels": channels}))
    graph = gator.trace(models_networks.build(MODEL), torch.zeros(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=message):
        architecture_of(graph, str(tmp_path / "widths.json"))


def test_a_reference_is_named_like_no_other_row_and_has_weights_or_widths() -> None:
    with pytest.raises(ValidationError, match="a name that no trial, baseline or folder can have"):
        ReferenceConfig(name="trial_0001", model=MODEL)
    with pytest.raises(ValidationError, match="both set"):
        ReferenceConfig(name="cut", model=MODEL.model_copy(update={"weights": "w.safetensors"}), widths="w.json")


def test_a_reference_is_drawn_as_one_and_measured_once() -> None:
    config = planted.search_config(references=[{"name": "wide", "model": MODEL.model_dump()}])
    before = Outcome(config, planted.all_rows())
    assert [reference.name for reference in before.missing_references] == ["wide"]
    row = planted.finished(9, top1=99.9, latency_ms=0.1) | {"trial_id": "wide", "kind": "reference"}
    outcome = before.with_row(row)
    assert not outcome.missing_references
    drawn = {trace.name: list(trace.y) for trace in front_figure(outcome, {}).data}
    assert drawn[REFERENCE_LABEL] == [99.9]
    assert row not in outcome.front


def test_references_are_timed_in_turns_with_the_unpruned_network(tmp_path: Path) -> None:
    base = with_values(TINY, {"profile.clock": "wall", "profile.num_repeats": 3})
    config = planted.search_config(base=base.model_dump(), references=[{"name": "wide", "model": MODEL.model_dump()}])
    run = RunPaths(tmp_path / "run")
    reference = planted.finished(9, top1=50.0, latency_ms=0.0) | {"trial_id": "wide", "kind": "reference"}
    planted.plant(run, config, [planted.unpruned() | {"latency_ms": 0.0}, reference])
    rows = {row["trial_id"]: row for row in remeasure(run, config, ClusterConfig(), str(run.root))}
    assert set(rows) == {"unpruned", "wide"}
    assert all(row["latency_ms"] > 0 for row in rows.values())
