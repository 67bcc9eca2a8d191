"""The law of pruning on twenty networks of timm of different families, which none of us has written."""

import pytest

pytest.importorskip("timm")

from tests.gator.timm_families import Row, check

FAMILIES = (
    *(
        "resnet10t",
        "skresnet18",
        "resnest14d",
        "res2net50_14w_8s",
        "densenet121",
        "dpn48b",
        "dla46_c",
        "hrnet_w18_small",
    ),
    *("xception41", "ese_vovnet19b_slim", "repvgg_a0", "mobilenetv4_conv_small_035", "mixnet_s", "ghostnet_050"),
    *(
        "regnety_002",
        "starnet_s1",
        "convnext_atto",
        "mobilevit_xxs",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
    ),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_timm_is_traced_and_cut_exactly(name: str) -> None:
    row: Row = check(name)
    assert not row.failure
    assert row.reach > 0.9
