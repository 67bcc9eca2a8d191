"""What can be removed from a network, told on the command line."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gator
from orchestrator import describe


def doubled(num_classes: int, width: int = 4) -> nn.Module:
    """What a user's own module offers as package.module:function."""
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, num_classes, 1))


class Branching(nn.Module):
    """Cannot be exported: its forward branches on a value."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, with its sign depending on its sum."""
        return x if x.sum() > 0 else -x


def test_groups_reach_and_locks_of_a_torchvision_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["resnet18", "--no-verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet18: ResNet on inputs of (1, 3, 224, 224)"
    assert lines[1].startswith("groups: 12, ")
    assert "of 1,814,073,344 MACs an image" in lines[2]  # 1.81 G, as the literature has it
    assert any(line.startswith("layer4.1.conv1") and line.endswith("[removes layer4.1]") for line in lines)
    assert lines[-1].split() == ["fc", "1,000", "output", "of", "the", "model"]


def test_cifar_networks_are_described_for_cifar(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main(["resnet56_cifar"]) == 0
    out = capsys.readouterr().out
    assert "(1, 3, 32, 32)\ngroups: 30, " in out
    assert "of 125,747,840 MACs" in out


def test_image_size_classes_and_arguments_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:doubled"
    assert describe.main([name, "--image-size", "10", "--num-classes", "7", "--kwargs", "width=5"]) == 0
    out = capsys.readouterr().out
    assert "of 5,000 MACs" in out  # 100 positions, 3 x 5 + 5 x 7
    assert out.splitlines()[-1].split()[:2] == ["1", "7"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["resnet51"], "did you mean resnet50"),
        (["resnet21_cifar"], "expected a depth of 6 n + 2"),
        (["resnet20_cifar", "--kwargs", "widht=2"], "unexpected keyword argument 'widht'"),
        (["no_such_package:f"], "cannot be imported"),
        (
            ["vit_b_16", "--image-size", "100"],
            "vit_b_16 at an image size of 100: torch.export cannot trace VisionTransformer",
        ),
        ([f"{__name__}:Branching"], "must not branch on values"),
    ],
    ids=["typo", "depth", "kwarg", "module", "image-size", "no-export"],
)
def test_the_users_mistake_is_one_message_and_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    assert describe.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("describe: ")
    assert hint in printed.err
    assert printed.err.count("\n") == 1


class Broken(nn.Module):
    """A network of which one step is as its code says."""

    def __init__(self, code: Callable[["Broken", Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.code = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), code

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.head(self.code(self, self.stem(x)))


def broken(num_classes: int, kind: str) -> nn.Module:
    """Return a network that cannot be pruned, each of another kind."""
    codes: dict[str, Callable[[Broken, Tensor], Tensor]] = {
        "number": lambda net, x: net.body(x) * float(x.mean()),
        "dynamic": lambda net, x: net.body(x[x > 0].reshape(1, 4, 1, -1)),
        "numpy": lambda net, x: net.body(torch.from_numpy(x.detach().numpy())),
        "singular": lambda net, x: net.body(x).log().tanh(),
        "meta": lambda net, x: net.body(x),
    }
    net = Broken(codes[kind])
    return net.to("meta") if kind == "meta" else net


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("number", "must not branch on values"),
        ("dynamic", "size depends on values of tensors"),
        ("numpy", ".numpy() is not supported"),
        ("singular", "its outputs are not finite"),
        ("meta", "weight is on meta"),
    ],
)
def test_the_reason_why_a_network_cannot_be_pruned_is_one_line(
    kind: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe.main([f"{__name__}:broken", "--kwargs", f"kind={kind}", "--image-size", "8"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert reason in printed.err


def test_a_network_that_gator_prunes_wrongly_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        """Find what a defect of gator would leave."""
        raise gator.VerificationError("Sequential: when channels of group '0' are removed, the networks differ")

    name = f"{__name__}:doubled"
    monkeypatch.setattr("gator.checking.traced.verify_graph", fail)
    assert describe.main([name, "--image-size", "12"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "at an image size of 12: Sequential: when channels of group '0' are removed" in printed.err
    assert printed.err.count("\n") == 1
    assert describe.main([name, "--image-size", "12", "--no-verify"]) == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--image-size", "0"], "at least 1"),
        (["--num-classes", "many"], "--num-classes"),
        (["--kwargs", "width"], "expected KEY=VALUE"),
        (["--kwargs", "width=[1"], "is not valid YAML"),
    ],
    ids=["size", "classes", "no-value", "no-yaml"],
)
def test_arguments_that_cannot_be_read_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        describe.main(["resnet18", *arguments])
    assert exit_info.value.code == 2
    assert hint in capsys.readouterr().err


def test_as_a_command_without_ray_and_mlflow() -> None:
    code = (
        "import sys; from orchestrator.__main__ import main; code = main(['describe', 'resnet8_cifar']);"
        "heavy = {'ray', 'mlflow', 'optuna'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("resnet8_cifar: CifarResNet on inputs of (1, 3, 32, 32)")
