"""What must not change a gated training step: how many processes share it, micro-batches, precision, layout, compilation, checkpointing."""

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gator

BATCH = 8


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a convolution with its batch normalisation."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels))


class Branch(nn.Module):
    """A residual branch that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = convolution(6, 8), convolution(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to its input."""
        return (x + self.two(self.one(x).relu())).relu()


def small_network() -> nn.Module:
    """Return a stem, two residual branches and a classifier: three groups, 22 channels; always the same weights."""
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nn.Sequential(convolution(3, 6), nn.ReLU(inplace=True), Branch(), Branch(), *head)


class Run:
    """The small gated network in training, in float64, its BatchNorm frozen; gates that close within a few steps."""

    def __init__(self, curvature: float = 0.0, **gate_loss: float) -> None:
        self.model = small_network().double()
        self.graph = gator.trace(self.model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        config = gator.GateConfig(init_keep_prob=0.55, seed=3, curvature=curvature)
        self.gated = gator.GatedModel(self.model, self.graph, config).double()
        with torch.no_grad():  # so that they close one after another
            self.gated.gates.logits_C.copy_(torch.linspace(0.05, 0.5, 22)[torch.randperm(22)])
        self.cost = gator.MacsCost(self.graph)
        self.gate_loss = gator.GateLoss(self.cost, **(gate_loss or {"weight": 1.0}))
        groups = self.gated.param_groups(lr=0.2, gate_lr_scale=0.5, cost=self.cost)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.gated.train()
        for module in self.gated.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def begin_step(self, step: int, num_steps: int) -> None:
        """Let the control towards a target act, if there is one."""
        self.gate_loss.begin_step(self.gated, step / (num_steps - 1))

    def backward(
        self, images: Tensor, labels: Tensor, *, share: float = 1.0, forward: nn.Module | None = None
    ) -> Tensor:
        """Add the gradient of a batch to what is there and return the loss."""
        logits = (self.gated if forward is None else forward)(images)
        loss = (cross_entropy(logits, labels) + self.gate_loss(self.gated)) * share
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Update and forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all that training changes."""
        return {name: tensor.clone() for name, tensor in self.gated.state_dict().items()}


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield global batches of images and labels, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield images, torch.randint(5, (BATCH,), generator=generator)


def train_alone(steps: int = 6, **settings: float) -> Run:
    """Return a run after steps of whole batches."""
    run = Run(**settings)
    for step, (images, labels) in enumerate(batches(steps)):
        run.begin_step(step, steps)
        run.backward(images, labels)
        run.step()
    return run


def num_closed(run: Run) -> int:
    """Return how many gates are closed for good."""
    return int((~run.gated.gates.keep_C).sum())


PRESSURES: dict[str, dict[str, float]] = {"weight": {"weight": 1.0, "curvature": 4.0}, "target": {"target_ratio": 0.5}}
"""A loss by weight, with the second-order term; and one towards a target, whose last selection falls into the last of six steps."""
NUM_CLOSED = {"weight": 8, "target": 6}


@pytest.mark.parametrize("pressure", PRESSURES)
def test_micro_batches_are_one_batch(pressure: str) -> None:
    run = Run(**PRESSURES[pressure])
    run.gated.samples_per_step = BATCH
    for step, (images, labels) in enumerate(batches(6)):
        run.begin_step(step, 6)
        for part, part_labels in zip(images.split(2), labels.split(2), strict=True):
            run.backward(part, part_labels, share=2 / BATCH)
        run.step()
    alone = train_alone(**PRESSURES[pressure])
    assert num_closed(alone) == NUM_CLOSED[pressure]
    assert_close(run.tensors(), alone.tensors(), rtol=1e-9, atol=1e-11)  # float64: sums in another order


def _train_one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for pressure, settings in PRESSURES.items():
        run = Run(**settings)
        distributed = DistributedDataParallel(run.gated)  # with its defaults, which send rank 0's buffers to all
        for step, (images, labels) in enumerate(batches(6)):
            run.begin_step(step, 6)
            run.gated.seek(epoch=0, position=step * BATCH + rank, stride=2)
            run.backward(images[rank::2], labels[rank::2], forward=distributed)
            run.step()
        torch.save({"mask": run.gated.mask_NC.detach(), **run.tensors()}, f"{folder}/{pressure}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two ranks has at the end, under each pressure."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_train_one_rank, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("pressure", PRESSURES)
def test_two_ranks_are_one_process(two_ranks: Path, pressure: str) -> None:
    first, second = (torch.load(two_ranks / f"{pressure}_{rank}.pt", weights_only=True) for rank in range(2))
    alone = train_alone(**PRESSURES[pressure])
    assert num_closed(alone) == NUM_CLOSED[pressure]
    assert torch.equal(first["gates.keep_C"], second["gates.keep_C"])  # the closed channels, to the bit
    assert torch.equal(first["gates.logits_C"], second["gates.logits_C"])
    whole = alone.gated.mask_NC  # samples draw by their place in the global batch, whatever the rank
    assert torch.equal(torch.stack([first.pop("mask"), second.pop("mask")], dim=1).flatten(0, 1), whole)
    assert_close(first, alone.tensors(), rtol=1e-9, atol=1e-11)


def test_a_compiled_step_is_one_graph_and_equals_the_eager_one() -> None:
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = Run(curvature=4.0)
    compiled = torch.compile(run.gated, backend=counted, fullgraph=True)
    for images, labels in batches(6):
        run.backward(images, labels, forward=compiled)
        run.step()
    alone = train_alone(curvature=4.0)
    assert num_closed(alone) == NUM_CLOSED["weight"]
    assert counted.frame_count == 1, "channels that close, and the place in the data, must not recompile"
    assert_close(run.tensors(), alone.tensors(), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_compiled_network_recompiles_at_a_recut_only() -> None:
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run = Run()
    counts = []
    for number, (images, labels) in enumerate(batches(6)):
        if number in (2, 4):
            run.gated = gator.recut(run.gated, run.optimizer)
        if number in (0, 2, 4):
            compiled = torch.compile(run.gated, backend=counted, fullgraph=True)
        run.backward(images, labels, forward=compiled)
        run.step()
        counts.append(counted.frame_count)
    assert len(run.gated.gates.logits_C) < 22, "the re-cuts left the network as it was"
    assert counts == [1, 1, 2, 2, 3, 3]


class Checkpointed(nn.Module):
    """A network that computes its middle again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.is_checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        """Run stem, body and head."""
        x = self.stem(x)
        x = checkpoint(self.body, x, use_reentrant=False) if self.is_checkpointed else self.body(x)
        return self.head(x)


def test_a_recomputed_forward_sees_the_same_masks() -> None:
    torch.manual_seed(0)
    model = Checkpointed().double()
    graph = gator.trace(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    gradients = []
    for is_checkpointed in (False, True):
        gated = gator.GatedModel(copy.deepcopy(model), graph, gator.GateConfig(init_keep_prob=0.6)).double().train()
        gated.network.is_checkpointed = is_checkpointed
        calls = Counter()
        gated.network.body[0].register_forward_hook(lambda *_, calls=calls: calls.update(["body"]))
        ((images, labels),) = batches(1)
        cross_entropy(gated(images), labels).backward()
        assert calls["body"] == 1 + is_checkpointed
        gradients.append({name: p.grad for name, p in gated.named_parameters()})
    assert gradients[0]["gates.logits_C"].abs().sum() > 0
    assert_close(*gradients, rtol=0, atol=0)


class OpRecord(TorchDispatchMode):
    """The names of all ops that run, with their outputs' layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append((func._schema.name, result))
        return result

    def count(self, name: str) -> int:
        """Return how often an op ran."""
        return sum(op == f"aten::{name}" for op, _ in self.ops)


@pytest.mark.parametrize("gate_loss", [{"weight": 1.0}, {"target_ratio": 0.5}], ids=["by weight", "towards a target"])
def test_a_step_never_waits_for_the_device(gate_loss: dict[str, float]) -> None:
    """Reading a value (.item(), bool(), nonzero) stalls a GPU. A target asks once in a stage, when it selects."""
    run = Run(**gate_loss)
    progress = () if "weight" in gate_loss else (0.95,)
    record = OpRecord()
    for step, (images, labels) in enumerate(batches(2)):
        with record if step else OpRecord():
            (cross_entropy(run.gated(images), labels) + run.gate_loss(run.gated, *progress)).backward()
            run.step()
    assert record.ops
    for name in ("_local_scalar_dense", "nonzero", "item"):
        assert record.count(name) == 0, name


def test_a_step_draws_once_for_all_gates() -> None:
    run = Run()
    record = OpRecord()
    ((images, labels),) = batches(1)
    with record:
        run.backward(images, labels)
    assert len(run.graph.groups) == 3
    assert record.count("logit") == 1  # ln u - ln(1 - u)
    assert record.count("rand") == record.count("bernoulli") == record.count("uniform") == 0


def test_channels_last_goes_through_without_a_copy() -> None:
    run = Run()
    run.gated.to(memory_format=torch.channels_last)
    ((images, labels),) = batches(1)
    copies = []
    for network in (run.gated, run.model):
        record = OpRecord()
        with record:
            cross_entropy(network(images.to(memory_format=torch.channels_last)), labels).backward()
        outputs = [out for _, out in record.ops if isinstance(out, Tensor) and out.dim() == 4 and min(out.shape) > 1]
        assert len(outputs) > 10
        copies.append([out for out in outputs if not out.is_contiguous(memory_format=torch.channels_last)])
    assert len(copies[0]) == len(
        copies[1]
    )  # the gradient of average pooling comes out contiguous, with gates or without


def test_bfloat16_autocast_keeps_masks_exact_and_trains_the_gates() -> None:
    run = Run()
    run.gated.float()
    ((images, labels),) = batches(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = run.gated(images.float())
        loss = cross_entropy(logits, labels) + run.gate_loss(run.gated)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert set(run.gated.mask_NC.unique().tolist()) == {0.0, 1.0}
    exact = Run()
    exact.backward(images, labels)
    bfloat16, float64 = (r.gated.gates.logits_C.grad.double() for r in (run, exact))
    assert bfloat16.isfinite().all()
    # bfloat16 has 8 bits; over all gates the direction stays the same.
    assert torch.cosine_similarity(bfloat16, float64, dim=0) > 0.95
