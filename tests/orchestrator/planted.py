"""A run directory with known results, for the tests of what reads one."""

from typing import Any

from gator.graph.architecture import Architecture
from gator.graph.selection import Selection
from orchestrator.config.search import SearchConfig
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import append_result, write_metrics

EPOCH_MS = 1_700_000_000_000
FULL_WIDTHS = {"conv1": 16, "layer1.0.conv1": 8}


def search_config(**changes: Any) -> SearchConfig:
    values: dict[str, Any] = {
        "name": "planted",
        "base": {
            "model": {"name": "resnet20_cifar", "num_classes": 10},
            "data": {"name": "digits", "image_size": 32, "global_batch_size": 64, "validation_share": 0.1},
            "pretraining": {"epochs": 1, "lr": 0.1},
            "gating": {"epochs": 2, "lr": 0.1, "loss_weight": 1.0},
            "finetuning": {"epochs": 1, "lr": 0.01},
        },
        "params": {"gating.loss_weight": {"type": "float", "low": 0.1, "high": 4.0, "log": True}},
        "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
        "constraints": [{"metric": "macs_ratio", "max": 0.5}],
        "search": {"algorithm": "random", "num_trials": 4, "max_concurrent": 2, "seed": 0},
        "scheduler": {"type": "pareto_asha", "grace_epochs": 1, "reduction_factor": 3},
    }
    return SearchConfig.model_validate(values | changes)


def tiny_base(gating: int = 2, finetuning: int = 1, **more: Any) -> dict[str, Any]:
    """Return the base of a search that trains nothing, or hardly anything: how many epochs its stages have."""
    return {
        "model": {"name": "resnet8_cifar", "num_classes": 4},
        "data": {"name": "synthetic", "image_size": 8, "global_batch_size": 8},
        "pretraining": {"epochs": 1, "lr": 0.1},
        "gating": {"epochs": gating, "lr": 0.1, "loss_weight": 1.0},
        "finetuning": {"epochs": finetuning, "lr": 0.1},
        **more,
    }


def unpruned() -> dict[str, Any]:
    return _network("unpruned", top1=98.0, latency_ms=4.0, macs_ratio=1.0) | {"kind": "unpruned"}


def finished(number: int, top1: float, latency_ms: float, macs_ratio: float = 0.4) -> dict[str, Any]:
    return _network(f"trial_{number:04d}", top1, latency_ms, macs_ratio) | {"gating.loss_weight": 0.5 + number}


def stopped(number: int, epoch: int) -> dict[str, Any]:
    return _trial(number, "stopped") | {"stopped_epoch": epoch}


def failed(number: int) -> dict[str, Any]:
    return _trial(number, "failed")


def all_rows() -> list[dict[str, Any]]:
    """Two on the front, one dominated, one too large, one stopped, one failed."""
    return [
        unpruned(),
        finished(0, 97.0, 2.0),
        finished(1, 90.0, 1.0, macs_ratio=0.25),
        finished(2, 89.0, 1.5),
        finished(3, 97.9, 3.0, macs_ratio=0.75),
        stopped(4, epoch=2),
        failed(5),
    ]


def epochs(num: int) -> list[dict[str, Any]]:
    """Metrics as a worker writes them: the first two epochs gate."""
    return [
        {
            "epoch": epoch, "stage": "gate" if epoch <= 2 else "finetune", "timestamp_ms": EPOCH_MS + 1000 * epoch,
            "loss": 1.0 / epoch, "top1": 80.0 + epoch, "top5": 99.0, "latency_ms": 3.0, "macs": 1000, "macs_ratio": 0.5,
            "params": 500, "open_channels": 24, "loss_weight": 1.0, "train_s": 2.0, "eval_s": 0.5, "measure_s": 0.25,
            "final": False,
        }
        for epoch in range(1, num + 1)
    ]  # fmt: skip


def plant(run: RunPaths, config: SearchConfig, rows: list[dict[str, Any]]) -> None:
    """Write the files of a search that ended with these rows."""
    write_atomic(run.config, config.model_dump_json())
    for row in rows:
        plant_trial(run, config, row)
        append_result(run.results, row)


def plant_trial(run: RunPaths, config: SearchConfig, row: dict[str, Any]) -> None:
    """Write the files of a trial. A network with a quarter of the MACs has lost its block layer1.0."""
    paths = run.trial(row["trial_id"])
    write_atomic(paths.config, config.base.model_dump_json())
    write_metrics(paths.metrics, epochs(3))
    if row["status"] == "finished":
        inner = range(0 if row["macs_ratio"] <= 0.25 else 4)
        _architecture({"conv1": tuple(range(6)), "layer1.0.conv1": tuple(inner)}).save(paths.architecture)


def _architecture(keep: dict[str, tuple[int, ...]]) -> Architecture:
    return Architecture(
        keep=keep,
        num_channels=FULL_WIDTHS,
        removed_blocks=() if keep["layer1.0.conv1"] else ("layer1.0",),
        model="Planted",
        input_shapes=((2, 3, 32, 32),),
        input_dtypes=("float32",),
        fingerprint="planted",
        selection=Selection(),
        full_macs=1000,
    )


def _network(trial_id: str, top1: float, latency_ms: float, macs_ratio: float) -> dict[str, Any]:
    return {
        "trial_id": trial_id, "kind": "trial", "status": "finished", "top1": top1, "top5": 99.0,
        "latency_ms": latency_ms, "latency_p10_ms": latency_ms - 0.1, "latency_p90_ms": latency_ms + 0.1,
        "latency_device": "a test CPU", "macs": round(1000 * macs_ratio), "macs_ratio": macs_ratio,
        "params": round(500 * macs_ratio), "train_s": 6.0, "eval_s": 1.5, "measure_s": 0.75,
    }  # fmt: skip


def _trial(number: int, status: str) -> dict[str, Any]:
    return {"trial_id": f"trial_{number:04d}", "kind": "trial", "status": status, "gating.loss_weight": 0.5 + number}
