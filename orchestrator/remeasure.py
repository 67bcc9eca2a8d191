"""The last step of a search on CPUs: nothing trains any more, and all finished networks are timed in turns.

Until then their latencies are estimates (see measure.py).
"""

from pathlib import Path
from typing import Any

import gator
from orchestrator import models
from orchestrator.cluster import ClusterConfig
from orchestrator.config import ModelConfig, TrialConfig
from orchestrator.measure import build_traced, in_own_process, measure_in_turns
from orchestrator.paths import RunPaths
from orchestrator.records import read_results, update_results

Row = dict[str, Any]


def remeasure(run: RunPaths, base: TrialConfig, cluster: ClusterConfig) -> list[Row]:
    """Write measured latencies into results.parquet; return the rows that have got them: the unpruned and all finished.

    base: the config of the unpruned network. Raises: ray.exceptions.RayError if the process that measures is lost twice;
    nothing is written then.
    """
    finished = [row for row in read_results(run.results) if row["status"] == "finished"]
    trial_ids = [None if row["kind"] == "unpruned" else row["trial_id"] for row in finished]
    columns = in_own_process(
        _measure, str(run.root.resolve()), base.model_dump_json(), trial_ids, profile=base.profile, cluster=cluster
    )
    rows = [{**row, **latencies} for row, latencies in zip(finished, columns, strict=True)]
    update_results(run.results, rows)
    return rows


def _measure(run_dir: str, base_json: str, trial_ids: list[str | None]) -> list[Row]:
    """Return the latency columns of each network; None stands for the unpruned one."""
    run, base = RunPaths(Path(run_dir)), TrialConfig.model_validate_json(base_json)
    networks = []
    for trial_id in trial_ids:
        if trial_id is None:
            network, graph = build_traced(_random(base.model), (3, base.data.image_size, base.data.image_size))
            networks.append((network, gator.Architecture.full(graph)))
        else:
            architecture = gator.Architecture.load(run.trial(trial_id).architecture)
            networks.append((models.load_trial(run.root, trial_id), architecture))
    return measure_in_turns(networks, base.profile)


def _random(model: ModelConfig) -> ModelConfig:
    """Return the config without weights, which do not matter to the time."""
    return model.model_copy(update={"weights": None})
