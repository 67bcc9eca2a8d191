"""Tiny networks, each with the groups it is expected to have. Test functions loop over ZOO."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.models import convnext, maxvit, resnet, swin_transformer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.vision_transformer import VisionTransformer

import gator


@dataclass(frozen=True)
class Case:
    """A network, and what tracing it must find."""

    build: Callable[[], nn.Module]
    groups: dict[str, int]
    """Name -> channels."""
    blocks: tuple[str, ...] = ()
    locked: dict[str, str] = field(default_factory=dict)
    """Name -> a part of the reason."""
    input_shape: tuple[int, ...] = (2, 3, 8, 8)

    @cached_property
    def graph(self) -> gator.ChannelGraph:
        """What tracing finds, traced once for all tests."""
        return gator.trace(self.build(), torch.zeros(self.input_shape))


def chain() -> nn.Module:
    """Conv-BN-ReLU twice, pooled to a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


def vgg() -> nn.Module:
    """Flattened without pooling to one position: each channel is 4 inputs of the linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(4 * 4, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 5)),
    )


def small_resnet(block: type[BasicBlock] | type[Bottleneck]) -> nn.Module:
    """torchvision's ResNet with two stages of two blocks... made by its own code, at an eighth of the width."""
    net = resnet.ResNet(block, [2, 1, 1, 1], num_classes=5)
    return _narrowed(net)


def _narrowed(net: nn.Module) -> nn.Module:
    """Return a ResNet with every convolution an eighth as wide, by tracing and cutting nothing: plain surgery on sizes."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            out_channels = module.out_channels // 8
            in_channels = module.in_channels if module.in_channels == 3 else module.in_channels // 8
            module.__init__(  # type: ignore[misc]
                in_channels,
                out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                bias=module.bias is not None,
            )
        elif isinstance(module, nn.BatchNorm2d):
            module.__init__(module.num_features // 8)  # type: ignore[misc]
        elif isinstance(module, nn.Linear):
            module.__init__(module.in_features // 8, module.out_features)  # type: ignore[misc]
    return net


class Dense(nn.Module):
    """A reader of a concatenation: cut in its segment only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate two convolutions of the input."""
        return self.head(torch.cat([self.one(x), self.two(x)], dim=1))


class Offset(nn.Module):
    """A closed channel is not zero any more once something is added to it, in a module of its own or not."""

    def __init__(self, offset: nn.Module | float) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Add in a module of its own, or in line."""
        x = self.stem(x)
        x = self.offset(x) if isinstance(self.offset, nn.Module) else x + self.offset
        return self.head(self.inner(x).relu())


class AddParameter(nn.Module):
    """Adds a parameter of its own to each of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(1.0, 5.0).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.bias


class Shared(nn.Module):
    """One convolution used twice: its input and its output are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shared convolution twice."""
        return self.head(self.twice(self.twice(self.stem(x))))


class Squeeze(nn.Module):
    """Squeeze-and-excitation: the product has the group of its operands, the sigmoid breaks no zero that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.down, self.up, self.head = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Scale channels by a function of their means."""
        x = self.norm(self.conv(x)).relu()
        return self.head(x * self.gate(self.up(self.down(self.pool(x)).relu())))


class Residual(nn.Module):
    """A branch in the network's own forward pass; a ReLU writes over the sum, whose first operand was a ReLU's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)
        self.inner, self.outer, self.norm = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add a branch, and read the shortcut once more afterwards."""
        x = self.relu(self.stem(x))
        y = x + self.norm(self.outer(self.relu(self.inner(x))))
        return self.head(torch.cat([self.relu(y), x], dim=1))


class Adds(nn.Module):
    """A block that returns its input when its branch is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.branch(x)


class Overwrites(nn.Module):
    """What follows a block writes over its output, while the block's input is still needed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.relu, self.head = (
            nn.Conv2d(3, 4, 1),
            Adds(),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Read the block's input once more."""
        x = self.stem(x)
        return self.head(self.relu(self.block(x)) * x)


class Unknown(nn.Module):
    """An op without a rule in the middle: what flows into it is locked, what comes after is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Sum up along the channels, which mixes them."""
        return self.head(self.inner(torch.logcumsumexp(self.stem(x), dim=1)))


def depthwise() -> nn.Module:
    """A depthwise convolution carries the group through."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 2, 1)
    )


def grouped() -> nn.Module:
    """A convolution of two groups: a channel is the same place in both, on either side."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 2, 1))


def whole_groups() -> nn.Module:
    """A convolution of four groups of two: a unit is a whole group, two channels read and three written."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, groups=4, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 1)),
    )


def transposed(groups: int) -> nn.Module:
    """A transposed convolution from 8 to 12 channels."""
    up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=groups)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), up, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 1))


def normalised(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Conv, norm, ReLU, twice."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), norm(12), nn.ReLU(), nn.Conv2d(12, 2, 1)),
    )


def one_dimension() -> nn.Module:
    """Convolution, normalisation and pooling of sequences, with a slope per channel."""
    return nn.Sequential(
        *(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.PReLU(4), nn.MaxPool1d(2)),
        *(nn.Conv1d(4, 6, 1, padding="same"), nn.PReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


def three_dimensions() -> nn.Module:
    """Convolution, normalisation and pooling of volumes, with a transposed convolution."""
    return nn.Sequential(
        *(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.AvgPool3d(2)),
        *(nn.ConvTranspose3d(4, 6, 2), nn.InstanceNorm3d(6, affine=True), nn.ReLU(), nn.Conv3d(6, 2, 1)),
    )


def pixels() -> nn.Module:
    """Positions to channels and back: four channels that make up one live and die together."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(16, 8, 1), nn.PixelShuffle(2)),
        *(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 1)),
    )


class Tied(nn.Module):
    """Two convolutions that share their weight, so that their inputs and their outputs are one group each."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(2))
        self.one, self.two, self.head = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        """Put both behind each other's readers."""
        one, two = self.one(self.stems[0](x).relu()), self.two(self.stems[1](x).relu())
        return self.head(one.relu()) + self.head(two.relu())


class Scaled(nn.Module):
    """A parameter that is broadcast: it has the channels of what it scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel."""
        return self.head(self.conv(x) * self.scale)


class Nested(nn.Module):
    """Concatenations of concatenations, one segment of which is the network's input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(7, 2, 1),
            nn.Conv2d(9, 5, 1),
            nn.Conv2d(14, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate as DenseNet does."""
        x = torch.cat([x, self.one(x).relu()], dim=1)
        x = torch.cat([self.two(x).relu(), x], dim=1)
        return self.head(torch.cat([x, self.three(x).relu()], dim=1))


class Shuffled(nn.Module):
    """A channel shuffle before a convolution of two groups: channels 0 to 5 are read as 0, 3, 1, 4, 2, 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle by view, transpose, view."""
        x = self.stem(x)
        n, c, h, w = x.shape
        return self.head(self.depth(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))


class Parts(nn.Module):
    """Parts of a tensor: three channels, then two that are used apart, then one that is picked alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.one, self.two, self.three = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Take parts by slice, narrow and select."""
        x = self.stem(x)
        return self.one(x[:, :3]) + self.two(x.narrow(1, 3, 2)) + self.three(x.select(1, 5).unsqueeze(1))


class Halves(nn.Module):
    """Computes where to cut its input apart from the input's own size, and gives the first half to one reader only."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.one, self.two = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Read both halves of a concatenation, each by its own convolution."""
        x = torch.cat([self.left(x), self.right(x)], dim=1)
        half = x.shape[1] // 2
        return self.one(x[:, :half]) + self.two(x[:, half:])


class ChannelNorm(nn.Module):
    """Layer normalisation of channels in the second dimension, by views, as in networks that do not permute images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.LayerNorm(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position over its channels."""
        x = self.stem(x)
        n, c, h, w = x.shape
        x = self.norm(x.view(n, c, h * w).transpose(1, 2))
        return self.head(x.relu().transpose(1, 2).reshape(n, c, h, w))


def small_vit() -> nn.Module:
    """torchvision's vision transformer: position embedding, class token, attention with two heads of four features."""
    return VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5)


def small_swin(version: int) -> nn.Module:
    """torchvision's Swin: windows, shifted ones with a mask, a bias for each head and relative position, merged patches.

    The second version computes the bias once for all samples, normalises queries and keys, and each branch after its end.
    """
    block = [swin_transformer.SwinTransformerBlock, swin_transformer.SwinTransformerBlockV2][version - 1]
    merging = [swin_transformer.PatchMerging, swin_transformer.PatchMergingV2][version - 1]
    return swin_transformer.SwinTransformer(
        *([2, 2], 8, [2, 1], [2, 4], [2, 2]),
        mlp_ratio=1.5,
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=block,
        downsample_layer=merging,
    )


def small_maxvit() -> nn.Module:
    """torchvision's MaxViT: inverted bottlenecks, attention in windows and on a grid."""
    return maxvit.MaxVit((16, 16), 8, 2, [8], [1], 4, 0.0, num_classes=5)


def small_convnext() -> nn.Module:
    """torchvision's ConvNeXt: depthwise convolutions, layer normalisation of images, a scale for each channel of a branch."""
    return convnext.ConvNeXt(
        [convnext.CNBlockConfig(8, 12, 1), convnext.CNBlockConfig(12, None, 1)], layer_scale=0.5, num_classes=5
    )


_BASIC = {"conv1": 8, "layer1.0.conv1": 8, "layer1.1.conv1": 8, "layer2.0.conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv1": 32,
          "layer3.0.conv2": 32, "layer4.0.conv1": 64, "layer4.0.conv2": 64}  # fmt: skip
_BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0")
_OUTPUT = {"fc": "output of the model"}

_SWIN_HEADS = {"1.0": 2, "1.1": 2, "3.0": 4}
_SWIN_WIDTHS = {"features.0.0": 8, "features.2.reduction": 16}
_SWIN_WIDTHS |= {"features.1.0.mlp.0": 12, "features.1.1.mlp.0": 12, "features.3.0.mlp.0": 24}

_MAXVIT = "blocks.0.layers.0.layers"
_MBCONV_WIDTHS = {"proj.1": 8, "layers.conv_a.0": 32, "layers.squeeze_excitation.fc1": 2}

ZOO = {
    "chain": Case(chain, {"0": 4, "3": 6}, locked={"8": "output of the model"}),
    "vgg": Case(vgg, {"0": 4, "5": 7}, locked={"8": "output of the model"}),
    "basic": Case(lambda: small_resnet(BasicBlock), _BASIC, _BLOCKS, _OUTPUT, (2, 3, 32, 32)),
    "bottleneck": Case(
        lambda: small_resnet(Bottleneck),
        {
            "conv1": 8,
            "layer1.0.conv1": 8,
            "layer1.0.conv2": 8,
            "layer1.0.conv3": 32,
            "layer1.1.conv1": 8,
            "layer1.1.conv2": 8,
        }
        | {f"layer{s}.0.conv{c}": 2**s * (16 if c == 3 else 4) for s in (2, 3, 4) for c in (1, 2, 3)},
        _BLOCKS,
        _OUTPUT,
        (2, 3, 32, 32),
    ),
    "dense": Case(Dense, {"one": 4, "two": 2}, locked={"head": "output of the model"}),
    "shared": Case(Shared, {"stem": 4}, locked={"head": "output of the model"}),
    "squeeze": Case(Squeeze, {"conv": 6, "down": 2}, locked={"head": "output of the model"}),
    "residual": Case(Residual, {"stem": 4, "inner": 6}, ("",), {"head": "output of the model"}),
    "overwrites": Case(Overwrites, {"stem": 4, "block.branch.0": 6}, ("block",), {"head": "output of the model"}),
    "depthwise": Case(depthwise, {"0": 6}, locked={"4": "output of the model"}),
    "grouped": Case(grouped, {"0": 4, "1": 6}, locked={"3": "output of the model"}),
    "whole groups": Case(whole_groups, {"0": 4}, locked={"6": "output of the model"}),
    "transposed": Case(lambda: transposed(1), {"0": 8, "2": 12}, locked={"5": "output of the model"}),
    "transposed, two groups": Case(lambda: transposed(2), {"0": 4, "2": 6}, locked={"5": "output of the model"}),
    "transposed, whole groups": Case(lambda: transposed(4), {"0": 4}, locked={"5": "output of the model"}),
    "group norm": Case(
        lambda: normalised(lambda width: nn.GroupNorm(4, width)), {"0": 4, "3": 4}, locked={"6": "output of the model"}
    ),
    "instance norm": Case(
        lambda: normalised(lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True)),
        {"0": 8, "3": 12},
        locked={"6": "output of the model"},
    ),
    "1d": Case(one_dimension, {"0": 4, "4": 6}, locked={"8": "output of the model"}, input_shape=(2, 3, 8)),
    "3d": Case(three_dimensions, {"0": 4, "4": 6}, locked={"7": "output of the model"}, input_shape=(2, 3, 6, 6, 6)),
    "pixels": Case(pixels, {"0": 4, "3": 2}, locked={"7": "output of the model"}),
    "tied": Case(Tied, {"stems.0": 4, "one": 6}, locked={"head": "output of the model"}),
    "scaled": Case(Scaled, {"conv": 4}, locked={"head": "output of the model"}),
    "nested": Case(Nested, {"one": 4, "two": 2, "three": 5}, locked={"head": "output of the model"}),
    "adds a parameter": Case(
        lambda: Offset(AddParameter()), {"stem": 4, "inner": 6}, locked={"head": "output of the model"}
    ),
    "adds a number": Case(lambda: Offset(1.0), {"stem": 4, "inner": 6}, locked={"head": "output of the model"}),
    "clamps above zero": Case(
        lambda: Offset(nn.Hardtanh(0.5, 6.0)), {"stem": 4, "inner": 6}, locked={"head": "output of the model"}
    ),
    "halves": Case(Halves, {"left": 4, "right": 4}, locked={"one": "output of the model"}),
    "layer norm": Case(ChannelNorm, {"stem": 6}, locked={"head": "output of the model"}),
    "shuffle": Case(Shuffled, {"stem": 6}, locked={"head": "output of the model"}),
    "parts": Case(
        Parts,
        {"stem": 3, "stem#2": 2},
        locked={"stem#3": "takes this channel by its number", "one": "output of the model"},
    ),
    "shufflenet": Case(
        lambda: ShuffleNetV2([2, 1, 1], [8, 8, 16, 24, 24], num_classes=5),
        {"conv1.0": 8, "conv5.0": 24}
        # stage2.1 passes the first half of the shuffled channels on and computes on the other: two of each branch of stage2.0
        | {f"stage2.0.branch{b}{part}": 2 for b in ("1.2", "2.5") for part in ("", "#2")}
        | {"stage2.0.branch2.0": 4, "stage2.1.branch2.0": 4, "stage2.1.branch2.5": 4}
        | {f"stage{s}.0.branch{b}": 4 * s - 4 for s in (3, 4) for b in ("1.2", "2.0", "2.5")},
        locked=_OUTPUT,
        input_shape=(2, 3, 32, 32),
    ),
    "vit": Case(
        small_vit,
        {"conv_proj": 8}
        | {f"encoder.layers.encoder_layer_{n}.self_attention": 2 for n in (0, 1)}
        | {f"encoder.layers.encoder_layer_{n}.mlp.0": 12 for n in (0, 1)},
        tuple(
            f"encoder.layers.encoder_layer_{n}:encoder.layers.encoder_layer_{n}.ln_{k}" for n in (0, 1) for k in (1, 2)
        ),
        {"heads.head": "output of the model"},
    ),
    "swin": Case(
        lambda: small_swin(1),
        _SWIN_WIDTHS | {f"features.{block}.attn.qkv": heads for block, heads in _SWIN_HEADS.items()},
        tuple(f"features.{b}:features.{b}.norm{k}" for b in _SWIN_HEADS for k in (1, 2)),
        {"head": "output of the model"},
        (2, 3, 16, 16),
    ),
    "swin, second version": Case(
        lambda: small_swin(2),
        _SWIN_WIDTHS | {f"features.{block}.attn.cpb_mlp.2": heads for block, heads in _SWIN_HEADS.items()},
        tuple(f"features.{b}:features.{b}.{first}" for b in _SWIN_HEADS for first in ("attn.cpb_mlp.0", "mlp.0")),
        {"head": "output of the model"}
        | {f"features.{block}.attn.cpb_mlp.0": "in a value that samples share" for block in _SWIN_HEADS},
        (2, 3, 16, 16),
    ),
    "maxvit": Case(
        small_maxvit,
        {"stem.0.0": 8, "stem.1.0": 8, "classifier.3": 8}
        | {f"{_MAXVIT}.MBconv.{layer}": width for layer, width in _MBCONV_WIDTHS.items()}
        | {f"{_MAXVIT}.{kind}_attention.attn_layer.1.to_qkv": 2 for kind in ("window", "grid")}
        | {f"{_MAXVIT}.{kind}_attention.mlp_layer.1": 32 for kind in ("window", "grid")},
        (
            f"{_MAXVIT}.MBconv",
            *(
                f"{_MAXVIT}.{kind}_attention:{_MAXVIT}.{kind}_attention.{branch}_layer.0"
                for kind in ("window", "grid")
                for branch in ("attn", "mlp")
            ),
        ),
        {"classifier.5": "output of the model"},
        (2, 3, 16, 16),
    ),
    "convnext": Case(
        small_convnext,
        {"features.0.0": 8, "features.1.0.block.3": 32, "features.2.1": 12, "features.3.0.block.3": 48},
        ("features.1.0", "features.3.0"),
        {"classifier.2": "output of the model"},
        (2, 3, 16, 16),
    ),
    "unknown": Case(
        Unknown,
        {"inner": 6},
        locked={"stem": "aten.logcumsumexp at '' has no channel rule", "head": "output of the model"},
    ),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in float64 and eval mode, with weights and statistics that leave no channel at zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            low, high = parameter.aminmax()
            if low == high:  # such as a head that begins at zero, or a scale that hides a branch
                parameter.uniform_(0.1, 1.5, generator=generator)
        for module in model.modules():
            if isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
                ranges = {
                    "weight": (0.5, 1.5),
                    "bias": (-0.3, 0.3),
                    "running_mean": (-0.2, 0.2),
                    "running_var": (0.5, 1.5),
                }
                for name, (low, high) in ranges.items():
                    if isinstance(tensor := getattr(module, name, None), Tensor):
                        tensor.uniform_(low, high, generator=generator)
    return model
