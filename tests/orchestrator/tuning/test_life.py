"""Every scheduler with every searcher through one life: suggest, report, stop, complete, die anywhere, restore, go on identically."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.search import SearchConfig
from orchestrator.storage.records import append_result, read_results
from orchestrator.tuning.report_log import ReportLog
from orchestrator.tuning.schedulers import make_scheduler
from orchestrator.tuning.searchers import OptunaSearcher
from tests.orchestrator import planted
from tests.orchestrator.tuning.test_searchers import make_tune_config

NUM_TRIALS, NUM_EPOCHS = 8, 6


def config_of(scheduler: str, algorithm: str, num_trials: int = NUM_TRIALS) -> SearchConfig:
    """algorithm: as in the config, or "points" for TPE with two points first."""
    points = (
        [{"gating.loss_weight": 0.5}, {"gating.loss_weight": 2.0, "gating.lr": 0.1}] if algorithm == "points" else []
    )
    algorithm = "tpe" if algorithm == "points" else algorithm
    return SearchConfig.model_validate(
        {
            "name": "life",
            "base": planted.tiny_base(3, NUM_EPOCHS - 3),
            "params": {
                "gating.loss_weight": {"type": "float", "low": 0.1, "high": 4.0},
                "gating.lr": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
            },
            "objectives": [{"metric": "top1", "mode": "max"}, {"metric": "latency_ms", "mode": "min"}],
            "search": {"algorithm": algorithm, "num_trials": num_trials, "points_to_evaluate": points},
            "scheduler": {"type": scheduler, "grace_epochs": 1, "reduction_factor": 2},
        }
    )


class Search:
    """A search without Ray, trials one after another; what is on disk, and how far each trial is, outlives a process."""

    def __init__(self, config: SearchConfig, folder: Path) -> None:
        folder.mkdir()
        self.config = config
        self.folder = folder
        self.epochs_done: dict[str, int] = {}
        self.reported: list[tuple[str, int]] = []

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.folder / "results.parquet"
        return read_results(path) if path.exists() else []

    def live(self, num_reports: int = 1000) -> None:
        """Begin a process and run the search to its end, or until it dies after so many reports."""
        decisions = ReportLog(self.folder / "reports.jsonl")
        scheduler = make_scheduler(self.config, decisions)
        for told in decisions.read():
            scheduler.decide(told["trial_id"], told)
        searcher = OptunaSearcher(self.config, self.folder / "study.log", self.rows, make_tune_config)
        while searcher.num_left:
            suggestion = searcher.suggest("tune's id")
            trial_id, metrics = suggestion["trial_id"], {}
            for epoch in range(self.epochs_done.get(trial_id, 0) + 1, NUM_EPOCHS + 1):
                if num_reports == 0:
                    return
                num_reports -= 1
                metrics = _metrics(suggestion["params"], epoch)
                self.epochs_done[trial_id] = epoch
                self.reported.append((trial_id, epoch))
                if scheduler.take(trial_id, metrics) == "stop":
                    break
            row = {"trial_id": trial_id, "kind": "trial", "status": "finished", **suggestion["params"]}
            if trial_id in scheduler.stopped:
                row |= {"status": "stopped", "stopped_epoch": scheduler.stopped[trial_id]}
            else:
                row |= {name: _metrics(suggestion["params"], NUM_EPOCHS)[name] for name in ("top1", "latency_ms")}
            append_result(self.folder / "results.parquet", row)
            searcher.tell(row)


def _metrics(params: dict[str, Any], epoch: int) -> dict[str, Any]:
    weight, lr = params["gating.loss_weight"], params["gating.lr"]
    return {"epoch": epoch, "top1": 80 - 9 * weight**2 - 20_000 * (lr - 0.2) ** 2 + epoch, "latency_ms": 5 - weight}


@pytest.mark.parametrize("algorithm", ["random", "sobol", "points"])
@pytest.mark.parametrize("scheduler", ["pareto_asha", "none"])
def test_a_search_given_more_trials_equals_one_that_had_them_from_the_start(
    scheduler: str, algorithm: str, tmp_path: Path
) -> None:
    whole = Search(config_of(scheduler, algorithm), tmp_path / "a")
    grown = Search(config_of(scheduler, algorithm, NUM_TRIALS // 2), tmp_path / "b")
    whole.live()
    grown.live()
    assert len(grown.rows) == NUM_TRIALS // 2
    grown.config = whole.config
    grown.live(num_reports=5)
    grown.live()
    assert grown.rows == whole.rows
    assert grown.reported == whole.reported


@pytest.mark.parametrize("algorithm", ["random", "sobol", "tpe", "nsga2", "points"])
@pytest.mark.parametrize("scheduler", ["pareto_asha", "asha", "median", "none"])
def test_a_search_that_dies_goes_on_identically(scheduler: str, algorithm: str, tmp_path: Path) -> None:
    config = config_of(scheduler, algorithm)
    undisturbed, dying = Search(config, tmp_path / "a"), Search(config, tmp_path / "b")
    undisturbed.live()
    assert len(undisturbed.rows) == NUM_TRIALS
    statuses = {row["status"] for row in undisturbed.rows}
    assert statuses == ({"finished"} if scheduler == "none" else {"finished", "stopped"})
    for _ in range(3):
        dying.live(num_reports=5)
    dying.live()
    assert dying.rows == undisturbed.rows
    assert dying.reported == undisturbed.reported, "a report was made twice, or in another order"
