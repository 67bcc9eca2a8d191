import contextlib
import errno
import fcntl
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from safetensors.torch import save_file

import gator
from gator.pruning.weights import load_weights
from orchestrator.cluster.connection import connect
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import UNPRUNED
from orchestrator.errors import DataError, OutOfMemoryError, RunDirError, StorageError, TrialError
from orchestrator.latency.curve import Curve
from orchestrator.models import networks as models_networks
from orchestrator.models import saved as base_saved
from orchestrator.models import saved as models_saved
from orchestrator.planning.plan import SearchPlan
from orchestrator.planning.space import load_space
from orchestrator.storage.files import LEFTOVER_PREFIX, write_atomic
from orchestrator.storage.paths import CHECKPOINTS, TRAIN_RECORD, StoragePaths, TrialPaths
from orchestrator.storage.records import NewEpochs, read_metrics, write_metrics
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.trial import base_network as base_base_network
from orchestrator.trial import train_run as trial
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.base_network import ensure_base
from orchestrator.trial.fixed_networks import measure_fixed
from orchestrator.tuning.trainable import request_of, run_trial, train_trial
from orchestrator.tuning.tuner import driver_resources
from tests.orchestrator.planted import search_config
from tests.orchestrator.tiny_trial import TINY, tiny

CLUSTER = ClusterConfig()


def request_for(
    folder: Path, config: Any = TINY, base_weights: Path = Path("base/weights.safetensors")
) -> dict[str, Any]:
    storage = StoragePaths(folder)
    plan = SearchPlan(config=search_config(), cluster=CLUSTER, storage=storage, run=storage.run("run"))
    write_atomic(plan.run.config, plan.config.to_json())
    return request_of(plan, "trial_0007", config, base_weights)


def test_request_is_plain_json_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = json.loads(json.dumps(request_for(Path("here"))))
    assignment = Assignment.from_dict(request["assignment"])
    assert assignment.folder == tmp_path / "here" / "run" / "trials" / "trial_0007"
    assert assignment.base_weights == tmp_path / "base" / "weights.safetensors"
    assert assignment.config == TINY
    assert ClusterConfig.model_validate_json(request["cluster"]) == CLUSTER


def test_given_weights_become_the_base_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_base_network, "fit_here", None)
    storage = StoragePaths(tmp_path)
    first = ensure_base(tiny(pretraining__epochs=1), _holding(storage, tiny(pretraining__epochs=1)), CLUSTER)
    config = tiny(model__weights=str(first), pretraining__epochs=0)
    weights = ensure_base(config, storage, CLUSTER)
    assert weights == storage.base(config.base_hash()).weights
    assert weights != first
    assert weights.read_bytes() == first.read_bytes()


def test_weights_of_the_same_name_in_another_folder_are_another_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "space.yaml").write_text(
        """
        name: space
        base:
          model:      {name: resnet8_cifar, num_classes: 4, kwargs: {width: 4}, weights: net.safetensors}
          data:       {name: synthetic, image_size: 8, global_batch_size: 32}
          gating:     {epochs: 1, lr: 0.1, target_ratio: 0.5}
          finetuning: {epochs: 1, lr: 0.1}
        objectives: [{metric: top1, mode: max}]
        """
    )
    for name in ("alice", "bob", "alice"):  # the third time with other weights under the first name
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        network = models_networks.build_untrained(TINY.model)
        save_file(network.state_dict(), "net.safetensors")
        weights = ensure_base(load_space("../space.yaml").base, StoragePaths(tmp_path), CLUSTER)
        found, _ = load_weights(weights)
        assert torch.equal(found["conv1.weight"], network.state_dict()["conv1.weight"])


def _holding(storage: StoragePaths, config: Any) -> StoragePaths:
    """Put a base network with random weights into the storage."""
    torch.manual_seed(0)
    base_saved.save_base(models_networks.build(config.model), storage.base(config.base_hash()))
    return storage


def test_base_is_trained_once_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def fit(assignment: Any, cluster: ClusterConfig, train_folder: Path) -> dict[str, float]:
        trained.append(assignment.config.base_hash())
        _holding(StoragePaths(tmp_path), assignment.config)
        return {"top1": 90.0}

    monkeypatch.setattr(base_base_network, "fit_here", fit)
    first = ensure_base(TINY, StoragePaths(tmp_path), CLUSTER)
    assert ensure_base(tiny(gating__lr=0.3), StoragePaths(tmp_path), CLUSTER) == first  # gating does not touch the base
    assert ensure_base(tiny(seed=3), StoragePaths(tmp_path), CLUSTER) != first
    assert trained == [TINY.base_hash(), tiny(seed=3).base_hash()]
    record = json.loads((first.parent / "base.json").read_text())
    assert record["metrics"] == {"top1": 90.0}
    assert record["config"]["model"]["name"] == TINY.model.name


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[:-9], lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])],
    ids=["empty", "cut", "a bit flipped"],
)
def test_a_damaged_base_is_made_again(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base_base_network, "fit_here", lambda *_: _holding(StoragePaths(tmp_path), TINY) and {})
    weights = ensure_base(TINY, StoragePaths(tmp_path), CLUSTER)
    whole = weights.read_bytes()
    weights.write_bytes(damage(whole))
    (weights.parent / f"{LEFTOVER_PREFIX}weights").touch()
    with caplog.at_level("WARNING"):
        assert ensure_base(TINY, StoragePaths(tmp_path), CLUSTER).read_bytes() == whole
    assert f"the base network is made again: {weights}" in caplog.text
    assert sorted(path.name for path in weights.parent.iterdir()) == [
        ".lock",
        "base.json",
        "config.json",
        "weights.safetensors",
    ]


def test_a_base_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    weights = _holding(StoragePaths(tmp_path), TINY).base(TINY.base_hash()).weights
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match=r"weights\.safetensors is a link"):
        ensure_base(TINY, StoragePaths(tmp_path), CLUSTER)


def test_the_base_of_another_network_is_refused(tmp_path: Path) -> None:
    other = _holding(StoragePaths(tmp_path), TINY).base(TINY.base_hash()).weights
    network = models_networks.build(TINY.model.model_copy(update={"kwargs": {"width": 5}}))
    with pytest.raises(DataError, match=r"holds another network, .* of another shape.*delete it"):
        models_saved.load_base(network, other)


def test_second_search_waits_for_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StoragePaths(tmp_path).base(TINY.base_hash()).root
    folder.mkdir(parents=True)
    monkeypatch.setattr(base_base_network, "fit_here", None)  # the one that waits must not train
    found: list[Path] = []
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(ensure_base(TINY, StoragePaths(tmp_path), CLUSTER)))
        other.start()
        other.join(timeout=0.2)
        assert found == []
        _holding(StoragePaths(tmp_path), TINY)
    other.join(timeout=10)
    assert found == [folder / "weights.safetensors"]


def test_unpruned_row_is_the_full_network(tmp_path: Path) -> None:
    config = tiny(profile__batch_sizes=(2,))
    _holding(StoragePaths(tmp_path), config)
    weights, curve = StoragePaths(tmp_path).base(config.base_hash()).weights, tmp_path / "latency_curve.json"
    row = measure_fixed(UNPRUNED, config.model, config, CLUSTER, base_weights=weights, curve_file=curve)
    assert not curve.exists()
    network = models_networks.build(config.model)
    macs = gator.MacsCost(gator.trace(network, torch.randn(2, 3, 8, 8))).full
    assert (row["trial_id"], row["kind"], row["status"]) == ("unpruned", "unpruned", "finished")
    assert (row["macs"], row["macs_ratio"], row["latency_ms"]) == (macs, 1.0, 2 * macs / 1e7)
    assert row["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert 0 < row["top1"] < row["top5"] == 100  # four classes


def test_every_epoch_is_told_once_also_those_of_a_driver_that_died(tmp_path: Path) -> None:
    path = tmp_path / "metrics.parquet"
    rows = [
        {"epoch": epoch, "stage": "gate", "timestamp_ms": 10 * epoch, "top1": 50.0, "final": False}
        for epoch in range(1, 5)
    ]
    assert NewEpochs(path).read() == []
    write_metrics(path, rows[:2])
    epochs = NewEpochs(path)
    assert [row["epoch"] for row in epochs.read()] == [1, 2]  # nobody knows whether the driver before told the second
    write_metrics(path, [rows[0], {**rows[1], "timestamp_ms": 25}, rows[2]])  # epoch 2 is run again
    assert [(row["epoch"], row["timestamp_ms"]) for row in epochs.read()] == [(2, 25), (3, 30)]
    write_metrics(path, [*rows, {**rows[3], "timestamp_ms": 41, "final": True}])
    assert epochs.read() == [rows[3]]  # without the columns that are null
    assert epochs.read() == []


def test_our_own_error_of_a_worker_is_passed_on() -> None:
    ours = DataError("the images are gone")
    error = WorkerGroupError("two workers failed", {1: ours, 0: ConnectionError("peer closed")})
    assert trial._first_cause(error, "trial_0007") is ours


def test_other_error_of_a_worker_is_told_with_the_trial() -> None:
    error = WorkerGroupError("a worker failed", {1: MemoryError("no memory"), 0: ConnectionError("peer closed")})
    cause = trial._first_cause(error, "trial_0007")
    assert type(cause) is TrialError
    assert str(cause) == "trial_0007: its workers failed 3 times, the last time by ConnectionError: peer closed"


def test_a_controller_that_fails_is_not_told_as_workers_that_failed_three_times() -> None:
    cause = trial._first_cause(ControllerError(RuntimeError("NCCL cannot start")), "trial_0007")
    assert "trial_0007: Ray Train could not run its workers: ControllerError:" in str(cause)
    assert "NCCL cannot start" in str(cause)


@pytest.mark.parametrize("is_told", [False, True], ids=["lost", "told what is wrong"])
def test_losses_are_counted_from_one_checkpoint_to_the_next(
    is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three losses without a new checkpoint end a training; any number of them does not while it gets on.

    A part of a checkpoint, which Ray Train leaves each time the disk is full, counts for nothing.
    """
    train_folder, num_fits = tmp_path / "train", 0
    assignment = Assignment.of(TINY, name="t", folder=tmp_path / "t", base_weights=tmp_path)

    def fit(trainer: object) -> None:
        nonlocal num_fits
        num_fits += 1
        folder = train_folder / "t" / f"checkpoint_{num_fits}"
        folder.mkdir(parents=True)
        if num_fits < 5:
            Checkpoint(stage="gate", epochs_done=num_fits, world_size=1).save(folder)
        raise WorkerGroupError("lost", {0: DataError("gone") if is_told else ConnectionError("peer closed")})

    monkeypatch.setattr(trial.DataParallelTrainer, "fit", fit)
    with pytest.raises(DataError if is_told else TrialError, match="gone" if is_told else "failed 3 times"):
        trial.fit(assignment, CLUSTER, train_folder)
    assert num_fits == (1 if is_told else 6)


FULL = OSError(errno.ENOSPC, "disk")


def ended(*causes: Exception) -> WorkerGroupError:
    """Return how Ray Train tells that the ranks ended with these."""
    return WorkerGroupError("ended", dict(enumerate(causes)))


@pytest.mark.parametrize(
    ("error", "expected", "num_tries"),
    [
        (ended(DataError("no such class")), DataError("no such class"), 1),
        (ended(StorageError("away")), StorageError("away"), 3),
        (ended(OutOfMemoryError("full")), OutOfMemoryError("full"), 3),
        (ended(OSError("peer")), TrialError("peer"), 3),
        (ended(FULL), StorageError("disk"), 3),
        (ended(RuntimeError("Connection closed by peer"), FULL), StorageError("disk"), 3),
        (ended(OutOfMemoryError("full"), FULL), StorageError("disk"), 3),
        (ControllerError(FULL), StorageError("disk"), 1),
    ],
    ids=["data", "storage", "memory", "peer", "disk", "disk of rank 1", "disk and memory", "disk of the controller"],
)
def test_only_what_may_pass_is_tried_again(
    error: TrainingFailedError, expected: Exception, num_tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment, given = Assignment.of(TINY, name="t", folder=tmp_path / "t", base_weights=tmp_path), []

    class Trainer:
        def __init__(self, work: Any, train_loop_config: dict[str, Any], **options: Any) -> None:
            given.append(train_loop_config["is_again"])

        def fit(self) -> None:
            raise error

    monkeypatch.setattr(trial, "DataParallelTrainer", Trainer)
    with pytest.raises(type(expected), match=str(expected)):
        trial.fit(assignment, CLUSTER, tmp_path / "train")
    assert given == [False, True, True][:num_tries]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    connect(CLUSTER)
    yield
    ray.shutdown()


def first_rank(log: Path) -> psutil.Process:
    """Return the process that keeps the trial's log open; titles of Ray's processes change with what they do."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                if str(log) in [file.path for file in process.open_files()]:
                    return process


def kill_a_worker_after_a_checkpoint(paths: TrialPaths, train_run: Path) -> None:
    """Wait until Ray Train names a checkpoint, which is up to half a second after it was written."""
    while not (train_run / TRAIN_RECORD).exists():
        time.sleep(0.02)
    first_rank(paths.log).kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trial_resumes_from_its_own_checkpoints_where_ray_cannot_read_its_record(
    local_ray: None, tmp_path: Path
) -> None:
    base_weights = ensure_base(TINY, StoragePaths(tmp_path), CLUSTER)
    request = request_for(tmp_path, TINY, base_weights)
    paths = StoragePaths(tmp_path).run("run").trial("trial_0007")
    train_run = Path(request["train_folder"]) / "trial_0007"
    metrics = train_trial(request)

    (train_run / TRAIN_RECORD).write_text('{"ray_version": "2.40.0", "checkpoint_results": []}')
    assert train_trial(request) == metrics
    assert (train_run / f"{TRAIN_RECORD}.unreadable").exists()

    shutil.rmtree(max(train_run.glob(f"{CHECKPOINTS}/state.json")).parent)  # the one that says "done"
    assert train_trial(request)["top1"] == metrics["top1"]
    told = paths.log.read_text()
    assert told.count(f"because Ray {ray.__version__} has no record of this run") == 2
    assert "training resumes after 2 epochs of stage 'finetune'" in told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trial_survives_the_death_of_a_worker_and_is_not_run_twice(local_ray: None, tmp_path: Path) -> None:
    config = tiny(gating__epochs=60, profile__clock="wall")
    base_weights = ensure_base(config, StoragePaths(tmp_path), CLUSTER)
    run = StoragePaths(tmp_path).run("run")
    unpruned = measure_fixed(
        UNPRUNED, config.model, config, CLUSTER, base_weights=base_weights, curve_file=run.latency_curve
    )
    curve = Curve.from_json(run.latency_curve.read_bytes())
    request = request_for(tmp_path, config, base_weights)
    paths = run.trial("trial_0007")

    killer = threading.Thread(
        target=kill_a_worker_after_a_checkpoint, args=(paths, run.ray / "train" / "trial_0007"), daemon=True
    )
    killer.start()
    metrics = train_trial(request)
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert "training resumes after" in paths.log.read_text()
    rows = read_metrics(paths.metrics)
    assert [row["epoch"] for row in rows] == [*range(1, 63), 62]
    assert metrics["final"]
    assert metrics["macs_ratio"] < 1
    assert metrics["latency_ms"] == curve.at(metrics["macs"], config.profile.batch_sizes[0])
    assert (metrics["latency_device"], unpruned["latency_device"] is None) == (None, False)  # one is an estimate
    kept = [json.loads(path.read_text()) for path in run.ray.glob("train/trial_0007/checkpoint_*/state.json")]
    # the last and the best, beside what the worker that was killed has not reported any more
    assert sorted(state["stage"] for state in kept if state["stage"] != "gate") == ["done", "finetune"]
    best = max(row["top1"] for row in rows if row["stage"] == "finetune" and not row["final"])
    assert max(state["score"] for state in kept) == best

    written = paths.weights.stat().st_mtime_ns
    assert train_trial(request) == metrics
    assert paths.weights.stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tune_gets_every_epoch_and_the_end_once(local_ray: None, tmp_path: Path) -> None:
    base_weights = ensure_base(TINY, StoragePaths(tmp_path), CLUSTER)
    received: list[dict[str, Any]] = []

    class Collect(ray.tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            received.append(result)

    tuner = ray.tune.Tuner(
        ray.tune.with_resources(run_trial, driver_resources()),
        param_space=request_for(tmp_path, base_weights=base_weights),
        run_config=ray.tune.RunConfig(storage_path=str(tmp_path / "tune"), callbacks=[Collect()], verbose=0),
    )
    assert tuner.fit().num_errors == 0
    assert [(row["epoch"], row["final"]) for row in received] == [
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (4, True),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lost_loss_fails_the_trial_without_a_second_try(local_ray: None, tmp_path: Path) -> None:
    config = tiny(finetuning__lr=1e30)
    request = request_for(tmp_path, config, ensure_base(config, StoragePaths(tmp_path), CLUSTER))
    with pytest.raises(
        TrialError, match=r"^trial_0007: the loss is (nan|inf) in epoch 1, step \d of 4, of stage 'fine"
    ):
        train_trial(request)
    assert StoragePaths(tmp_path).run("run").trial("trial_0007").log.read_text().count("the loss is") == 1
