"""Networks by name, and the one message that each wrong name, argument or weights file gets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.config.trial import ModelConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.models import networks as models_networks
from orchestrator.models import registry as models_registry
from orchestrator.models import saved as models_saved
from orchestrator.storage.paths import RunPaths

TINY = ModelConfig(name="resnet8_cifar", num_classes=3, kwargs={"width": 2})


def config(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"name": "resnet8_cifar", "num_classes": 3, "kwargs": {"width": 2}} | fields)


def linear(num_classes: int, width: int = 4) -> nn.Module:
    """What a user's own module offers as package.module:function."""
    return nn.Linear(width, num_classes)


def not_a_network(num_classes: int) -> str:
    return "resnet"


def test_resnet56_cifar_has_the_macs_of_the_literature() -> None:
    network = models_networks.build(ModelConfig(name="resnet56_cifar", num_classes=10)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    # 125.49 M of the network with parameter-free shortcuts, and two 1x1 shortcuts of 16 x 32 x 16 x 16 = 131,072 each.
    assert counter.get_total_flops() / 2 == pytest.approx(125.75e6, rel=1e-4)


@pytest.mark.parametrize("image_size", [8, 28, 32])
def test_cifar_resnet_takes_images_of_any_size(image_size: int) -> None:
    assert models_networks.build(TINY)(torch.zeros(2, 3, image_size, image_size)).shape == (2, 3)


def test_blocks_per_stage_wins_over_the_depth_in_the_name() -> None:
    network = models_networks.build(config(kwargs={"width": 2, "blocks_per_stage": 2}))
    assert len(network.get_submodule("layer1")) == 2  # type: ignore[arg-type]


def test_torchvision_model_gets_the_asked_number_of_classes() -> None:
    network = models_networks.build(ModelConfig(name="resnet18", num_classes=7))
    assert network.get_submodule("fc").out_features == 7


def test_function_of_the_user_is_called_with_classes_and_kwargs() -> None:
    network = models_networks.build(config(name=f"{__name__}:linear", kwargs={"width": 5}))
    assert network.get_parameter("weight").shape == (3, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"name": "resnet51"}, "did you mean resnet50", id="typo"),
        pytest.param({"name": "resnet21_cifar"}, "expected a depth of 6 n \\+ 2", id="depth"),
        pytest.param(
            {"kwargs": {"widht": 2}}, "cannot be built with .*unexpected keyword argument 'widht'", id="kwarg"
        ),
        pytest.param({"kwargs": {"width": 0}}, "width is 0, expected a whole number of at least 1", id="width"),
        pytest.param({"kwargs": {"num_classes": 5}}, "num_classes", id="classes-twice"),
        pytest.param({"name": "no_such_package:f"}, "cannot be imported .*No module named", id="module"),
        pytest.param({"name": f"{__name__}:lineal"}, "cannot be imported .*lineal", id="function"),
        pytest.param({"name": f"{__name__}:TINY"}, "is a ModelConfig, expected a function", id="no-function"),
        pytest.param({"weights": "DEFAULT"}, "DEFAULT is for torchvision's models", id="default-of-cifar"),
        pytest.param(
            {"name": "resnet18", "kwargs": {}, "weights": "DEFAULT"},
            "num_classes: found 3, expected 1000, as for the DEFAULT weights of resnet18",
            id="default-of-other-classes",
        ),
        pytest.param(
            {"name": "resnet18", "kwargs": {}, "weights": "IMAGENET1K_V2"},
            "torchvision has no IMAGENET1K_V2 for resnet18; did you mean IMAGENET1K_V1",
            id="name-of-torchvision",
        ),
        pytest.param({"weights": "weights.pt"}, "expected DEFAULT, none or a .safetensors file", id="pickle"),
        pytest.param({"weights": "no/such.safetensors"}, "no/such.safetensors not found", id="no-file"),
    ],
)
def test_wrong_model_is_refused_before_anything_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=f"model.*{message}"):
        models_networks.check(config(**fields))


def test_function_that_returns_no_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"returned a str, expected a torch\.nn\.Module"):
        models_networks.build(config(name=f"{__name__}:not_a_network", kwargs={}))


def test_check_touches_no_random_state_and_no_memory() -> None:
    before = torch.get_rng_state()
    models_networks.check(ModelConfig(name="vgg16_bn", num_classes=10))  # 138 M parameters
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "swin_t", "mnasnet0_5"])
def test_skeleton_has_every_shape_and_no_data(name: str) -> None:
    model = ModelConfig(name=name, num_classes=10)
    models_networks.check(model)
    skeleton, network = models_registry.skeleton(lambda: models_networks.build(model)), models_networks.build(model)
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in network.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in skeleton.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in [*skeleton.parameters(), *skeleton.buffers()])


def test_network_that_asks_for_the_version_of_its_weights_is_loaded(tmp_path: Path) -> None:
    source = models_networks.build(ModelConfig(name="mnasnet0_5", num_classes=3))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = models_networks.build(
        ModelConfig(name="mnasnet0_5", num_classes=3, weights=str(tmp_path / "w.safetensors"))
    )
    assert torch.equal(loaded.get_parameter("classifier.1.weight"), source.get_parameter("classifier.1.weight"))


def test_weights_file_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    source = models_networks.build(TINY)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded = models_networks.build(config(weights=str(tmp_path / "w.safetensors")))
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_another_weights_file_than_the_known_one_is_refused_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(models_networks.build(TINY).state_dict(), path)
    with pytest.raises(ConfigError, match=r"has the SHA-256 [0-9a-f]{64}, expected 0{64} .*put the earlier file back"):
        models_networks.build(config(weights=str(path), weights_sha256="0" * 64))


def test_weights_of_another_network_are_refused_with_names_and_shapes(tmp_path: Path) -> None:
    state = models_networks.build(TINY).state_dict()
    state["extra"] = state.pop("fc.bias")
    state["conv1.weight"] = torch.zeros(3, 3, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError) as refusal:
        models_networks.build(config(weights=str(tmp_path / "w.safetensors")))
    assert str(refusal.value).endswith(
        "holds another network, 1 missing: fc.bias; 1 unknown: extra; "
        "1 of another shape: conv1.weight [3, 3, 3, 3] instead of [2, 3, 3, 3]"
    )


def test_damaged_weights_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        models_networks.build(config(weights=str(path)))


def test_trial_without_weights_is_refused_and_the_finished_ones_are_listed(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    run.trial("trial_0001").root.mkdir(parents=True)
    run.trial("trial_0001").weights.touch()
    with pytest.raises(DataError, match=r"expected the folder of a finished trial.*valid: trial_0001"):
        models_saved.load_trial(tmp_path, "trial_0009")


@pytest.mark.parametrize("width", [10**9, 10**30])
def test_a_size_that_no_memory_has_is_refused_without_taking_any(width: int) -> None:
    model = TINY.model_copy(update={"kwargs": {"width": width}})
    with pytest.raises(ConfigError, match=r"cannot be built with .*10000"):
        models_networks.check(model)
