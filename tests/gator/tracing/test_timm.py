"""The law of pruning on twenty networks of timm of different families, which none of us has written."""

import pytest

pytest.importorskip("timm")

from tests.gator.survey import EXACT, check

FAMILIES = (
    *(
        "resnet",
        "sknet",
        "resnest",
        "res2net",
        "densenet",
        "dpn",
        "dla",
        "hrnet",
        "xception_aligned",
        "vovnet",
        "byobnet",
    ),
    *("mobilenetv3", "efficientnet", "ghostnet", "regnet", "starnet", "convnext", "mobilevit", "vision_transformer"),
    "swin_transformer",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_timm_is_traced_and_cut_exactly(name: str) -> None:
    row = check(f"timm/{name}")
    assert (row.result, row.reason) == (EXACT, "")
    assert row.reach > 0.9
