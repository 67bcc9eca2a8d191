"""A gate inside batch normalisation computes what a gate behind it does; one mask per batch is a mask per sample of a batch of one."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import gator
from gator.gating.gated_norm import gated_batch_norm, is_foldable
from tests.gator.gating.test_gating_laws import small_network


def norm_and_input(training: bool) -> tuple[nn.BatchNorm2d, Tensor]:
    """Return a batch normalisation of 5 channels in float64, one of weight zero, and an input far from zero."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double().train(training)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.0, 0.3]))
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm, torch.randn(4, 5, 6, 6, dtype=torch.float64) + 3


@pytest.mark.parametrize("num_masks", [4, 1], ids=["per sample", "per batch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gated_norm_is_norm_times_mask(training: bool, memory_format: torch.memory_format, num_masks: int) -> None:
    norm, x = norm_and_input(training)
    mask = (torch.rand(num_masks, 5) > 0.4).double()
    gradient = torch.randn_like(x)

    def results(folded: bool) -> list[Tensor]:
        own = copy.deepcopy(norm)
        images = x.clone(memory_format=memory_format).requires_grad_()
        gates = mask.clone().requires_grad_()
        output = gated_batch_norm(own, images, gates) if folded else own(images) * gates[:, :, None, None]
        output.backward(gradient)
        assert output.is_contiguous(memory_format=memory_format)
        return [output, images.grad, gates.grad, own.weight.grad, own.bias.grad, *own.buffers()]

    for one, other in zip(results(True), results(False), strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_closed_channel_is_exactly_zero() -> None:
    norm, x = norm_and_input(training=True)
    assert torch.equal(gated_batch_norm(norm, x, torch.zeros(4, 5)), torch.zeros_like(x))


@pytest.mark.parametrize(
    "norm",
    [nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None), nn.GroupNorm(2, 4)],
    ids=["synchronised", "no weight", "cumulative mean", "no batch normalisation"],
)
def test_other_norms_are_gated_behind(norm: nn.Module) -> None:
    assert not is_foldable(norm)


def gradient_of_gates(sampling: str, images: Tensor, position: int = 0, keep_prob: float = 0.6) -> Tensor:
    """Return the gates' gradient of one step, noise of this position."""
    model = small_network().double()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    config = gator.GateConfig(init_keep_prob=keep_prob, sampling=sampling)
    gated = gator.GatedModel(model, graph, config).double().train()
    gated.seek(epoch=0, position=position)
    loss = cross_entropy(gated(images), torch.zeros(len(images), dtype=torch.int64))
    (loss + gator.GateLoss(gator.MacsCost(graph), weight=1.0)(gated)).backward()
    return gated.gates.logits_C.grad


def test_per_batch_and_per_sample_agree_on_a_batch_of_one() -> None:
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = (gradient_of_gates(sampling, images, position=9) for sampling in ("per_batch", "per_sample"))
    assert one.abs().sum() > 0
    assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_per_batch_draws_one_mask_with_the_keep_probability() -> None:
    model = small_network()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8))
    gated = gator.GatedModel(model, graph, gator.GateConfig(init_keep_prob=0.8, sampling="per_batch"))
    masks = torch.cat([gated.gates.sample(num_samples=16) for _ in range(2000)])
    assert masks.shape == (2000, graph.num_channels)
    spread = math.sqrt(0.8 * 0.2 / masks.numel())
    assert abs(masks.mean().item() - 0.8) < 5 * spread  # five standard deviations
    assert int(gated.gates.noise_at[1]) == 2000 * 16  # the place in the data goes on by images


def test_an_unknown_sampling_is_refused() -> None:
    with pytest.raises(gator.GateError, match="sampling is 'per_image', expected per_sample or per_batch"):
        gator.GateConfig(sampling="per_image")
