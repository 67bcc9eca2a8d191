"""One file that needs neither this project nor the network's class, checked before it gets its name."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

import gator
from orchestrator import export
from orchestrator.config.search import SearchConfig
from orchestrator.datasets import splits as datasets
from orchestrator.errors import OrchestratorError
from orchestrator.models import deployment
from orchestrator.models import networks as models_networks
from orchestrator.models import saved as models_saved
from orchestrator.models.cifar_resnet import CifarResNet
from orchestrator.models.deployment import Format, write_network
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.run_dir import read_trial_config
from orchestrator.training.evaluation import evaluate
from orchestrator.training.ranks import Ranks
from tests.gator.sweep import lively, random_half
from tests.orchestrator import planted

FORMATS: tuple[Format, ...] = ("onnx", "pt2")
TRIAL = "trial_0003"


def plain() -> nn.Module:
    """As VGG: no residual, flattened into linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(8 * 64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)),
    )


def torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: get_model(name, weights=None, num_classes=10, **kwargs)


SIZE = 32
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with the height and width of the images
    "cifar resnet": (lambda: CifarResNet(num_classes=10, blocks_per_stage=1, width=4), SIZE),
    "vgg": (plain, SIZE),
    "resnet": (torchvision("resnet18"), SIZE),
    "resnext": (torchvision("resnext50_32x4d"), SIZE),
    "mobilenet v2": (torchvision("mobilenet_v2"), SIZE),
    "mobilenet v3": (torchvision("mobilenet_v3_small"), SIZE),
    "mnasnet": (torchvision("mnasnet0_5"), SIZE),
    "efficientnet": (torchvision("efficientnet_b0"), SIZE),
    "densenet": (torchvision("densenet121"), SIZE),
    "regnet": (torchvision("regnet_y_400mf"), SIZE),
    "squeezenet": (torchvision("squeezenet1_1"), SIZE),
    "googlenet": (torchvision("googlenet", aux_logits=False, init_weights=False), SIZE),
    "inception": (torchvision("inception_v3", aux_logits=False, init_weights=False), 75),
    "shufflenet": (torchvision("shufflenet_v2_x0_5"), SIZE),
    "convnext": (torchvision("convnext_tiny"), SIZE),
    "vit": (torchvision("vit_b_32", image_size=64), 64),
    "swin": (torchvision("swin_t"), 64),
}


def pruned(build: Callable[[], nn.Module], size: int = SIZE) -> tuple[nn.Module, gator.Architecture]:
    """Return half of a network, some of its blocks gone."""
    torch.manual_seed(0)
    network = lively(build().eval())
    graph = gator.trace(network, torch.zeros(1, 3, size, size))
    architecture = gator.Architecture.from_keep(graph, random_half(graph, empty=0.3))
    return gator.prune(network, graph, architecture), architecture


def images(num: int = 4, size: int = SIZE) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run directory with one finished trial."""
    run = RunPaths(tmp_path / "planted")
    model = {"name": "resnet8_cifar", "num_classes": 10, "kwargs": {"width": 4}}
    config: SearchConfig = planted.search_config()
    base = config.base.model_copy(update={"model": config.base.model.model_validate(model)})
    write_atomic(run.config, config.model_copy(update={"base": base}).to_json())
    write_atomic(run.trial(TRIAL).config, base.to_json())
    gator.save_pruned(*pruned(lambda: models_networks.build(base.model)), run.trial(TRIAL).root)
    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def onnx_outputs(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_of_a_pruned_network_takes_any_batch(family: str, form: Format, tmp_path: Path):
    build, size = FAMILIES[family]
    network, _ = pruned(build, size)
    path = tmp_path / f"network.{form}"
    write_network(network, images(size=size), path, form)
    assert files(tmp_path) == {path.name}
    run = onnx_outputs if form == "onnx" else lambda path, x: torch.export.load(path).module()(x)
    for num in (1, 5):
        with torch.no_grad():
            found, expected = run(path, images(num, size)), network(images(num, size))
        # 1e-4 of the largest: float32, summed up in another order by ONNX Runtime
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMATS)
def test_a_trial_is_exported_into_its_folder(form: Format, run: RunPaths, capsys: pytest.CaptureFixture[str]):
    before = files(run.trial(TRIAL).root)
    assert export.main([str(run.root), "--trial", TRIAL, "--format", form]) == 0
    path = run.trial(TRIAL).root / f"network.{form}"
    assert capsys.readouterr().out == f"{path}\n"
    assert files(run.trial(TRIAL).root) == before | {path.name}


def test_a_file_that_was_timed_is_kept_and_a_damaged_one_is_written_again(run: RunPaths, tmp_path: Path):
    """The exporter's bytes differ now and then from one process to the next."""
    command = [str(run.root), "--trial", TRIAL, "--format", "onnx"]
    file, out = run.trial(TRIAL).exported("onnx"), tmp_path / "out.onnx"
    assert export.main(command) == 0
    whole = file.read_bytes()
    file.write_bytes(timed := whole + b"\x32\x05other")  # field 6, doc_string, of the model: read by nobody
    assert export.main(command) == 0
    assert export.main([*command, "--out", str(out)]) == 0
    assert out.read_bytes() == file.read_bytes() == timed
    file.write_bytes(whole[:-100])
    assert export.main(command) == 0
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_an_int8_file_is_written_with_the_accuracy_of_both(
    kind: str, run: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert export.main([str(run.root), "--trial", TRIAL, "--format", "onnx", "--int8", kind]) == 0
    file, folder = run.trial(TRIAL).root / "network_int8.onnx", run.trial(TRIAL).root
    _, path, told = capsys.readouterr().out.splitlines()
    assert path == str(file)
    manifest = json.loads((folder / "network_int8.json").read_text())
    config = read_trial_config(run.trial(TRIAL))
    network, test = models_saved.load_trial(run.root, TRIAL), datasets.load(config.data, config.seed).test
    found, quantised = manifest["float32_file"], manifest["int8_file"]
    expected = evaluate(network, test, config, Ranks())
    assert found["top1"] == pytest.approx(
        expected["top1"], abs=100 / len(test)
    )  # an image on the edge, summed up in another order
    assert f"on {len(test)} images of the test split: float32 top1 {found['top1']:.2f}" in told
    assert f"int8 top1 {quantised['top1']:.2f}" in told
    assert quantised["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (b"DynamicQuantizeLinear" if kind == "dynamic" else b"DequantizeLinear") in file.read_bytes()
    assert (manifest["int8"], manifest["accuracy_split"], bool(manifest["versions"]["onnxruntime"])) == (
        kind,
        "test",
        True,
    )
    assert files(folder) >= {"network.onnx", "network_int8.onnx", "network_int8.json"}


def test_int8_of_another_format_is_refused(run: RunPaths, capsys: pytest.CaptureFixture[str]):
    assert export.main([str(run.root), "--trial", TRIAL, "--format", "pt2", "--int8", "static"]) == 2
    assert "--int8 with --format pt2: expected --format onnx" in capsys.readouterr().err


def test_the_exported_program_needs_neither_the_project_nor_torchvision(run: RunPaths, tmp_path: Path):
    out = tmp_path / "there" / "half.pt2"
    assert export.main([str(run.root), "--trial", TRIAL, "--format", "pt2", "--out", str(out)]) == 0
    code = (
        "import sys; sys.modules.update(gator=None, orchestrator=None, torchvision=None); import torch;"
        f"x = torch.ones(7, 3, 32, 32); print(torch.export.load({str(out)!r}).module()(x).double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = models_saved.load_trial(run.root, TRIAL)(torch.ones(7, 3, 32, 32)).double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_with_other_outputs_is_not_left_behind(form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network, _ = pruned(plain)
    path = tmp_path / f"network.{form}"
    path.write_text("the old one")
    read = getattr(deployment, f"_read_{form}")
    monkeypatch.setattr(deployment, f"_read_{form}", lambda file: lambda x: read(file)(x) + 1)
    with pytest.raises(OrchestratorError, match="for 1 images, its outputs differ from the network's by"):
        write_network(network, images(), path, form)
    assert files(tmp_path) == {path.name}
    assert path.read_text() == "the old one"


@pytest.mark.parametrize("form", FORMATS)
def test_a_network_that_cannot_be_exported_is_one_message(form: Format, tmp_path: Path):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(OrchestratorError, match=rf"network.{form} is not written: the network cannot be exported"):
        write_network(Branching(), images(), tmp_path / f"network.{form}", form)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("form", FORMATS)
def test_a_batch_size_that_is_baked_in_is_refused(form: Format, tmp_path: Path):
    class Baked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(x.shape[0] if not torch.compiler.is_exporting() else 2, 1, 1, 1)

    with pytest.raises(OrchestratorError, match="is not written"):
        write_network(Baked(), images(), tmp_path / f"network.{form}", form)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--trial", "trial_0004", "--format", "pt2"], f"did you mean {TRIAL}"),
        (["--trial", TRIAL, "--format", "pt2", "--out", "network.onnx"], "expected a name that ends in .pt2"),
    ],
    ids=["trial", "suffix"],
)
def test_the_users_mistake_is_one_message_and_exit_2(
    run: RunPaths, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
):
    assert export.main([str(run.root), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("export: ")
    assert hint in printed.err


def test_a_damaged_trial_is_one_message_and_exit_2(run: RunPaths, capsys: pytest.CaptureFixture[str]):
    run.trial(TRIAL).architecture.write_text('{"format": "gator.arch')
    assert export.main([str(run.root), "--trial", TRIAL, "--format", "pt2"]) == 2
    assert "architecture.json: not JSON" in capsys.readouterr().err


def test_packages_that_are_missing_are_named(
    run: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_onnx"))
    assert export.main([str(run.root), "--trial", TRIAL, "--format", "onnx"]) == 2
    assert "--format onnx needs no_such_onnx; pip install no_such_onnx" in capsys.readouterr().err


def test_a_mistake_is_told_before_torch_is_loaded():
    code = (
        "import sys; from orchestrator import export;"
        "code = export.main(['runs/x', '--trial', 'a', '--format', 'pt2', '--out', 'x.onnx']);"
        "heavy = {'torch', 'ray', 'mlflow'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 2
