"""What a caller or a file gets wrong is one GatorError that names it; nothing is half done."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gator
from tests.gator.zoo import ZOO

BUILD = ZOO["chain"].build
IMAGES = torch.zeros(2, 3, 8, 8)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum().item())]


class Leaving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 3, 8, 8)


class InParts(nn.Module):
    """Takes its batch in parts of a size that it states."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.relu() for part in self.stem(x).split(4096)])


class Positions(nn.Module):
    """Adds what it makes of the number of samples, given as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(1, 4, 1)

    def forward(self, shape: torch.Size) -> Tensor:
        return self.project(torch.ones(shape[0], 1, *shape[2:]))


class Placed(nn.Module):
    """A network whose channels depend on such a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positions, self.head = nn.Conv2d(3, 4, 1), Positions(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.positions(x.shape))


@pytest.mark.parametrize("model", [FixedBatch(), InParts()], ids=["a size", "parts"])
def test_a_network_for_one_batch_size_is_refused(model: nn.Module) -> None:
    with pytest.raises(gator.TraceError, match="must take any number of samples"):
        gator.trace(model, IMAGES)


def test_a_forward_that_is_given_the_batch_as_a_number_keeps_its_channels() -> None:
    graph = gator.trace(Placed(), IMAGES)
    assert graph.groups == ()
    assert {group.reason for group in graph.locked if group.name == "stem"} == {
        "'positions' states a size and cannot be regenerated: it is given the number of samples as a number, not with a tensor"
    }


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Branching(), r"return x if x.sum\(\) > 0 else -x"),
        (Counting(), r"return x\[: int\(x.sum\(\).item\(\)\)\]"),
        (Leaving(), r"return torch.from_numpy\(x.numpy\(\)\)"),
    ],
    ids=["branches on values", "slices by a value", "leaves torch"],
)
def test_the_line_that_cannot_be_traced_is_named(model: nn.Module, line: str) -> None:
    with pytest.raises(gator.TraceError, match=rf"cannot trace {type(model).__name__}.*test_bad_input\.py:\d+: {line}"):
        gator.trace(model, torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((1, 3, 8, 8), "an example input is of type int; expected a tensor"),
        (None, "an example input is of type NoneType"),
        ({"x": IMAGES}, "an example input is of type dict"),
        (IMAGES.numpy(), "an example input is of type ndarray"),
        ([], "no example inputs"),
        (torch.zeros(0, 3, 8, 8), r"shape \(0, 3, 8, 8\); expected a batch of one"),
        (torch.zeros(()), r"shape \(\); expected a batch of one"),
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\): .* expected input\[1, N, 8, 8\]"),
        (torch.zeros(2, 3, 9, 9), r"shape \(2, 3, 9, 9\): a and b must have same reduction dim"),
        ((IMAGES, IMAGES), "too many positional arguments"),
        (IMAGES.double(), "Input type .* should be the same"),
        (IMAGES.to("meta"), "on the same device"),
    ],
    ids=["shape", "None", "dict", "array", "none", "no image", "scalar", "no batch", "size", "two", "dtype", "device"],
)
def test_what_the_network_does_not_take_is_refused(inputs: Any, message: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    with pytest.raises(gator.TraceError, match=message):
        gator.trace(network, inputs)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(gator.TraceError, match="got a function as the model"):
        gator.trace(lambda x: x, IMAGES)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([1.0, 2.0], "'float' object cannot be interpreted as an integer"),
        ("12", "'str' object cannot be interpreted as an integer"),
        (2, "'int' object is not iterable"),
        ([True, False, True, True], "booleans; mask.nonzero"),
        (torch.tensor([False, True, False, False]), "booleans; mask.nonzero"),
    ],
    ids=["floats", "text", "a number", "booleans", "mask"],
)
def test_kept_channels_that_are_no_integers_are_refused(keep: Any, message: str) -> None:
    graph = gator.trace(BUILD(), IMAGES)
    with pytest.raises(gator.ArchitectureError, match=f"group 0: expected the kept channels as integers: {message}"):
        gator.Architecture.from_keep(graph, {"0": keep})


def test_a_locked_group_is_named_with_its_reason() -> None:
    graph = gator.trace(BUILD(), IMAGES)
    with pytest.raises(
        gator.ArchitectureError, match="group '8' of Sequential is locked: output of the model; leave it out"
    ):
        gator.Architecture.from_keep(graph, {"8": [0]})


@pytest.mark.parametrize("tensor", ["3.weight", "1.running_mean"])
def test_a_network_that_is_not_finite_is_refused_and_left_alone(tensor: str) -> None:
    model = BUILD()
    graph = gator.trace(model, IMAGES)
    model.state_dict()[tensor][1] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gator.PruneError, match=f"'{tensor}' holds NaN or infinity"):
        gator.prune(model, graph, gator.Architecture.from_keep(graph, {"0": [1]}))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(one.nan_to_num(7), before[name].nan_to_num(7)) for name, one in model.state_dict().items())


def _prepared(net: nn.Module) -> nn.Module:
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return torch.ao.quantization.prepare_qat(net.train())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda net: torch.ao.quantization.quantize_dynamic(net, {nn.Linear}),
            "'8' is a Linear of torch.ao.nn.quantized.*",
        ),
        (_prepared, "is a .* of torch.ao.*, made or prepared for quantisation; expected a network in floating point"),
        (torch.jit.script, "'' is a TorchScript module"),
        (lambda net: net.append(nn.LazyLinear(2)), "'9.weight' has no shape yet; run the network once"),
    ],
    ids=["quantised", "prepared", "script", "lazy"],
)
def test_a_network_of_other_layers_is_refused(change: Callable[[nn.Module], nn.Module], message: str) -> None:
    with pytest.raises(gator.TraceError, match=message):
        gator.trace(change(BUILD()), IMAGES)


def test_gates_on_another_network_are_refused() -> None:
    graph = gator.trace(BUILD(), IMAGES)
    with pytest.raises(gator.GateError, match=r"traced on another network: parameter '.*' has shape"):
        gator.GatedModel(ZOO["vgg"].build(), graph)


# --- files --------------------------------------------------------------------------------------------------------------

Json = dict[str, Any]


def set_to(value: Any, *keys: str) -> Callable[[Json], None]:
    """Return what puts a value at a place of the JSON."""

    def change(data: Json) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(2, "version"), "version 2, this gator reads version 1; update gator"),
        (set_to("gator.graph", "format"), "not a gator.architecture file"),
        (lambda data: data.pop("fingerprint"), "damaged: 'fingerprint' is missing"),
        (set_to(None, "fingerprint"), "damaged: expected str, found 'None'"),
        (
            set_to("0" * 16, "fingerprint"),
            "fingerprint 0000000000000000, the graph is of a Sequential with fingerprint",
        ),
        (set_to([], "groups"), "damaged: expected dict"),
        (set_to(3, "groups", "0"), "damaged: expected dict"),
        (set_to([True], "groups", "0", "keep"), "damaged: expected int, found 'True'"),
        (set_to("01", "groups", "0", "keep"), "damaged: expected list, found '01'"),
        (set_to([4], "groups", "0", "keep"), "damaged: kept channels must be integers in"),
        (set_to([2, 1], "groups", "0", "keep"), "damaged: kept channels must be ascending"),
        (set_to({"num_channels": 0, "keep": []}, "groups", "0"), "damaged: num_channels must be at least 1"),
        (set_to([], "groups", "0", "keep"), "group 0: no channel kept"),
        (set_to(3, "groups", "0", "num_channels"), "its num_channels is not what"),
        (lambda data: data["groups"].pop("3"), "its num_channels is not what"),
        (set_to({"num_channels": 1, "keep": [0]}, "groups", "7"), "no channel group '7'"),
        (set_to(["layer1"], "removed_blocks"), "its removed_blocks is not what"),
        (set_to([[1, 3.5, 8, 8]], "input_shapes"), "damaged: expected int, found '3.5'"),
        (
            set_to(["int63"], "input_dtypes"),
            "damaged: input_dtypes are ..int63..; expected the name of a dtype of torch",
        ),
        (set_to(["int64", "int64"], "input_dtypes"), "expected the name of a dtype of torch for each of 1 inputs"),
        (set_to("0", "include"), "damaged: expected list, found '0'"),
        (set_to(float("inf"), "full_macs"), "damaged: expected int, found 'inf'"),
    ],
    ids=lambda value: None if callable(value) else value[:30],
)
def test_a_changed_architecture_is_refused(change: Callable[[Json], Any], message: str, tmp_path: Path) -> None:
    model = BUILD()
    graph = gator.trace(model, IMAGES)
    data = gator.Architecture.from_keep(graph, {"0": [1, 2]}).to_json()
    change(data)
    (tmp_path / "architecture.json").write_text(json.dumps(data))
    with pytest.raises(gator.ArchitectureError, match=message):
        gator.prune(model, graph, gator.Architecture.load(tmp_path / "architecture.json"))
    assert model[0].out_channels == 4


@pytest.mark.parametrize("content", [b"", b'{"format": "gator.arch', b"\xff\xfe\x00" * 9, b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_bytes(content)
    with pytest.raises(gator.ArchitectureError, match=r"architecture\.json: not JSON"):
        gator.Architecture.load(path)


def test_a_folder_is_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(gator.ArchitectureError, match=r"cannot be read .Is a directory."):
        gator.Architecture.load(tmp_path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (BUILD(), "build is a Sequential; expected a function"),
        (lambda: None, "returns a NoneType"),
        (lambda: BUILD().to("meta"), "on the meta device"),
        (
            lambda: nn.Conv2d(5, 4, 1),
            "returns another network than the one that was pruned: torch.export cannot trace Conv2d",
        ),
        (ZOO["vgg"].build, "returns another network than the one that was pruned: the architecture belongs to"),
    ],
    ids=["a network", "nothing", "meta", "other inputs", "other groups"],
)
def test_a_factory_of_another_network_is_refused(build: Any, message: str, tmp_path: Path) -> None:
    model = BUILD()
    architecture = gator.Architecture.full(gator.trace(model, IMAGES))
    gator.save_pruned(model, architecture, tmp_path)
    with pytest.raises(gator.ArtifactError, match=message):
        gator.load_pruned(tmp_path, build)
