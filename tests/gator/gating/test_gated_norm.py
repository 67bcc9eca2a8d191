"""A gate inside batch normalisation computes what a gate behind it does; one mask per batch is a mask per sample of a batch of one."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import gator
from gator.gating import gated_norm
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


@pytest.fixture(params=["own passes", "torch's kernels", "recomputed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-sample masks: as on a CPU, as elsewhere, and as elsewhere for large values."""
    if request.param != "own passes":
        monkeypatch.setattr(gated_norm, "is_fusable", lambda *_: False)
    if request.param == "recomputed":
        monkeypatch.setattr(gated_norm, "RECOMPUTED_BYTES", 0)


@pytest.mark.usefixtures("way")
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
        statistics = own.running_mean, own.running_var
        return [output, images.grad, gates.grad, own.weight.grad, own.bias.grad, *statistics]

    for one, other in zip(results(True), results(False), strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_batches_are_counted_as_without_gates() -> None:
    model = small_network()
    gated = gator.GatedModel(model, gator.trace(model, torch.zeros(1, 3, 8, 8))).train()
    model[0][1].eval()  # frozen; the twin of the gates has a flag of its own
    gated.network.get_submodule("0.1").eval()
    for _ in range(3):
        gated(torch.randn(2, 3, 8, 8))
    counts = {name: int(count) for name, count in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {name: 0 if name.startswith("0.") else 3 for name in counts}
    assert len(counts) == 5


@pytest.mark.parametrize("recomputed_bytes", [0, 1 << 30], ids=["recomputed", "kept"])
def test_bfloat16_masks_need_no_cast_and_their_gradient_no_more_memory(
    recomputed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under autocast on a GPU: values in bfloat16, the norm's tensors and the mask in float32."""
    monkeypatch.setattr(gated_norm, "RECOMPUTED_BYTES", recomputed_bytes)
    norm, x = norm_and_input(training=True)
    norm, x, mask = norm.float(), x.bfloat16().requires_grad_(), (torch.rand(4, 5) > 0.4).float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = gated_batch_norm(norm, x, mask)
    assert sum(tensor.shape == x.shape for tensor in saved) == (1 if recomputed_bytes == 0 else 2)
    exact, exact_mask = x.detach().double().requires_grad_(), mask.detach().double().requires_grad_()
    expected = copy.deepcopy(norm).double()(exact) * exact_mask[:, :, None, None]
    gradient = torch.randn(x.shape).bfloat16()
    output.backward(gradient)
    expected.backward(gradient.double())
    assert (output.dtype, x.grad.dtype, mask.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for one, other in ((output, expected), (x.grad, exact.grad), (mask.grad, exact_mask.grad)):
        assert float((one.detach().double() - other.detach()).norm()) <= 0.01 * float(
            other.detach().norm()
        )  # of three digits


@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [((3, 4, 5), (3, 1, 5)), ((3, 4, 5), (1, 1, 5)), ((3, 5), (3, 5)), ((2, 3, 4, 5), (2, 1, 1, 5))],
    ids=["per sample", "per batch", "of vectors", "of images"],
)
def test_the_layer_norm_of_open_channels_has_the_gradient_of_its_formula(
    shape: tuple[int, ...], mask_shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape).double() + 2, torch.randn(5).double(), torch.randn(5).double()
    mask = (torch.rand(mask_shape) > 0.4).double()
    mask[..., 0] = 1
    if len(mask) > 1:
        mask[1] = 0  # no channel of a sample is open
    inputs = [tensor.requires_grad_() for tensor in (x, mask, weight, bias)]
    gradient = torch.randn(shape).double()
    saved = []

    def mean(value: Tensor) -> Tensor:
        return value.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)

    centred = (x * mask - mean(x * mask)) * mask
    expected = (centred * torch.rsqrt(mean(centred.square()) + 1e-2) * weight + bias) * mask
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        found = gated_norm.MaskedLayerNorm.apply(*inputs, 1e-2)
    assert sum(tensor.shape == x.shape for tensor in saved) == 1 + (mask_shape == shape)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    derivatives = (torch.autograd.grad(output, inputs, gradient) for output in (found, expected))
    for one, other in zip(*derivatives, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_layer_norm_of_open_channels_takes_bfloat16() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4, 64), torch.randn(64), torch.randn(64)
    mask = (torch.rand(3, 1, 64) > 0.4).float()

    def results(dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x.bfloat16().to(dtype), mask, weight, bias)]
        output = gated_norm.MaskedLayerNorm.apply(*inputs, 1e-5)
        output.backward(torch.ones_like(output))
        assert (output.dtype, inputs[0].grad.dtype, inputs[1].grad.dtype) == (dtype, dtype, torch.float32)
        return [output.detach(), *(tensor.grad for tensor in inputs)]

    for one, other in zip(results(torch.bfloat16), results(torch.float32), strict=True):
        assert float((one.float() - other).norm()) <= 0.01 * float(other.norm())


@pytest.mark.usefixtures("way")
def test_a_second_derivative_is_refused() -> None:
    norm, x = norm_and_input(training=True)
    output = gated_batch_norm(norm, x.requires_grad_(), torch.ones(4, 5).double())
    with pytest.raises(gator.GateError, match="create_graph is True"):
        torch.autograd.grad(output.square().sum(), x, create_graph=True)


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
