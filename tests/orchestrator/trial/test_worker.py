import copy
import errno
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gator
from orchestrator.config.trial import TrialConfig, with_values
from orchestrator.datasets import splits as datasets
from orchestrator.errors import ClusterError, ConfigError, DataError, StorageError, TrialError
from orchestrator.latency.record import Latency
from orchestrator.models import networks as models
from orchestrator.storage import files as paths
from orchestrator.storage.paths import TrialPaths
from orchestrator.storage.records import METRICS_SCHEMA, read_metrics
from orchestrator.training import epochs, loop, saver
from orchestrator.training.checkpoint import NOT_JUDGED, VERSION, Checkpoint
from orchestrator.training.evaluation import calibration_batches, evaluate
from orchestrator.training.loop import Distillation, LossNotFiniteError
from orchestrator.training.ranks import Ranks
from orchestrator.trial import gating_stage, stages, worker
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.train_runs import TrainRuns
from orchestrator.trial.worker import run_assignment, train_loop_per_worker
from tests.orchestrator.tiny_trial import TINY, MemorySession, assign, finish, timeless, tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Assignment, MemorySession, dict[str, Any]]:
    """One trial, run to its end; the tests only look at it."""
    return finish(tmp_path_factory.mktemp("finished"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_checkpoint_on_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / "tensors.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        Checkpoint(stage="gate", epochs_done=1, world_size=1, tensors={"weight": torch.zeros(100_000)}).save(tmp_path)
    assert error.value.errno == errno.ENOSPC


def test_each_epoch_is_reported_and_the_end_once(finished: Any) -> None:
    _, session, metrics = finished
    assert [(row["epoch"], row["stage"], row["final"]) for row in session.reports] == [
        (1, "gate", False),
        (2, "gate", False),
        (3, "finetune", False),
        (4, "finetune", False),
        (4, "finetune", True),
    ]
    assert session.reports[-1] == metrics


def test_reports_hold_plain_numbers_only(finished: Any) -> None:
    _, session, _ = finished  # Ray Train refuses NumPy's
    assert {type(value) for row in session.reports for value in row.values()} <= {int, float, str, bool, type(None)}


def test_final_metrics_follow_from_the_architecture(finished: Any) -> None:
    assignment, _, metrics = finished
    graph = gator.trace(models.build(TINY.model), torch.randn(2, 3, 8, 8))
    architecture = gator.Architecture.load(TrialPaths(assignment.folder).architecture)
    macs = gator.MacsCost(graph)
    assert metrics["macs"] == macs(architecture)
    assert metrics["macs_ratio"] == macs(architecture) / macs.full == pytest.approx(0.5, rel=0.15)  # tiny: coarse steps
    assert metrics["open_channels"] == sum(architecture.widths.values())
    assert metrics["latency_ms"] == metrics["latency_p10_ms"] == metrics["macs"] / 1e7  # profile.clock is model
    assert metrics["latency_ms_b4"] == 4 * metrics["latency_ms"]
    assert metrics["latency_device"] == "model"


def test_reloaded_network_has_the_recorded_accuracy_and_size(finished: Any) -> None:
    assignment, _, metrics = finished
    network = gator.load_pruned(assignment.folder, build=lambda: models.build(TINY.model))
    accuracy = evaluate(network, datasets.load(TINY.data, TINY.seed).test, TINY, Ranks())
    assert accuracy == {"top1": metrics["top1"], "top5": metrics["top5"]}
    assert metrics["params"] == sum(parameter.numel() for parameter in network.parameters())


def test_metrics_file_holds_what_was_reported(finished: Any) -> None:
    assignment, session, _ = finished
    rows = read_metrics(TrialPaths(assignment.folder).metrics)
    assert [{name: row[name] for name in reported} for row, reported in zip(rows, session.reports, strict=True)] == (
        session.reports
    )
    further = {name for name in session.reports[-1] if name.endswith("_b4")}  # of the second profile batch size
    assert "latency_ms_b4" in further
    assert {*session.reports[-1]} - further == {*METRICS_SCHEMA.names}


def test_log_has_a_line_per_epoch(finished: Any) -> None:
    assignment, _, _ = finished
    lines = TrialPaths(assignment.folder).log.read_text().splitlines()
    heads = [line.split("orchestrator.training.epochs: ")[1].split(" loss")[0] for line in lines]
    assert heads == [
        f"epoch {epoch}/4 {stage}" for epoch, stage in enumerate(["gate", "gate", "finetune", "finetune"], 1)
    ] + ["final 4/4 finetune"]


@pytest.mark.parametrize("num_reported", [1, 2, 3, 4], ids="after report {}".format)
def test_trial_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    finished: Any, tmp_path: Path, num_reported: int
) -> None:
    assignment, session, metrics = finished
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)  # with the rows of epochs that no checkpoint holds
    (folder / "weights.safetensors").unlink()
    continued = MemorySession(tmp_path, start_from=session.checkpoints[num_reported - 1])
    again = run_assignment(replace(assignment, folder=folder), continued)
    assert timeless(again) == timeless(metrics)
    assert [row["epoch"] for row in continued.reports] == [row["epoch"] for row in session.reports[num_reported:]]
    assert [row["epoch"] for row in read_metrics(folder / "metrics.parquet")] == [1, 2, 3, 4, 4]
    assert (folder / "weights.safetensors").read_bytes() == (assignment.folder / "weights.safetensors").read_bytes()


@pytest.fixture(
    scope="module", params=[{}, {"gating__recut_every": 1, "model__kwargs": {"width": 8}}], ids=["", "recut"]
)
def saved_midway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Assignment, MemorySession, dict[str, Any]]]:
    """A trial of four steps an epoch that is also saved after the second; it shifts its images at random."""
    folder = tmp_path_factory.mktemp("midway")
    config = tiny(data__augment=True, training__checkpoint_every_s=1e-9, finetuning__ema_decay=0.5, **request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "STEPS_BETWEEN_CHECKS", 2)
        assignment, session = assign(folder, config), MemorySession(folder)
        yield assignment, session, run_assignment(assignment, session)


@pytest.mark.parametrize("num_saved", [1, 3, 5, 7], ids="checkpoint {}".format)
def test_trial_goes_on_in_the_middle_of_an_epoch_as_if_it_had_not_stopped(
    saved_midway: Any, tmp_path: Path, num_saved: int
) -> None:
    assignment, session, metrics = saved_midway
    start = Checkpoint.load(session.checkpoints[num_saved - 1], torch.device("cpu"))
    assert start.tensors["loader"]["step"] == 2
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    (folder / "weights.safetensors").unlink()
    torch.manual_seed(num_saved)  # another process has other global generators
    continued = MemorySession(tmp_path, start_from=session.checkpoints[num_saved - 1])
    again = run_assignment(replace(assignment, folder=folder), continued)
    assert timeless(again) == timeless(metrics)
    assert [timeless(row) for row in continued.reports] == [timeless(row) for row in session.reports[num_saved:]]
    for name in ("weights.safetensors", "gates.safetensors"):
        assert (folder / name).read_bytes() == (assignment.folder / name).read_bytes()


def test_base_network_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 2)
    weights = []
    sessions = [MemorySession(tmp_path / "whole")]
    for name in ("whole", "continued"):
        folder = tmp_path / name
        config = tiny(pretraining__epochs=2, training__checkpoint_every_s=1e-9)
        assignment = Assignment.of(config, name="base", folder=folder, base_weights=None)
        run_assignment(assignment, sessions[-1])
        weights.append((folder / "weights.safetensors").read_bytes())
        sessions.append(MemorySession(tmp_path / "continued", start_from=sessions[0].checkpoints[2]))
    assert sessions[0].reports[1]["epoch"] == 1  # after a report in the middle of epoch 1
    assert weights[0] == weights[1]


def test_a_stop_that_is_asked_for_is_saved_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 2)
    assignment, session = assign(tmp_path), MemorySession(tmp_path)
    monkeypatch.setattr(worker, "RaySession", lambda *_: session)
    TrialPaths(assignment.folder).stop.touch()
    assert train_loop_per_worker(assignment.to_dict()) == {"stopped": True}
    assert len(session.checkpoints) == 1
    TrialPaths(assignment.folder).stop.unlink()
    monkeypatch.setattr(worker, "RaySession", lambda *_: MemorySession(tmp_path / "next", session.checkpoints[0]))
    assert train_loop_per_worker(assignment.to_dict())["final"]
    assert (
        "training resumes after 0 epochs and 2 of 4 steps of stage 'gate'"
        in TrialPaths(assignment.folder).log.read_text()
    )


def test_no_checkpoint_is_written_before_it_is_time(finished: Any) -> None:
    _, session, _ = finished  # of less than checkpoint_every_s: one per epoch, and the end
    assert len(session.checkpoints) == 5


def test_best_checkpoint_is_one_of_whole_epochs_after_the_cut(saved_midway: Any) -> None:
    _, session, _ = saved_midway
    saved = [Checkpoint.load(path, torch.device("cpu")) for path in session.checkpoints]
    judged = [checkpoint for checkpoint in saved if checkpoint.score != NOT_JUDGED]
    assert [(checkpoint.stage, checkpoint.epochs_done) for checkpoint in judged] == [("finetune", 1), ("finetune", 2)]
    assert [checkpoint.score for checkpoint in judged] == [row["top1"] for row in session.reports[5:8:2]]


def test_trial_that_is_done_answers_at_once(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment, session, metrics = finished
    monkeypatch.setattr(worker, "TrialStages", None)
    continued = MemorySession(tmp_path, start_from=session.checkpoints[-1])
    assert run_assignment(assignment, continued) == metrics
    assert continued.reports == []


def test_same_seed_gives_the_same_numbers_another_seed_others(finished: Any, tmp_path: Path) -> None:
    assignment, session, _ = finished

    def reports(name: str, config: TrialConfig) -> list[dict[str, Any]]:
        folder, weights = tmp_path / name, assignment.base_weights
        again = MemorySession(folder)
        run_assignment(Assignment.of(config, name=name, folder=folder, base_weights=weights), again)
        return [timeless(row) for row in again.reports]

    assert reports("same", TINY) == [timeless(row) for row in session.reports]
    assert reports("other", tiny(seed=1)) != [timeless(row) for row in session.reports]


@pytest.mark.parametrize("values", [{}, {"finetuning__ema_decay": 0.9}], ids=["as trained", "averaged"])
def test_batchnorm_is_estimated_anew_before_anything_is_judged(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[nn.Module] = []
    for module in (epochs, stages):
        monkeypatch.setattr(
            module, "evaluate", lambda network, *rest: judged.append(network) or evaluate(network, *rest)
        )
    config = tiny(**values)
    run_assignment(assign(tmp_path, config), MemorySession(tmp_path))
    train = datasets.load(config.data, config.seed).train
    for network in (judged[0], judged[-1]):  # right after the first epoch under gates, and at the end
        again = copy.deepcopy(network)
        gator.reestimate_batchnorm(again, calibration_batches(train, config, torch.device("cpu")))
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_averaged_weights_are_judged_saved_and_continued(tmp_path: Path) -> None:
    config = tiny(finetuning__ema_decay=0.9)
    assignment, session = assign(tmp_path, config), MemorySession(tmp_path)
    metrics = run_assignment(assignment, session)
    tensors = Checkpoint.load(session.checkpoints[-2], torch.device("cpu")).tensors
    saved = load_file(assignment.folder / "weights.safetensors")
    assert torch.equal(saved["fc.weight"], tensors["averaged"]["module.fc.weight"])
    assert not torch.equal(saved["fc.weight"], tensors["network"]["fc.weight"])
    continued = MemorySession(tmp_path / "continued", start_from=session.checkpoints[2])
    assert timeless(run_assignment(assignment, continued)) == timeless(metrics)


def test_teacher_is_the_unpruned_network_as_it_was_before_gating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Distillation] = []
    made = Distillation

    def note(**arguments: Any) -> Distillation:
        teachers.append(made(**arguments))
        return teachers[-1]

    monkeypatch.setattr(stages, "Distillation", note)
    config = tiny(finetuning__distillation__weight=0.5, finetuning__distillation__temperature=2.0)
    assignment = assign(tmp_path, config)
    run_assignment(assignment, MemorySession(tmp_path))
    (teacher,) = teachers
    assert (teacher.weight, teacher.temperature, teacher.teacher.training) == (0.5, 2.0, False)
    assert assignment.base_weights is not None
    base = load_file(assignment.base_weights)
    assert all(torch.equal(tensor, base[name]) for name, tensor in teacher.teacher.state_dict().items())


@pytest.fixture(scope="module")
def recut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Assignment, MemorySession, dict[str, Any]]:
    """A trial whose network is cut after each epoch under gates."""
    folder = tmp_path_factory.mktemp("recut")
    assignment, session = assign(folder, RECUT), MemorySession(folder)
    return assignment, session, run_assignment(assignment, session)


RECUT = tiny(gating__recut_every=1, gating__epochs=4, gating__init_keep_prob=0.9, model__kwargs={"width": 8})


def test_recut_trial_trains_a_smaller_network_to_the_same_end(recut: Any, tmp_path: Path) -> None:
    assignment, session, metrics = recut
    widths = [
        len(Checkpoint.load(path, torch.device("cpu")).tensors["network"]["gates.logits_C"])
        for path in session.checkpoints[:4]
    ]
    assert widths[0] > widths[-1]
    whole = with_values(RECUT, {"gating.recut_every": None})
    without = run_assignment(
        replace(assign(tmp_path, whole), base_weights=assignment.base_weights), MemorySession(tmp_path)
    )
    assert metrics["macs"] == without["macs"]
    assert metrics["loss"] == pytest.approx(
        without["loss"], rel=1e-2
    )  # float32, summed in another order, over 28 steps


@pytest.mark.parametrize("num_reported", [2, 3, 4], ids="after report {}".format)
def test_recut_trial_goes_on_from_a_checkpoint(recut: Any, tmp_path: Path, num_reported: int) -> None:
    assignment, session, metrics = recut
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    continued = MemorySession(tmp_path, start_from=session.checkpoints[num_reported - 1])
    assert timeless(run_assignment(replace(assignment, folder=folder), continued)) == timeless(metrics)
    assert (folder / "gates.safetensors").read_bytes() == (assignment.folder / "gates.safetensors").read_bytes()


def test_small_channels_start_nearer_to_closing(tmp_path: Path) -> None:
    config = tiny(gating__magnitude_spread=4.0, gating__lr=1e-6, gating__epochs=1, gating__target_ratio=1.0)
    assignment = assign(tmp_path, config)
    run_assignment(assignment, MemorySession(tmp_path))
    network = models.build(config.model)
    network.load_state_dict(load_file(assignment.base_weights))
    graph = gator.trace(network.eval(), torch.zeros(1, 3, 8, 8))
    gates = gator.GatedModel(network, graph, gator.GateConfig(magnitude_spread=4.0)).gates
    logits_C = load_file(assignment.folder / "gates.safetensors")["logits"]
    assert torch.allclose(logits_C, gates.logits_C, atol=1e-3)  # lr 1e-6 leaves them where they started
    assert logits_C.std() > 0.1


def test_widths_are_aligned_at_the_cut(tmp_path: Path) -> None:
    assignment = assign(tmp_path, tiny(pruning__round_to=8, model__kwargs={"width": 16}, gating__target_ratio=0.4))
    session = MemorySession(tmp_path)
    metrics = run_assignment(assignment, session)
    widths = gator.Architecture.load(TrialPaths(assignment.folder).architecture).widths
    assert all(width % 8 == 0 for width in widths.values())
    assert 0 < metrics["macs_ratio"] <= 0.4 * 1.005
    assert session.reports[1]["open_channels"] != metrics["open_channels"]  # before the cut they were not aligned


def test_trial_goes_on_from_a_finished_one(finished: Any, tmp_path: Path) -> None:
    assignment, _, metrics = finished
    config = tiny(gating__start_from=str(assignment.folder), gating__target_ratio=0.3, gating__lr=1e-6)
    session = MemorySession(tmp_path)
    child = replace(assign(tmp_path, config), base_weights=assignment.base_weights)
    outcome = run_assignment(child, session)
    parent, kept = (gator.Architecture.load(TrialPaths(a.folder).architecture).keep for a in (assignment, child))
    assert all(set(kept[name]) <= set(parent[name]) for name in parent)
    assert session.reports[0]["macs_ratio"] == metrics["macs_ratio"]  # of the unpruned network: nothing has closed yet
    assert outcome["macs_ratio"] < metrics["macs_ratio"]


def test_trial_goes_on_from_a_cut(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    parent = replace(assign(tmp_path / "parent", tiny(finetuning__epochs=1)), keeps_cut=True)
    outcome = run_assignment(parent, MemorySession(tmp_path / "parent"))
    cut = TrialPaths(parent.folder).cut
    # hardly any lr: what it reports after its first epoch is what it starts from; the second ends at the target
    config = tiny(gating__start_from=str(cut.root), gating__target_ratio=0.3, gating__lr=1e-9)
    (tmp_path / "child").mkdir()
    child = replace(assign(tmp_path / "child", config), base_weights=parent.base_weights)
    session = MemorySession(tmp_path / "child")
    run_assignment(child, session)
    rows = read_metrics(TrialPaths(parent.folder).metrics)
    as_cut, fine_tuned = (next(row for row in rows[::-1] if row["stage"] == stage) for stage in ("gate", "finetune"))
    assert session.reports[0]["macs_ratio"] == outcome["macs_ratio"]
    assert session.reports[0]["architecture"] == outcome["architecture"]
    assert session.reports[0]["top1"] == as_cut["top1"] != fine_tuned["top1"]
    cut.gates.unlink()
    with pytest.raises(ConfigError, match=r"gating.start_from: .*/cut has no gates.safetensors"):
        run_assignment(child, MemorySession(tmp_path / "child_again"))


def test_trial_of_another_network_is_no_start(finished: Any, tmp_path: Path) -> None:
    assignment, _, _ = finished
    config = tiny(gating__start_from=str(assignment.folder), model__kwargs={"width": 5})
    with pytest.raises(
        ConfigError, match=r"gating.start_from: .* does not hold a trial of this network: .*fingerprint"
    ):
        run_assignment(assign(tmp_path, config), MemorySession(tmp_path))


def test_base_network_is_trained_and_saved(tmp_path: Path) -> None:
    assignment = Assignment.of(tiny(pretraining__epochs=3), name="base", folder=tmp_path, base_weights=None)
    session = MemorySession(tmp_path)
    metrics = run_assignment(assignment, session)
    assert [row["stage"] for row in session.reports] == ["pretrain"] * 3
    assert metrics["top1"] > 60  # four classes: chance is 25
    network = models.build(TINY.model.model_copy(update={"weights": str(tmp_path / "weights.safetensors")}))
    validation = datasets.load(TINY.data, TINY.seed).validation
    assert evaluate(network, validation, TINY, Ranks())["top1"] == metrics["top1"]


def test_latency_is_estimated_when_the_architecture_has_changed_and_measured_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated: list[tuple[int, int]] = []
    measured: list[tuple[int, int, int]] = []

    class LatencySource:
        def estimate(self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int) -> Latency:
            estimated.append((sum(architecture.widths.values()), batch_size))
            return Latency(median_ms=2.0, p10_ms=1.9, p90_ms=2.1)

        def measure(
            self, network: nn.Module, architecture: gator.Architecture, *, batch_size: int, num_repeats: int
        ) -> Latency:
            measured.append((sum(architecture.widths.values()), batch_size, num_repeats))
            return Latency(median_ms=1.0, p10_ms=1.0, p90_ms=1.0, device="none")

    monkeypatch.setattr(stages, "make_source", lambda *args: LatencySource())
    session = MemorySession(tmp_path)
    metrics = run_assignment(assign(tmp_path, tiny(profile__num_repeats=50)), session)
    widths = [row["open_channels"] for row in session.reports]
    assert estimated == [(width, 1) for width in dict.fromkeys(widths)]
    assert measured == [(widths[-1], 1, 50), (widths[-1], 4, 50)]
    spread = {(row["latency_ms"], row["latency_p10_ms"], row["latency_p90_ms"]) for row in session.reports[:-1]}
    assert spread == {(2.0, 1.9, 2.1)}  # by which the scheduler tells what counts as equal
    assert metrics["latency_ms"] == 1.0


def test_lost_loss_ends_the_trial_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = MemorySession(tmp_path)
    monkeypatch.setattr(worker, "RaySession", lambda *_: session)
    assignment = assign(tmp_path, tiny(finetuning__lr=1e30))
    outcome = train_loop_per_worker(assignment.to_dict())
    assert outcome["error"].startswith("trial_0000: the loss is ")
    assert "of stage 'finetune', expected finite numbers; lower finetuning.lr (now 1e+30)" in outcome["error"]
    assert outcome["is_user_error"] is False
    assert outcome["error"].removeprefix("trial_0000: ") in (assignment.folder / "log.txt").read_text()
    last = Checkpoint.load(session.checkpoints[-1], torch.device("cpu"))
    assert (last.stage, last.epochs_done) == ("gate", 2)
    assert all(tensor.isfinite().all() for tensor in last.tensors["network"].values())


def test_weights_that_the_last_step_lost_end_the_trial_too(tmp_path: Path) -> None:
    session = MemorySession(tmp_path)
    one_step = tiny(data__global_batch_size=128, finetuning__epochs=1, finetuning__lr=1e38)
    with pytest.raises(
        LossNotFiniteError, match="weights are not finite after epoch 1, step 1 of 1, of stage 'finetune'"
    ):
        run_assignment(assign(tmp_path, one_step), session)
    last = Checkpoint.load(session.checkpoints[-1], torch.device("cpu"))
    assert (last.stage, last.epochs_done) == ("gate", 2)
    assert not (tmp_path / "trial" / "weights.safetensors").exists()


def test_ranks_whose_gates_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "all_agree", lambda ranks, text: False)
    with pytest.raises(TrialError, match="the gates of the 1 workers differ, expected the same after every step"):
        run_assignment(assign(tmp_path), MemorySession(tmp_path))


def test_a_target_that_was_missed_is_told_with_the_cheapest_channel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gating_stage, "TARGET_TOLERANCE", 1e-6)  # no network of 28 channels comes so near
    run_assignment(assign(tmp_path), MemorySession(tmp_path))
    (told,) = [record.getMessage() for record in caplog.records if "gating ended at" in record.getMessage()]
    assert re.search(
        r"ended at 0\.\d+ of the full cost \(target 0\.5\); the cheapest channel left would save 0\.\d+",
        told,
    )


def test_a_stage_that_starts_below_its_target_is_refused(tmp_path: Path) -> None:
    run_assignment(assign(tmp_path), MemorySession(tmp_path))
    (tmp_path / "second").mkdir()
    second = assign(tmp_path / "second", tiny(gating__start_from=str(tmp_path / "trial"), gating__target_ratio=0.9))
    with pytest.raises(ConfigError, match=r"trial is at 0\.\d+ of the full cost already, below the target 0\.9"):
        run_assignment(second, MemorySession(tmp_path / "second"))


def test_target_that_cannot_be_reached_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "RaySession", lambda *_: MemorySession(tmp_path))
    outcome = train_loop_per_worker(assign(tmp_path, tiny(gating__target_ratio=1e-6)).to_dict())
    assert "raise the target" in outcome["error"]


def test_wrong_cut_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune = gator.GatedModel.prune

    def lose_the_bias(gated: gator.GatedModel) -> nn.Module:
        pruned = prune(gated)
        with torch.no_grad():
            pruned.fc.bias += 1.0
        return pruned

    monkeypatch.setattr(gator.GatedModel, "prune", lose_the_bias)
    with pytest.raises(TrialError, match="the logits of the pruned network and the gated one differ by"):
        run_assignment(assign(tmp_path), MemorySession(tmp_path))


def test_uncounted_layer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms_of = gator.MacsCost.terms_of
    monkeypatch.setattr(gator.MacsCost, "terms_of", lambda self, widths: terms_of(self, widths) - 10)
    with pytest.raises(TrialError, match=r"runs \d+ MACs, MacsCost and AttentionCost say \d+: '"):
        run_assignment(assign(tmp_path), MemorySession(tmp_path))


def test_another_number_of_workers_is_refused_and_loses_nothing(finished: Any, tmp_path: Path) -> None:
    assignment, session, metrics = finished
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    continued = MemorySession(tmp_path, start_from=session.checkpoints[1])
    continued.ranks = Ranks(rank=1, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "sum", lambda self, tensor: 2 * tensor)  # the other rank sees the folder too
        with pytest.raises(
            ClusterError, match=r"trained by 1 workers, now there are 2; set the cluster's workers_per_trial"
        ):
            run_assignment(replace(assignment, folder=folder), continued)
    continued.ranks = Ranks()
    assert timeless(run_assignment(replace(assignment, folder=folder), continued)) == timeless(metrics)


def test_another_number_of_workers_goes_on_where_it_may(finished: Any, tmp_path: Path) -> None:
    assignment, session, _ = finished
    folder = tmp_path / "trial"
    shutil.copytree(assignment.folder, folder)
    checkpoint = Checkpoint.load(session.checkpoints[1], torch.device("cpu"))
    replace(checkpoint, world_size=3).save(session.checkpoints[1])
    continued = MemorySession(tmp_path, start_from=session.checkpoints[1])
    metrics = run_assignment(replace(assignment, folder=folder, is_elastic=True), continued)
    checkpoint.save(session.checkpoints[1])
    assert [row["epoch"] for row in continued.reports] == [3, 4, 4]
    assert metrics["final"]
    assert "training resumes after 2 epochs of stage 'gate'" in TrialPaths(folder).log.read_text()


def test_training_is_saved_once_when_a_node_is_told_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STEPS_BETWEEN_CHECKS", 1)
    monkeypatch.setattr(saver, "NOTICE_EVERY_S", 0.0)
    assignment, session = assign(tmp_path), MemorySession(tmp_path)
    session.leaving = ("node-7",)
    run_assignment(assignment, session)
    saved = [Checkpoint.load(path, torch.device("cpu")) for path in session.checkpoints]
    assert [checkpoint.tensors["loader"]["step"] for checkpoint in saved[:2]] == [1, 4]  # the notice, then the epoch
    assert len(saved) == 6
    assert (
        "the training is saved now because these nodes leave: node-7" in TrialPaths(assignment.folder).log.read_text()
    )


def test_saving_waits_for_a_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "POLL_S", 0.01)
    marker = tmp_path / "config.json"
    session = MemorySession(tmp_path / "kept")
    threading.Timer(0.2, marker.touch).start()
    saving = saver.Saver(session, every_s=600, stop_file=tmp_path / ".stop", marker=marker)
    saving.save({}, Checkpoint(stage="done", epochs_done=0, world_size=1))
    assert marker.exists()
    assert len(session.checkpoints) == 1


def test_another_number_of_workers_is_refused_before_a_search_goes_on(tmp_path: Path) -> None:
    checkpoints = (("trial_0000", "finetune"), ("trial_0000", "done"), ("trial_0001", "gate"))
    for number, (name, stage) in enumerate(checkpoints):
        folder = tmp_path / name / f"checkpoint_{number}"
        folder.mkdir(parents=True)
        Checkpoint(stage=stage, epochs_done=2, world_size=4).save(folder)  # type: ignore[arg-type]
    TrainRuns(tmp_path).check_world_size(4)
    with pytest.raises(
        ClusterError, match=r"trial_0001 is in epoch 2 of stage 'gate', trained by 4 workers.*now gives 2"
    ):
        TrainRuns(tmp_path).check_world_size(2)


def test_storage_that_workers_do_not_see_is_refused(tmp_path: Path) -> None:
    assignment = replace(assign(tmp_path), folder=tmp_path / "elsewhere")
    with pytest.raises(ClusterError, match=r"only 0 of 1 workers see it; the cluster's storage must be a folder"):
        run_assignment(assignment, MemorySession(tmp_path))


def test_workers_that_start_again_before_the_first_checkpoint_wait_for_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "STORAGE_TIMEOUT_S", 0.02)
    monkeypatch.setattr(paths, "POLL_S", 0.01)
    assignment = replace(assign(tmp_path), folder=tmp_path / "away", is_again=True)
    with pytest.raises(StorageError, match=r"away/config.json was not reachable"):
        run_assignment(assignment, MemorySession(tmp_path))


def test_error_of_one_node_is_raised_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "RaySession", lambda *_: MemorySession(tmp_path))
    monkeypatch.setattr(worker.socket, "gethostname", lambda: "node-7")
    data = {"name": "parquet", "train": str(tmp_path / "none"), "test": str(tmp_path / "none")}
    assignment = assign(tmp_path, tiny(data={**TINY.data.model_dump(), **data}))
    with pytest.raises(DataError, match=r"^trial_0000 on node-7: .*none/manifest.json is missing"):
        train_loop_per_worker(assignment.to_dict())


@pytest.mark.parametrize("num_classes", [3, 50])
def test_outputs_that_are_not_the_classes_are_refused_by_the_workers(tmp_path: Path, num_classes: int) -> None:
    """The set synthetic has 4 classes; a plan does not see those of an address."""
    assignment = assign(tmp_path, tiny(model__num_classes=num_classes))
    with pytest.raises(ConfigError, match=rf"model\.num_classes: found {num_classes}, expected 4, .* of synthetic"):
        run_assignment(assignment, MemorySession(tmp_path))


def test_log_has_the_traceback_of_an_error_that_is_not_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = assign(tmp_path)
    monkeypatch.setattr(worker, "load", lambda data, seed: [][seed])
    with pytest.raises(IndexError):
        run_assignment(assignment, MemorySession(tmp_path))
    log = TrialPaths(assignment.folder).log.read_text()
    assert "Traceback (most recent call last)" in log
    assert "IndexError: list index out of range" in log


def test_assignment_goes_through_plain_json(tmp_path: Path) -> None:
    assignment = assign(tmp_path)
    assert Assignment.from_dict(json.loads(json.dumps(assignment.to_dict()))) == assignment
    base = replace(assignment, base_weights=None, is_again=True, is_elastic=True)
    assert Assignment.from_dict(base.to_dict()) == base


def test_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        stage="gate", epochs_done=1, world_size=1, metrics={"top1": 0.5}, tensors={"w": torch.ones(2)}
    )
    checkpoint.save(tmp_path)
    read = Checkpoint.load(tmp_path, torch.device("cpu"))
    assert (read.stage, read.epochs_done, read.metrics) == ("gate", 1, {"top1": 0.5})
    assert torch.equal(read.tensors["w"], torch.ones(2))
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace(f'"version": {VERSION}', '"version": 99'))
    with pytest.raises(TrialError, match=f"is a checkpoint of version 99, expected {VERSION}"):
        Checkpoint.load(tmp_path, torch.device("cpu"))
