import copy
import itertools
import math
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset, get_worker_info

import gator
from orchestrator.config.trial import StageConfig, TrainingConfig
from orchestrator.datasets import splits as datasets
from orchestrator.datasets.seeds import mix_seed
from orchestrator.errors import ConfigError
from orchestrator.models import networks as models
from orchestrator.training.evaluation import calibration_batches, count_correct, evaluate, reestimate_batchnorm
from orchestrator.training.execution import Execution
from orchestrator.training.loaders import make_loader
from orchestrator.training.loop import Distillation, GateSteps, LossNotFiniteError, Training, lr_factor
from orchestrator.training.ranks import Ranks
from orchestrator.trial.costs import TrialCosts
from orchestrator.trial.gating_stage import GatedSteps
from tests.orchestrator.tiny_trial import TINY, context_of, tiny

PROJECT = Path(__file__).resolve().parents[3]
SMALL = tiny(data__global_batch_size=8)
CPU = torch.device("cpu")


def numbered(count: int) -> TensorDataset:
    """Images that hold their own number, with labels of zero."""
    return TensorDataset(torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.zeros(count).long())


def batches(world_size: int, epoch: int = 0, seed: int = 0, count: int = 21) -> list[list[list[int]]]:
    """Return the image numbers of every batch of every rank."""
    by_rank, config = [], SMALL.model_copy(update={"seed": seed})
    for rank in range(world_size):
        loader = make_loader("gate", context_of(config, numbered(count), Ranks(rank=rank, world_size=world_size)))
        loader.seek(epoch)
        by_rank.append([images[:, 0, 0, 0].int().tolist() for images, _ in loader])
    return by_rank


@pytest.mark.parametrize(
    ("schedule", "warmup_epochs", "epochs_done", "factor"),
    [
        ("constant", 0.0, 3.5, 1.0),
        ("constant", 2.0, 0.5, 0.25),  # a quarter of the warm-up
        ("cosine", 0.0, 2.0, 0.5),
        ("cosine", 0.0, 4.0, 0.0),
        ("cosine", 2.0, 2.0, 1.0),  # the warm-up has just ended
        ("cosine", 2.0, 3.0, 0.5),  # half of what follows it
    ],
)
def test_learning_rate_follows_the_schedule(
    schedule: Any, warmup_epochs: float, epochs_done: float, factor: float
) -> None:
    config = StageConfig(epochs=4, lr=0.1, schedule=schedule, warmup_epochs=warmup_epochs)
    assert lr_factor(config, epochs_done) == factor


def test_batches_of_all_ranks_make_up_the_global_batches() -> None:
    (alone,) = batches(world_size=1)
    first, second = batches(world_size=2)
    # 21 images fill two global batches of 8; rank r holds every second image of the order, from the r-th on
    assert [len(batch) for batch in alone] == [8, 8]
    assert [batch[0::2] for batch in alone] == first
    assert [batch[1::2] for batch in alone] == second


def test_order_depends_on_seed_and_epoch() -> None:
    assert batches(1) == batches(1)
    assert batches(1) != batches(1, epoch=1)
    assert batches(1) != batches(1, seed=1)
    assert batches(1, epoch=1) != batches(1, seed=1)  # a sum of the two would make these equal


def test_seeds_share_nothing() -> None:
    seeds = {mix_seed(seed, stage, epoch) for seed in range(4) for stage in ("gate", "finetune") for epoch in range(4)}
    assert len(seeds) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_global_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.global_batch_size is 8, expected a multiple of the 3 workers"):
        make_loader("gate", context_of(SMALL, numbered(24), Ranks(world_size=3)))


def test_split_that_fills_no_global_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 7 images .* expected at least data.global_batch_size = 8"):
        make_loader("gate", context_of(SMALL, numbered(7)))


class Answers(nn.Module):
    """Takes the first rows of an image as its logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_accuracy_counts_every_image_once() -> None:
    # Seven images of six logits, all of them 5 > 4 > ... > 0: class 0 comes first, class 4 fifth, class 5 sixth.
    images = torch.arange(5.0, -1, -1).view(1, 6, 1, 1).expand(7, -1, -1, -1)
    labels = torch.tensor([0, 0, 0, 4, 4, 5, 5])
    accuracy = evaluate(Answers(), TensorDataset(images, labels), tiny(evaluation__batch_size=3), Ranks())
    assert accuracy == pytest.approx({"top1": 100 * 3 / 7, "top5": 100 * 5 / 7})


def test_top5_of_three_classes_is_everything() -> None:
    images = torch.zeros(2, 3, 1, 1)
    assert evaluate(Answers(), TensorDataset(images, torch.tensor([0, 2])), TINY, Ranks())["top5"] == 100


@pytest.mark.parametrize("world_size", [2, 3, 16], ids="{} ranks".format)
def test_accuracy_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    torch.manual_seed(0)
    val = datasets.load(TINY.data, 0).test
    network = models.build(TINY.model)

    def count(ranks: Ranks) -> Tensor:
        return count_correct(network, val, tiny(evaluation__batch_size=24), ranks)

    parts = [count(Ranks(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert torch.equal(sum(parts, torch.zeros(2, dtype=torch.int64)), count(Ranks()))


def test_calibration_batches_are_the_same_each_time() -> None:
    def take() -> list[Tensor]:
        config = tiny(evaluation__bn_batches=3, evaluation__batch_size=4, seed=5)
        return list(calibration_batches(numbered(10), config, CPU))

    first = take()
    torch.manual_seed(1)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert len(torch.cat(first)[:, 0, 0, 0].unique()) == 10
    assert all(torch.equal(a, b) for a, b in zip(first, take(), strict=True))


class ReadElsewhere(TensorDataset):
    """Images that only loader processes read."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        assert get_worker_info() is not None
        return super().__getitem__(index)


def test_loader_processes_read_the_images_for_batchnorm() -> None:
    config = tiny(data__num_loader_workers=1)
    first, second = (models.build(config.model) for _ in range(2))
    second.load_state_dict(first.state_dict())
    reestimate_batchnorm(first, context_of(config, ReadElsewhere(*numbered(96).tensors)))
    reestimate_batchnorm(second, context_of(TINY, numbered(96)))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def gated_training(
    ranks: Ranks | None = None, dtype: torch.dtype = torch.float32, norm: bool = True, **training: Any
) -> Training:
    """Return the training of a gated network; training: fields of TrainingConfig."""
    torch.manual_seed(0)
    network = models.build(TINY.model) if norm else plain_network()
    network = network.to(dtype)
    config = tiny(gating={"epochs": 3, "lr": 0.1, "target_ratio": 0.5, "init_keep_prob": 0.9}, training=training)
    graph = gator.trace(network, torch.randn(2, 3, 8, 8, dtype=dtype))
    gated = gator.GatedModel(network, graph, gator.GateConfig(init_keep_prob=0.9)).to(dtype)
    split = datasets.load(TINY.data, 0).train
    images, labels = zip(*(split[index] for index in range(len(split))), strict=True)  # type: ignore[arg-type]
    dataset = TensorDataset(torch.stack(images).to(dtype), torch.stack(labels))
    gates = GatedSteps(gated, TrialCosts(config, graph, CPU))
    return Training(gated, "gate", context_of(config, dataset, ranks, is_elastic=True), gates=gates)


def plain_network() -> nn.Module:
    """Without BatchNorm, whose statistics belong to one rank's images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_training_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, begun, continued = (gated_training() for _ in range(3))
    losses = [whole.run_epoch(epoch) for epoch in range(2)]
    begun.run_epoch(0)
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(123)  # another process has other global generators
    continued.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert continued.run_epoch(1) == losses[1]
    expected = whole.network.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in continued.network.state_dict().items())


def test_loss_that_is_not_finite_is_told_with_its_step() -> None:
    images = torch.zeros(32, 3, 2, 2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    training = Training(network, "finetune", context_of(SMALL, TensorDataset(images, torch.zeros(32).long())))
    training.loader.seek(1)
    third = next(itertools.islice(training.loader.batches, 2, None))
    images[third[0]] = torch.nan  # in the third of four steps
    with pytest.raises(LossNotFiniteError, match=r"the loss is nan in epoch 2, step 3 of 4.*lower finetuning.lr"):
        training.run_epoch(1)


def linear_training(distillation: Distillation | None = None, **finetuning: Any) -> Training:
    """Two steps an epoch of a linear network on eight images each; all that is random is seeded."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 2, 2)
    labels = torch.arange(16) % 4
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    stage = {"epochs": 2, "lr": 0.1, "schedule": "constant", "weight_decay": 0, **finetuning}
    config = tiny(data__global_batch_size=8, finetuning=stage)
    context = context_of(config, TensorDataset(images, labels))
    return Training(network, "finetune", context, distillation=distillation)


def test_distillation_is_the_divergence_from_the_teacher_at_the_temperature() -> None:
    # Teacher (2/3, 1/3), student (1/2, 1/2) at temperature 2: KL = 2/3 ln 4/3 + 1/3 ln 2/3, times 2 squared
    teacher_logits = torch.tensor([[2 * math.log(2.0), 0.0]])
    distillation = Distillation(teacher=Answers(), weight=1.0, temperature=2.0)
    expected = 4 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert float(distillation.loss(teacher_logits, torch.zeros(1, 2))) == pytest.approx(expected, rel=1e-6)


def test_teacher_learns_nothing_and_the_student_its_answers() -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    before = teacher[1].weight.detach().clone()
    training = linear_training(distillation=Distillation(teacher=teacher, weight=1.0, temperature=1.0))
    losses = [training.run_epoch(epoch) for epoch in range(60)]
    assert losses[-1] < 0.01 * losses[0]  # the labels alone say something else: they have weight 0
    assert torch.equal(teacher[1].weight, before)
    assert teacher[1].weight.grad is None


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_teacher_is_cast_once_and_compiled_with_the_student(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    execution, images = Execution(device=CPU, is_bfloat16=True, is_compiled=is_compiled), torch.randn(5, 3, 4, 4)
    with torch.no_grad(), execution.autocast():
        expected = teacher(images)
        found = execution.frozen(teacher)(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [layer.weight.dtype for layer in (teacher[0], teacher[1], teacher[4])] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
    assert counted.frame_count == is_compiled


def test_distillation_shares_the_loss_with_the_labels() -> None:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()

    def first_loss(weight: float) -> float:
        training = linear_training(distillation=Distillation(teacher=teacher, weight=weight, temperature=1.0))
        training.optimizer.param_groups[0]["lr"] = training._full_lrs[0] = 0.0
        return training.run_epoch(0)

    assert first_loss(0.25) == pytest.approx(0.75 * first_loss(0.0) + 0.25 * first_loss(1.0), rel=1e-6)


def test_label_smoothing_is_part_of_the_loss() -> None:
    training = linear_training(label_smoothing=0.5)
    training.optimizer.param_groups[0]["lr"] = training._full_lrs[0] = 0.0
    training.loader.seek(0)
    expected = [
        cross_entropy(training.network(images), labels, label_smoothing=0.5).item()
        for images, labels in training.loader
    ]
    assert training.run_epoch(0) == pytest.approx(statistics.mean(expected), rel=1e-6)


def test_average_of_the_weights_moves_by_one_minus_decay_a_step() -> None:
    training, seen = linear_training(ema_decay=0.75), []
    training.optimizer.register_step_post_hook(lambda *_: seen.append(training.network[1].weight.detach().clone()))
    training.run_epoch(0)
    first, second = seen  # the average starts at the weights after the first step
    assert torch.allclose(training.result[1].weight, 0.75 * first + 0.25 * second)


def test_average_goes_on_from_its_state() -> None:
    whole, continued = (linear_training(ema_decay=0.9) for _ in range(2))
    whole.run_epoch(0)
    continued.load_state_dict(copy.deepcopy(whole.state_dict()))
    for training in (whole, continued):
        training.run_epoch(1)
    assert torch.equal(continued.result[1].weight, whole.result[1].weight)
    assert not torch.equal(whole.result[1].weight, whole.network[1].weight)


def weights_after(dtype: torch.dtype = torch.float64, **training: Any) -> dict[str, Tensor]:
    """Return the gated network's weights and gates after an epoch of four steps of 32 images."""
    gated = gated_training(dtype=dtype, norm=False, **training)
    gated.run_epoch(0)
    return {name: tensor for name, tensor in gated.network.state_dict().items() if not name.endswith("noise_at")}


@pytest.mark.parametrize("size", [8, 12, 32], ids="{} images".format)
def test_micro_batches_are_the_batch(size: int) -> None:
    micro = weights_after(micro_batch_size=size)  # of 12 the last one has 8
    whole = weights_after()
    torch.testing.assert_close(micro, whole, rtol=1e-9, atol=1e-11)  # float64: sums in another order


def test_micro_batches_share_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        training = gated_training(micro_batch_size=8)
        distributed = nn.parallel.DistributedDataParallel(training.network)
        reduced: list[int] = []
        distributed.register_comm_hook(None, lambda state, bucket: reduced.append(1) or done(bucket.buffer()))
        training._distributed = training._forward = distributed
        training.run_epoch(0)
    finally:
        torch.distributed.destroy_process_group()
    assert len(reduced) == 4  # steps, each of four micro-batches; the gradients fill one bucket


def done(tensor: Tensor) -> "torch.futures.Future[Tensor]":
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(tensor)
    return future


def test_channels_last_is_a_layout_only() -> None:
    training = gated_training(channels_last=True)
    assert training.network.state_dict()["network.conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights_after(channels_last=True), weights_after(), rtol=1e-9, atol=1e-11)


def test_bfloat16_computes_roughly_the_same_and_keeps_weights_in_float32() -> None:
    half = weights_after(torch.float32, precision="bfloat16")
    full = weights_after(torch.float32)
    assert half["network.0.weight"].dtype == torch.float32
    assert not torch.equal(half["network.0.weight"], full["network.0.weight"])
    torch.testing.assert_close(
        half["network.0.weight"], full["network.0.weight"], rtol=0, atol=0.02
    )  # bfloat16 has three digits


def test_compiled_steps_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")  # without a C++ compiler's minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    compiled = weights_after(compile=True)
    assert counted.frame_count == 1
    torch.testing.assert_close(compiled, weights_after(), rtol=1e-9, atol=1e-11)


def test_every_recut_and_every_size_of_image_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit of 8, torch continues in eager mode without an error; a second size it compiles for any size."""
    shapes = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor)][-1])
        return graph_module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    execution, sizes = Execution(device=CPU, is_compiled=True), range(4, 16)
    for width in range(1, 11):
        execution.compiled(nn.Sequential(nn.Conv2d(3, width, 1)))(torch.zeros(1, 3, 4, 4))
    assert len(shapes) == 10
    shapes.clear()
    forward = execution.compiled(nn.Sequential(nn.ReLU()))
    for size in sizes:
        forward(torch.zeros(1, 3, size, size))
    assert shapes == [(1, 3, size, size) for size in sizes]
    assert all(isinstance(size, int) for shape in shapes for size in shape)  # no size is a symbol


def test_defaults_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Execution.on(cpu, TrainingConfig()) == Execution(device=cpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert Execution.on(gpu, TrainingConfig()) == Execution(
        device=gpu, is_bfloat16=True, memory_format=torch.channels_last
    )
    asked = TrainingConfig(precision="float32", channels_last=False, compile=True, micro_batch_size=4)
    assert Execution.on(gpu, asked) == Execution(device=gpu, is_compiled=True, micro_batch_size=4)


class Recorder(GateSteps):
    """Notes which images the gates are asked for, and the progress of the stage."""

    def __init__(self) -> None:
        self.sought: list[tuple[int, int, int]] = []
        self.progress: list[float] = []

    def begin_step(self, progress: float, samples_per_rank: float) -> None:
        assert samples_per_rank == 4  # a global batch of 8 on two ranks
        self.progress.append(progress)

    def seek(self, *, epoch: int, position: int, stride: int) -> None:
        self.sought.append((epoch, position, stride))


def test_gates_get_position_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    gates, network = Recorder(), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    monkeypatch.setattr(Ranks, "distribute", lambda self, network: network)
    monkeypatch.setattr(Ranks, "sum", lambda self, tensor: tensor)
    config = tiny(data__global_batch_size=8, gating__lr=1e-9)
    training = Training(network, "gate", context_of(config, numbered(25), Ranks(rank=1, world_size=2)), gates=gates)
    for epoch in range(2):
        training.run_epoch(epoch)
    # three global batches of 8 an epoch; rank 1 of 2 begins at the second image of each
    assert gates.sought == [(epoch, position, 2) for epoch in range(2) for position in (1, 9, 17)]
    assert gates.progress == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


def train_as_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    ranks = Ranks.current(torch.device("cpu"))
    training = gated_training(ranks, torch.float64, norm=False)
    losses = [training.run_epoch(epoch) for epoch in range(3)]
    agreed = [ranks.all_agree("same"), ranks.all_agree(f"rank {rank}")]
    state = {"losses": losses, "agreed": agreed, "network": training.network.state_dict()}
    torch.save(state, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4], ids="{} ranks".format)  # 3 do not share 32 images evenly
def test_ranks_train_like_one(tmp_path: Path, world_size: int) -> None:
    program = f"import sys; from {__name__} import train_as_rank as run; run(*map(int, sys.argv[1:3]), sys.argv[3])"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    commands = [
        [sys.executable, "-c", program, str(rank), str(world_size), str(tmp_path)] for rank in range(world_size)
    ]
    ranks = [subprocess.Popen(command, cwd=PROJECT, env=environment) for command in commands]
    try:
        assert [rank.wait(timeout=100) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    alone = gated_training(dtype=torch.float64, norm=False)
    losses = [alone.run_epoch(epoch) for epoch in range(3)]
    expected = {name: tensor for name, tensor in alone.network.state_dict().items() if not name.endswith("noise_at")}
    assert not expected["gates.keep_C"].all()  # gates have closed
    first, *others = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world_size))
    assert first["agreed"] == [True, False]
    assert first["losses"] == pytest.approx(losses, rel=1e-5)  # losses are kept in float32
    for other in others:
        assert other["losses"] == first["losses"]
        assert all(torch.equal(other["network"][name], first["network"][name]) for name in expected)
    # Sums in another order; and the loss is float32, in which a share of 11 images of 32 is rounded, one of 16 or 8 is not.
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if 32 % world_size == 0 else {"rtol": 1e-5, "atol": 1e-8}
    for name, tensor in expected.items():
        torch.testing.assert_close(first["network"][name], tensor, **tolerance)
