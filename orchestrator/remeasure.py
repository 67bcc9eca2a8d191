"""The last step of a search on CPUs: nothing trains any more, and all finished networks are timed side by side.

What a trial measured at its own end was disturbed by the trials beside it, each time in another way (see measure.py).
"""

from typing import Any

from ray.actor import ActorHandle

import gator
from orchestrator.config import ModelConfig, TrialConfig
from orchestrator.measure import build_traced, measure_in_turns
from orchestrator.paths import RunPaths
from orchestrator.records import read_results, update_results

Row = dict[str, Any]


def remeasure(probe: ActorHandle, run: RunPaths, base: TrialConfig) -> list[Row]:
    """Write new latencies into results.parquet; return the rows that have got them: the unpruned and all finished.

    base: the config of the unpruned network. Raises: ray.exceptions.RayError if the probe is lost; nothing is written then.
    """
    finished = [row for row in read_results(run.results) if row["status"] == "finished"]
    networks = [_network_of(row, run, base) for row in finished]
    columns = measure_in_turns(probe, networks, base.profile)
    rows = [{**row, **latencies} for row, latencies in zip(finished, columns, strict=True)]
    update_results(run.results, rows)
    return rows


def _network_of(row: Row, run: RunPaths, base: TrialConfig) -> tuple[ModelConfig, gator.Architecture]:
    if row["kind"] == "unpruned":
        _, graph = build_traced(base.model, (3, base.data.image_size, base.data.image_size))
        return base.model, gator.Architecture.full(graph)
    paths = run.trial(row["trial_id"])
    config = TrialConfig.model_validate_json(paths.config.read_bytes())
    return config.model, gator.Architecture.load(paths.architecture)
