"""The last step of a search whose networks are timed apart from the trials: all are timed, in turns.

On CPUs nothing trains any more by then. Until then latencies are estimates (see latency/sources.py).
"""

import torch

import gator
from orchestrator.cluster.processes import in_own_process, measuring_device
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import FINISHED, UNPRUNED
from orchestrator.config.search import SearchConfig
from orchestrator.latency.record import latency_columns
from orchestrator.latency.runtimes import Timer, Timing
from orchestrator.latency.timing import time_in_turns
from orchestrator.models import saved as models
from orchestrator.storage.fetching import fetched
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import EpochMetrics, read_results, update_results
from orchestrator.trial.fixed_networks import build_fixed


def remeasure(run: RunPaths, config: SearchConfig, cluster: ClusterConfig, place: str) -> list[EpochMetrics]:
    """Write measured latencies into results.parquet; return the rows that got them: the unpruned network's and all finished ones.

    place: where every node finds the run directory, a path or an address.
    Raises: MeasurerError if the process that measures is lost twice; nothing is written then.
    """
    finished = [row for row in read_results(run.results) if row["status"] == FINISHED]
    trial_ids = [row["trial_id"] for row in finished]
    arguments = (place, config.model_dump_json(), trial_ids, measuring_device(cluster))
    columns = in_own_process(
        _measure, *arguments, profile=config.base.profile, cluster=cluster, num_gpus=cluster.gpus_to_measure
    )
    rows = [{**row, **latencies} for row, latencies in zip(finished, columns, strict=True)]
    update_results(run.results, rows)
    return rows


def _measure(place: str, config_json: str, trial_ids: list[str], device_name: str) -> list[EpochMetrics]:
    """Return the latency columns of each network."""
    config, patterns = SearchConfig.model_validate_json(config_json), [f"trials/{name}/*" for name in trial_ids]
    with fetched(place, "search.json", *patterns) as run_dir:
        return _measure_here(RunPaths(run_dir), config, trial_ids, device_name)


def _measure_here(run: RunPaths, config: SearchConfig, trial_ids: list[str], device_name: str) -> list[EpochMetrics]:
    base = config.base
    fixed = {reference.name: (reference.model, reference.widths) for reference in config.references}
    fixed[UNPRUNED] = base.model, None
    device = torch.device(device_name)
    timing = Timing.on(device, base.profile)
    by_trial: list[dict[int, Timer]] = []
    for trial_id in trial_ids:
        if trial_id in fixed:  # random weights do not matter to the time
            network, _, architecture = build_fixed(*fixed[trial_id], base.data.image_size)
            file = None
        else:
            network = models.load_trial(run.root, trial_id)  # first: it refuses links
            architecture = gator.Architecture.load(run.trial(trial_id).architecture)
            file = run.trial(trial_id).exported("onnx")  # what is timed is what is deployed
        by_trial.append(timing.timers(network, architecture.input_shapes[0][1:], base.profile.batch_sizes, file))
    by_size = {
        size: time_in_turns([timers[size] for timers in by_trial], base.profile.num_repeats, device)
        for size in base.profile.batch_sizes
    }
    return [
        latency_columns({size: latencies[place] for size, latencies in by_size.items()})
        for place in range(len(trial_ids))
    ]
