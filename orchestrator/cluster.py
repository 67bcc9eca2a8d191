"""Where a search runs: the cluster's YAML, the connection to Ray, and how many trials fit at once."""

import logging
import os
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from orchestrator.config import Config, Count
from orchestrator.errors import ClusterError
from orchestrator.yaml_files import apply_overrides, find_file, read_yaml, validate

# Read by Ray in this process and, through the runtime environment, by trials and workers on every node.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 this is what silences Tune
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process and a red line per trial, for TPUs
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often reports travel from Train to Tune; 2 s by default
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
TRIAL_DRIVER_CPU = 0.01


class ClusterConfig(Config):
    """One place to run."""

    address: str | None = None
    """Ray's address; none starts Ray on this machine, unless this is a Ray job."""
    storage: str = "runs"
    """Folder for run directories and MLflow's store; on more than one node one that every node mounts."""
    workers_per_trial: Count = 2
    """Train workers of one trial."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = Field(default={"CPU": 0.49})
    """What each worker reserves. Below half a CPU, so that two trials of two workers fit on two CPUs beside their drivers."""
    max_concurrent: Count | None = None
    """Trials at once at most; none for as many as fit."""
    measure_on: str | None = None
    """Custom resource of the nodes on which latency is measured; none for any node."""
    mlflow_uri: str | None = None
    """MLflow's tracking server; none for a SQLite store in `storage`."""


def load_cluster(name_or_path: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Return the cluster that clusters/<name>/cluster.yaml, or any .yaml file, describes. Raises: ConfigError."""
    path = find_file(name_or_path, "clusters/{}/cluster.yaml", "cluster")
    source = f"cluster {path}"
    content = read_yaml(path, source)
    apply_overrides(content, overrides)
    return validate(ClusterConfig, content, source, overrides)


def connect(cluster: ClusterConfig) -> None:
    """Connect to Ray, or start it on this machine. Raises: ClusterError if that fails."""
    import ray  # late: it takes a second or two, and --help or a typo in a YAML file should not

    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    options: dict[str, object] = {
        "runtime_env": {"env_vars": {name: os.environ[name] for name in ENVIRONMENT}},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    if cluster.address is not None:
        options["address"] = cluster.address
    elif "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # reachable on loopback only
        # Without the dashboard Ray never frees the CPUs of a trial that was stopped early.
        options.update(include_dashboard=True, dashboard_host="127.0.0.1")
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = cluster.address or os.environ.get("RAY_ADDRESS") or "on this machine"
        raise ClusterError(f"Ray cannot be reached or started {where}: {error}") from error


def capacity(cluster: ClusterConfig) -> int:
    """Return how many trials fit at once. Raises: ClusterError if not even one does."""
    import ray  # late, as above

    present = ray.cluster_resources()
    needed = {
        name: amount * cluster.workers_per_trial for name, amount in cluster.resources_per_worker.items() if amount
    }
    needed["CPU"] = needed.get("CPU", 0) + TRIAL_DRIVER_CPU
    fits = min(int(present.get(name, 0) / amount + 1e-9) for name, amount in needed.items())
    if fits == 0:
        found = {name: present.get(name, 0) for name in needed}
        raise ClusterError(
            f"one trial needs {needed} ({cluster.workers_per_trial} workers and a driver), the cluster has {found}; "
            "lower workers_per_trial or resources_per_worker, or add nodes"
        )
    return min(fits, cluster.max_concurrent or fits)


def check_storage(cluster: ClusterConfig) -> None:
    """Raise ClusterError inside a Ray job if the storage is relative: the job's working directory is thrown away."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job and not os.path.isabs(cluster.storage):
        raise ClusterError(
            f"storage is {cluster.storage!r}, relative to the job's working directory, which is a copy that is thrown away; "
            "give an absolute folder that every node sees: --run-dir /shared/runs/NAME, or storage in the cluster's YAML"
        )
