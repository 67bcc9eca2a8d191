"""The networks that people bring: one of each module family of timm, those of torchvision, ultralytics and transformers, some written here.

Chosen before any was tried, the smallest of each family. Names are SOURCE/NAME; each source is imported when one of its networks is built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, segmentation, video

from tests.gator.sweep import NAMES as CLASSIFIERS
from tests.gator.sweep import small_size

NUM_CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A network and the shapes of one sample of its inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    num_tokens: int = 0
    """Inputs are numbers of tokens below this one; 0: they are noise."""
    without: str = ""
    """Which part of the model is left out, and why."""

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(0)
        if self.num_tokens:
            return tuple(torch.randint(self.num_tokens, (batch, *s), generator=generator) for s in self.shapes)
        return tuple(torch.randn(batch, *s, dtype=torch.float64, generator=generator) for s in self.shapes)


@dataclass(frozen=True)
class Timm:
    """The network of one family of timm."""

    name: str
    size: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


def sized(name: str, size: int = 64, **settings: Any) -> Timm:
    """Return a network that is built for its image size."""
    return Timm(name, size, {"img_size": size, **settings})


_TINY = {"embed_dim": 64, "num_heads": 4, "depth": 2}

TIMM: dict[str, Timm] = {
    "beit": sized("beit_base_patch16_224", **_TINY),
    "byoanet": Timm("botnet26t_256", 256),
    "byobnet": Timm("repvgg_a0"),
    "cait": sized("cait_xxs24_224", depth=2),
    "coat": sized("coat_tiny"),
    "convit": sized("convit_tiny", depth=4, local_up_to_layer=2),
    "convmixer": Timm("convmixer_768_32"),
    "convnext": Timm("convnext_atto"),
    "cpubone": Timm("cpubone_nano"),
    "crossvit": Timm("crossvit_9_240", 240),
    "csatv2": Timm("csatv2", 512),
    "cspnet": Timm("cs3darknet_s"),
    "cspnext": Timm("cspnext_tiny"),
    "davit": Timm("davit_tiny"),
    "deepseek_vit": sized("deepseek_vit_412m", 56, **_TINY),
    "deit": sized("deit3_small_patch16_224", depth=2),
    "densenet": Timm("densenet121"),
    "dla": Timm("dla46_c"),
    "dpn": Timm("dpn48b"),
    "edgenext": Timm("edgenext_xx_small"),
    "efficientformer": Timm("efficientformer_l1", 224),
    "efficientformer_v2": Timm("efficientformerv2_s0", 224),
    "efficientnet": Timm("mixnet_s"),
    "efficientvim": Timm("efficientvim_m1", 128),
    "efficientvit_mit": Timm("efficientvit_b0"),
    "efficientvit_msra": sized("efficientvit_m0", 224),
    "eva": sized("eva02_tiny_patch14_224", 56, depth=2),
    "fasternet": Timm("fasternet_t0"),
    "fastvit": Timm("fastvit_t8"),
    "focalnet": Timm("focalnet_tiny_srf"),
    "gcvit": sized("gcvit_xxtiny", 224),
    "gemma4_vit": sized("gemma4_vit_167m", **_TINY),
    "ghostnet": Timm("ghostnet_050"),
    "hardcorenas": Timm("hardcorenas_a"),
    "hgnet": Timm("hgnetv2_b0"),
    "hiera": sized("hiera_tiny_224", 224),
    "hieradet_sam2": Timm("sam2_hiera_tiny", 224),
    "hrnet": Timm("hrnet_w18_small"),
    "iformer": Timm("iformer_t", 224),
    "inception_next": Timm("inception_next_atto"),
    "inception_resnet_v2": Timm("inception_resnet_v2", 96),
    "inception_v3": Timm("inception_v3", 96),
    "inception_v4": Timm("inception_v4", 96),
    "lcnetv2": Timm("lcnetv2_small"),
    "levit": sized("levit_128s", 224),
    "lowformer": Timm("lowformer_b0"),
    "mambaout": Timm("mambaout_femto"),
    "maxxvit": sized("test_maxvit", 128),
    "metaformer": Timm("poolformer_s12"),
    "mlp_mixer": sized("gmlp_s16_224"),
    "mobilenetv3": Timm("mobilenetv3_small_050"),
    "mobilenetv5": Timm("mobilenetv5_base", 128),
    "mobilevit": Timm("mobilevit_xxs"),
    "mvitv2": sized("mvitv2_tiny"),
    "naflexvit": Timm("naflexvit_base_patch16_gap", settings=_TINY),
    "nasnet": Timm("nasnetalarge", 96),
    "nest": sized("nest_tiny", 224),
    "nextvit": Timm("nextvit_small"),
    "nfnet": Timm("nfnet_l0"),
    "pit": Timm("pit_ti_224", 224),
    "pnasnet": Timm("pnasnet5large", 96),
    "pvt_v2": Timm("pvt_v2_b0"),
    "qwen3_vit": sized("qwen3_vit_88m", **_TINY),
    "rdnet": Timm("rdnet_tiny"),
    "regnet": Timm("regnety_002"),
    "repghost": Timm("repghostnet_050"),
    "repvit": Timm("repvit_m0_9"),
    "res2net": Timm("res2net50_14w_8s"),
    "resnest": Timm("resnest14d"),
    "resnet": Timm("resnet10t"),
    "resnetv2": Timm("resnetv2_18"),
    "rexnet": Timm("rexnetr_100"),
    "selecsls": Timm("selecsls42"),
    "senet": Timm("legacy_seresnet18"),
    "sequencer": sized("sequencer2d_s"),
    "shvit": Timm("shvit_s1", 224),
    "sknet": Timm("skresnet18"),
    "starnet": Timm("starnet_s050"),
    "swiftformer": Timm("swiftformer_xs"),
    "swin_transformer": sized("swin_tiny_patch4_window7_224", window_size=4),
    "swin_transformer_v2": sized("swinv2_tiny_window8_256", window_size=4),
    "swin_transformer_v2_cr": sized("swinv2_cr_tiny_224", window_size=4),
    "tiny_vit": Timm("tiny_vit_5m_224", 224),
    "tnt": sized("tnt_s_patch16_224", depth=2),
    "tresnet": Timm("tresnet_m"),
    "twins": sized("twins_pcpvt_small"),
    "vgg": Timm("vgg11_bn"),
    "visformer": sized("visformer_tiny", 224),
    "vision_transformer": sized("vit_tiny_patch16_224"),
    "vision_transformer_hybrid": sized("vit_tiny_r_s16_p8_224"),
    "vision_transformer_relpos": sized("vit_relpos_small_patch16_224", depth=2),
    "vision_transformer_sam": sized("samvit_base_patch16", 224, **_TINY, global_attn_indexes=(1,)),
    "vitamin": sized("vitamin_small_224"),
    "volo": sized("volo_d1_224", 224),
    "vovnet": Timm("ese_vovnet19b_slim"),
    "xception": Timm("legacy_xception"),
    "xception_aligned": Timm("xception41"),
    "xcit": sized("xcit_nano_12_p16_224", depth=2),
}
"""Module of timm.models -> its network."""

SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTORS = {
    "fasterrcnn_resnet50_fpn": 64,
    "maskrcnn_resnet50_fpn": 64,
    "keypointrcnn_resnet50_fpn": 64,
    "retinanet_resnet50_fpn": 64,
    "fcos_resnet50_fpn": 64,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}
YOLO = ("yolov8n", "yolov8n-seg", "yolo11n", "yolo11n-seg")


def _timm(choice: Timm) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(choice.name, pretrained=False, num_classes=NUM_CLASSES, **choice.settings)
    return model


def _classifier(name: str) -> nn.Module:
    settings = {"image_size": small_size(name)} if name.startswith("vit") else {}
    model: nn.Module = models.get_model(name, weights=None, **settings)
    return model


class Detector(nn.Module):
    """The backbone of one of torchvision's detectors with its pyramid, and the heads that take feature maps alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        detector = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _yolo(name: str) -> nn.Module:
    from ultralytics.nn import tasks

    kind = tasks.SegmentationModel if name.endswith("seg") else tasks.DetectionModel
    model: nn.Module = kind(f"{name}.yaml", verbose=False)
    return model


_HF_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_HF_IMAGES = {"image_size": 32, "patch_size": 8, "num_labels": NUM_CLASSES}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", _HF_SMALL | _HF_IMAGES),
    "deit": ("DeiTForImageClassification", _HF_SMALL | _HF_IMAGES),
    "swin": (
        "SwinForImageClassification",
        _HF_IMAGES | {"patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "num_labels": NUM_CLASSES},
    ),
    "bert": ("BertForSequenceClassification", _HF_SMALL | {"vocab_size": 50, "num_labels": NUM_CLASSES}),
    "bert-mlm": ("BertForMaskedLM", _HF_SMALL | {"vocab_size": 50}),
}


def _transformers(name: str) -> nn.Module:
    import transformers

    kind, settings = TRANSFORMERS[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**settings)
    model: nn.Module = model_class(config)
    return model


# --- written here -----------------------------------------------------------------------------------------------------------


def _norm_relu(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class UNet(nn.Module):
    """Two levels down and up, by transposed convolutions, each with its skip."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 24)
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in (12, 8))
        self.merge = nn.ModuleList([self._double(16 + 12, 16), self._double(8 + 8, 8)])
        self.head = nn.Conv2d(8, NUM_CLASSES, 1)

    @staticmethod
    def _double(read: int, width: int) -> nn.Sequential:
        convs = [(nn.Conv2d(a, width, 3, padding=1, bias=False), *_norm_relu(width)) for a in (read, width)]
        return nn.Sequential(*convs[0], *convs[1])

    def forward(self, x: Tensor) -> Tensor:
        one = self.down[0](x)
        two = self.down[1](nn.functional.max_pool2d(one, 2))
        x = self.down[2](nn.functional.max_pool2d(two, 2))
        x = self.merge[0](torch.cat([self._rise(0, x), two], 1))
        result: Tensor = self.head(self.merge[1](torch.cat([self._rise(1, x), one], 1)))
        return result

    def _rise(self, level: int, x: Tensor) -> Tensor:
        risen: Tensor = self.up[level](x)
        return risen


class Conformer(nn.Module):
    """A Conformer block on a spectrogram: half a feed-forward, attention, gated convolution over time, half a feed-forward."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.first, self.last = self._feed_forward(width), self._feed_forward(width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.conv_norm = nn.LayerNorm(width)
        self.widen = nn.Conv1d(width, 2 * width, 1)
        self.over_time = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2, groups=width),
            nn.BatchNorm1d(width),
            nn.SiLU(),
            nn.Conv1d(width, width, 1),
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NUM_CLASSES))

    @staticmethod
    def _feed_forward(width: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = nn.functional.glu(self.widen(self.conv_norm(x).transpose(1, 2)), 1)
        x = x + self.over_time(y).transpose(1, 2)
        x = x + 0.5 * self.last(x)
        result: Tensor = self.head(x).log_softmax(-1)
        return result


class AudioResNet(nn.Module):
    """A residual network on a waveform."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=4, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(4)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv1d(16, 24, 3, padding=1, bias=False), nn.BatchNorm1d(24), nn.ReLU()),
                *(nn.Conv1d(24, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16)),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        result: Tensor = self.head(x.mean(-1))
        return result


def _all() -> dict[str, Network]:
    images = {
        f"timm/{module}": Network(partial(_timm, one), ((3, one.size, one.size),)) for module, one in TIMM.items()
    }
    for name in CLASSIFIERS:
        size = small_size(name)
        images[f"torchvision/{name}"] = Network(partial(_classifier, name), ((3, size, size),))
    for name in SEGMENTATION:
        build = partial(getattr(segmentation, name), weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
        images[f"torchvision/{name}"] = Network(build, ((3, 64, 64),))
    for name, size in DETECTORS.items():
        without = "boxes and what follows them, which depend on values"
        images[f"torchvision/{name}"] = Network(partial(Detector, name), ((3, size, size),), without=without)
    videos = partial(video.r3d_18, weights=None, num_classes=NUM_CLASSES)
    images["torchvision/r3d_18"] = Network(videos, ((3, 4, 32, 32),))
    images |= {f"ultralytics/{name}": Network(partial(_yolo, name), ((3, 64, 64),)) for name in YOLO}
    for name in TRANSFORMERS:
        is_text = name.startswith("bert")
        shape = (12,) if is_text else (3, 32, 32)
        images[f"transformers/{name}"] = Network(partial(_transformers, name), (shape,), num_tokens=50 * is_text)
    images["own/unet"] = Network(UNet, ((3, 16, 16),))
    images["own/conformer"] = Network(Conformer, ((20, 16),))
    images["own/audio_resnet"] = Network(AudioResNet, ((1, 512),))
    return images


NETWORKS = _all()
