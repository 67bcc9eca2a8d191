"""The law: the pruned network equals the gated one in eval mode, whatever is cut."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision import models

import gator
from tests.gator.law import assert_law, close, random_keep
from tests.gator.zoo import ZOO, Case, randomised


@pytest.mark.parametrize("empty", [0.0, 0.3], ids=["channels", "blocks"])
@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO.keys())
def test_pruned_equals_masked(case: Case, empty: float) -> None:
    model = randomised(case.build())
    graph = case.graph
    for seed in range(3):
        inputs = torch.randn(case.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert_law(model, graph, inputs, random_keep(graph, seed, empty))


@pytest.mark.parametrize(
    ("empty", "gone"),
    [
        (["layer1.1.conv1"], ("layer1.1",)),
        (["layer1.1.conv2"], ("layer1.1",)),
        (["layer2.0.conv1", "layer2.0.conv2"], ("layer2.0",)),
        (["layer1.0.conv2", "layer2.0.conv1", "layer4.0.conv2"], ("layer1.0", "layer2.0", "layer4.0")),
    ],
    ids=["first inner group", "second inner group", "first block of a stage", "several"],
)
def test_one_empty_inner_group_of_a_bottleneck_removes_the_block(empty: list[str], gone: tuple[str, ...]) -> None:
    model = randomised(ZOO["bottleneck"].build())
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pruned, architecture = assert_law(model, gator.trace(model, inputs), inputs, {name: [] for name in empty})
    assert architecture.removed_blocks == gone
    assert all(architecture.keep[f"{block}.conv{inner}"] == () for block in gone for inner in (1, 2))
    assert not any(name.startswith(f"{block}.conv") for block in gone for name, _ in pruned.named_modules())


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO.keys())
def test_full_architecture_is_the_original_bit_for_bit(case: Case) -> None:
    model = randomised(case.build())
    inputs = torch.randn(case.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = case.graph
    pruned = gator.prune(model, graph, gator.Architecture.full(graph))
    assert torch.equal(pruned(inputs), model(inputs))


@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO.keys())
def test_closed_channels_cannot_be_felt(case: Case) -> None:
    """Fill every entry of a closed channel with 1e6: neither the masked nor the pruned network notices."""
    model = randomised(case.build())
    inputs = torch.randn(case.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = case.graph
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, seed=1, empty=0.3))
    gated = gator.GatedModel(model, graph).eval()
    gated.load_architecture(architecture)
    masked, pruned = gated(inputs).clone(), gator.prune(model, graph, architecture)(inputs)
    with torch.no_grad():
        for group in graph.groups:
            closed = torch.ones(group.num_channels, dtype=torch.bool)
            closed[list(architecture.keep[group.name])] = False
            for dim in group.dims:
                owner, _, attribute = dim.tensor.rpartition(".")
                tensor = getattr(model.get_submodule(owner), attribute)
                tensor.index_fill_(dim.dim, dim.entries(closed.nonzero().flatten()), 1e6)
    assert torch.equal(gator.prune(model, graph, architecture)(inputs), pruned)
    assert close(gated(inputs), masked)


@pytest.mark.parametrize("name", ["vit", "swin", "swin, second version", "convnext", "layer norm"])
def test_each_sample_of_a_training_batch_sees_the_network_of_its_own_mask(name: str) -> None:
    # Nothing in these networks joins samples, so that each one can be computed alone by the network that its mask describes.
    case = ZOO[name]
    model = randomised(case.build())
    inputs = torch.randn(8, *case.input_shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = case.graph
    gated = gator.GatedModel(model, graph, gator.GateConfig(init_keep_prob=0.8)).train()
    outputs = gated(inputs)
    num_compared = 0
    for sample, mask in enumerate(gated.mask_NC):
        keep = gated.keep_indices(mask.bool())
        if all(keep.values()):
            pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, keep))
            assert close(pruned(inputs[sample : sample + 1]), outputs[sample : sample + 1])
            num_compared += 1
    assert num_compared >= 2
    outputs.square().sum().backward()
    assert gated.gates.logits_C.grad.abs().min() > 0


def test_prune_leaves_the_model_untouched_and_keeps_flags() -> None:
    model = ZOO["basic"].build()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    graph = gator.trace(model, torch.zeros(1, 3, 32, 32))
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, {"conv1": [0, 3], "layer2.0.conv1": []}))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.conv1.out_channels == 8
    assert pruned.conv1.out_channels == 2
    assert pruned.bn1.num_features == 2
    assert not pruned.conv1.weight.requires_grad
    assert pruned.fc.weight.requires_grad
    assert pruned.training
    assert not pruned.layer1.training
    assert pruned.layer2[0].training
    assert type(pruned.layer1[0]) is type(model.layer1[0])
    assert not any(module._forward_hooks for module in pruned.modules())


ACTIVATIONS = (nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Hardsigmoid)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda cls: cls.__name__)
def test_activations(activation: Callable[..., nn.Module], inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation(inplace=inplace), nn.Conv2d(8, 4, 1))
    model, inputs = randomised(model), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = gator.trace(model, inputs)
    assert {group.name: group.num_channels for group in graph.groups} == {"0": 8}
    assert_law(model, graph, inputs, {"0": [1, 2, 5]})


PLACES = {
    "cpu": [("cpu", torch.float16), ("cpu", torch.bfloat16), ("meta", torch.float32)],
    "cuda": [("cuda", torch.float16), ("cuda", torch.bfloat16)],
}


@pytest.mark.parametrize("places", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ZOO.values(), ids=ZOO.keys())
def test_pruning_is_slicing_and_touches_nothing_else(case: Case, places: str) -> None:
    """In any dtype and on any device the same entries stay, to the bit, with the settings of their modules."""
    if places == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = randomised(case.build()).float()
    graph = gator.trace(model, torch.zeros(case.input_shape))
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, seed=4, empty=0.3))
    pruned = gator.prune(model, graph, architecture)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 > 0
        if isinstance(module, _NormBase):
            module.eps, module.momentum = 0.25, 0.375
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    for device, dtype in PLACES[places]:
        if device == "meta" and case is ZOO["tied"]:
            continue  # Module.to("meta") unties what is tied
        given = copy.deepcopy(model).to(device=device, dtype=dtype)
        before, state = copy.deepcopy(given), dict(_tensors(given))
        small = gator.prune(given, graph, architecture)
        after = dict(_tensors(given))
        assert all(after[name] is tensor for name, tensor in state.items())
        assert all(_same(tensor, after[name]) for name, tensor in _tensors(before))
        expected = dict(_tensors(copy.deepcopy(pruned).to(device=device, dtype=dtype)))
        assert [name for name, _ in _tensors(small)] == list(expected)
        # all but the constants of a forward that was written again: they keep the dtype they were traced in
        assert all(_same(tensor, expected[name]) for name, tensor in _tensors(small) if name in state)
        assert all(tensor.requires_grad == state[name].requires_grad for name, tensor in small.named_parameters())
        modules = dict(given.named_modules())
        for name, module in small.named_modules():
            assert module.training == modules[name].training
            assert not isinstance(module, _NormBase) or (module.eps, module.momentum) == (0.25, 0.375)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(one: Tensor, other: Tensor) -> bool:
    is_alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
    return is_alike and (one.is_meta or torch.equal(one, other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_and_layout_survive(dtype: torch.dtype) -> None:
    model = ZOO["chain"].build().to(dtype=dtype, memory_format=torch.channels_last)
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8, dtype=dtype))
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, {"0": [1, 2], "3": [0, 5]}))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_prunes_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = models.resnet50()
    graph = gator.trace(model, torch.zeros(1, 3, 224, 224, device="meta"))
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, {"conv1": range(32), "layer1.1.conv2": []}))
    assert pruned.conv1.weight.shape == (32, 3, 7, 7)
    assert pruned.conv1.weight.is_meta


def test_pruned_network_trains() -> None:
    model = ZOO["basic"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 32, 32))
    pruned = gator.prune(
        model, graph, gator.Architecture.from_keep(graph, {"layer1.0.conv1": [], "layer3.0.conv1": [1]})
    )
    pruned.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_a_graph_of_another_network_is_refused() -> None:
    graph = gator.trace(ZOO["basic"].build(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(gator.PruneError, match=r"parameter 'layer1.0.conv1.weight' has shape .* in the model"):
        gator.prune(ZOO["bottleneck"].build(), graph, gator.Architecture.full(graph))


def test_saved_network_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    build = ZOO["bottleneck"].build
    model = randomised(build()).float()
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(model, inputs)
    architecture = gator.Architecture.from_keep(graph, random_keep(graph, seed=2, empty=0.3))
    pruned = gator.prune(model, graph, architecture)
    gator.save_pruned(pruned, architecture, tmp_path / "half")
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == ["architecture.json", "weights.safetensors"]
    assert torch.equal(gator.load_pruned(tmp_path / "half", build=build)(inputs), pruned(inputs))


def test_a_network_of_whole_numbers_is_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    model, tokens = build(), torch.arange(6).view(2, 3)
    graph = gator.trace(model, tokens)
    architecture = gator.Architecture.from_keep(graph, {"0": [1, 4], "1": [0, 3, 5]})
    pruned = gator.prune(model, graph, architecture)
    gator.save_pruned(pruned, architecture, tmp_path)
    assert torch.equal(gator.load_pruned(tmp_path, build)(tokens), pruned(tokens))


def test_a_file_of_before_dtypes_were_stored_is_of_floating_point(tmp_path: Path) -> None:
    model, images = ZOO["chain"].build(), torch.zeros(2, 3, 8, 8)
    architecture = gator.Architecture.full(gator.trace(model, images))
    gator.save_pruned(model, architecture, tmp_path)
    data = architecture.to_json()
    del data["input_dtypes"]
    (tmp_path / "architecture.json").write_text(json.dumps(data))
    assert gator.Architecture.load(tmp_path / "architecture.json").input_dtypes == ("float32",)
    assert torch.equal(gator.load_pruned(tmp_path, ZOO["chain"].build)(images), model.eval()(images))


def test_network_that_asks_for_the_version_of_its_weights_is_loaded(tmp_path: Path) -> None:
    class Versioned(nn.Linear):
        """As torchvision's MNASNet, which has loaded its weights in another way since version 2."""

        _version = 2

        def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *rest: Any) -> None:
            assert metadata["version"] == 2
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), Versioned(4, 2))

    model = build()
    architecture = gator.Architecture.from_keep(gator.trace(model, torch.zeros(1, 3)), {"0": [1, 2]})
    pruned = gator.prune(model, gator.trace(model, torch.zeros(1, 3)), architecture)
    gator.save_pruned(pruned, architecture, tmp_path)
    assert torch.equal(gator.load_pruned(tmp_path, build)[1].weight, pruned[1].weight)


def test_saved_network_remembers_what_was_excluded(tmp_path: Path) -> None:
    build = ZOO["chain"].build
    graph = gator.trace(build(), torch.zeros(2, 3, 8, 8), exclude="0")
    architecture = gator.Architecture.from_keep(graph, {"3": [2, 5]})
    gator.save_pruned(gator.prune(build(), graph, architecture), architecture, tmp_path)
    assert gator.load_pruned(tmp_path, build=build)[3].weight.shape == (2, 4, 3, 3)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"\x00" * 40), "cannot be read"),
        (lambda folder: flip_last_bit(folder / "weights.safetensors"), "damaged"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "architecture.json").write_text('{"format": "gator.arch'), "not JSON"),
        (lambda folder: (folder / "architecture.json").unlink(), "no such file"),
        (lambda folder: (folder / "architecture.json").write_text("[]"), "not a gator.architecture file"),
    ],
    ids=[
        "weights damaged",
        "a bit flipped",
        "weights missing",
        "architecture truncated",
        "architecture missing",
        "another file",
    ],
)
def test_damaged_artifact_is_one_clear_error(damage, message: str, tmp_path: Path) -> None:
    model = ZOO["chain"].build()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    architecture = gator.Architecture.from_keep(graph, {"0": [1]})
    gator.save_pruned(gator.prune(model, graph, architecture), architecture, tmp_path)
    damage(tmp_path)
    with pytest.raises(gator.GatorError, match=message):
        gator.load_pruned(tmp_path, build=ZOO["chain"].build)


def test_another_network_names_both_fingerprints(tmp_path: Path) -> None:
    model = ZOO["chain"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8))
    gator.save_pruned(model, gator.Architecture.full(graph), tmp_path)
    other = gator.trace(ZOO["vgg"].build(), torch.zeros(2, 3, 8, 8))
    with pytest.raises(gator.ArtifactError, match=f"{graph.fingerprint}.*{other.fingerprint}"):
        gator.load_pruned(tmp_path, build=ZOO["vgg"].build)


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("built", [torch.float32, torch.float16], ids=str)
def test_the_loaded_network_has_the_saved_dtypes(saved: torch.dtype, built: torch.dtype, tmp_path: Path) -> None:
    model = randomised(ZOO["chain"].build()).to(saved)
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8, dtype=saved))
    architecture = gator.Architecture.from_keep(graph, {"0": [1, 2]})
    pruned = gator.prune(model, graph, architecture)
    gator.save_pruned(pruned, architecture, tmp_path)
    loaded = gator.load_pruned(tmp_path, build=lambda: ZOO["chain"].build().to(built))
    assert all(_same(one, other) for (_, one), (_, other) in zip(_tensors(loaded), _tensors(pruned), strict=True))


def test_weights_of_another_architecture_of_the_same_network_are_refused(tmp_path: Path) -> None:
    # Equal widths, so that every shape fits: only the digest tells them apart.
    model = ZOO["chain"].build()
    graph = gator.trace(model, torch.zeros(2, 3, 8, 8))
    one, other = (gator.Architecture.from_keep(graph, {"0": [channel]}) for channel in (1, 2))
    gator.save_pruned(gator.prune(model, graph, one), one, tmp_path)
    other.save(tmp_path / "architecture.json")
    with pytest.raises(gator.ArtifactError, match=f"belong to the architecture {one.digest}.*is {other.digest}"):
        gator.load_pruned(tmp_path, build=ZOO["chain"].build)


def test_architecture_file_says_what_it_belongs_to(tmp_path: Path) -> None:
    graph = gator.trace(ZOO["chain"].build(), torch.zeros(2, 3, 8, 8))
    gator.Architecture.from_keep(graph, {"0": [3, 1]}).save(tmp_path / "half.json")
    data = json.loads((tmp_path / "half.json").read_text())
    assert (data["format"], data["version"], data["model"]) == ("gator.architecture", 1, "Sequential")
    assert data["fingerprint"] == graph.fingerprint
    assert data["groups"]["0"] == {"num_channels": 4, "keep": [1, 3]}
    assert data["full_macs"] == 64 * 9 * (3 * 4 + 4 * 6) + 6 * 5 == gator.MacsCost(graph).full


def test_tied_parameters_are_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        net[4].weight = net[2].weight
        return net

    model, x = build(), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    graph = gator.trace(model, x)
    architecture = gator.Architecture.from_keep(graph, {graph.groups[0].name: [0, 2]})
    pruned = gator.prune(model, graph, architecture)
    gator.save_pruned(pruned, architecture, tmp_path)
    assert torch.equal(gator.load_pruned(tmp_path, build)(x), pruned(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_network_is_refused(value: float) -> None:
    model = ZOO["chain"].build()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        model[3].weight[2, 1, 0, 0] = value
    with pytest.raises(gator.PruneError, match=r"'3.weight' holds NaN or infinity"):
        gator.prune(model, graph, gator.Architecture.from_keep(graph, {"0": [1]}))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"0": []}, "group 0: no channel kept; it is not inside a removable block"),
        ({"0": [1, 4]}, "group 0: channels 1 to 4 given, expected 0 to 3"),
        ({"0": [-1]}, "group 0: channels -1 to -1 given, expected 0 to 3"),
        ({"3": [2, 5, 2]}, "group 3: channel 2 is given twice"),
        ({"stem": [1]}, "has no channel group 'stem'; did you mean 0, 3"),
    ],
    ids=["empty", "too large", "negative", "twice", "unknown group"],
)
def test_a_keep_set_that_fits_nothing_is_refused(keep: dict[str, list[int]], message: str) -> None:
    graph = gator.trace(ZOO["chain"].build(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(gator.ArchitectureError, match=re.escape(message)):
        gator.Architecture.from_keep(graph, keep)


def test_running_statistics_settings_survive() -> None:
    model = ZOO["chain"].build()
    model[1].eps, model[1].momentum = 1e-3, 0.03
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    pruned = gator.prune(model, graph, gator.Architecture.from_keep(graph, {"0": [1, 3]}))
    assert (pruned[1].eps, pruned[1].momentum) == (1e-3, 0.03)
    assert (model[1].num_features, pruned[1].num_features) == (4, 2)
