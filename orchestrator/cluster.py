"""Where a search runs: the cluster's YAML, the connection to Ray, and how many trials fit at once."""

import json
import logging
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from orchestrator.config import Config, Count
from orchestrator.errors import ClusterError, did_you_mean
from orchestrator.masking import masked
from orchestrator.paths import LEFTOVER_PREFIX, remove_old_leftovers
from orchestrator.yaml_files import apply_overrides, find_file, read_yaml, validate

logger = logging.getLogger(__name__)

# Read by Ray in this process and, through the runtime environment, by trials and workers on every node.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 this is what silences Tune
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often reports travel from Train to Tune; 2 s by default
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
WATCH_NODES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether each trial has a process that hears of nodes that are to go; the one of a Ray that we start goes with us."""
TRIAL_DRIVER_CPU = 0.01
LOCAL_OBJECT_STORE_BYTES = 256 * 2**20  # only configs and metrics travel; Ray would reserve 30 % of the memory
RESOURCE_NAMES = ("CPU", "GPU", "memory", "accelerator_type")
UNIT = 1e-4  # Ray counts resources in ten-thousandths; so do we, and 0.01 + 2 * 0.49 fits twice into 2


def _accelerator_as_resource(value: object) -> object:
    """Turn {accelerator_type: A10G} into the resource that Ray makes of it."""
    if not isinstance(value, dict) or not isinstance(value.get("accelerator_type"), str):
        return value
    others = {name: amount for name, amount in value.items() if name != "accelerator_type"}
    return {**others, f"accelerator_type:{value['accelerator_type']}": 0.001}


Resources = Annotated[
    dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], BeforeValidator(_accelerator_as_resource)
]


class ClusterConfig(Config):
    """One place to run."""

    address: str | None = None
    """Ray's address, host:port or auto; none starts Ray on this machine, unless RAY_ADDRESS is set, as in a Ray job."""
    storage: str = "runs"
    """Folder for run directories and MLflow's store; on more than one node one that every node mounts."""
    workers_per_trial: Count = 2
    """Train workers of one trial."""
    min_workers_per_trial: Count | None = None
    """Workers with which a trial goes on while nodes are missing; none for all of them. The global batch and lr stay the same.

    It goes on from its last checkpoint when a node is lost, and again when there is room for more.
    """
    resources_per_worker: Resources = Field(default={"CPU": 0.49})
    """What each worker reserves: CPU, GPU, memory (bytes), accelerator_type.

    Below half a CPU by default, so that two trials of two workers fit on two CPUs beside their drivers.
    """
    max_concurrent: Count | None = None
    """Trials at once at most; none for as many as fit."""
    measure_on: str | None = None
    """Custom resource of the nodes on which latency is measured, apart from the trials; none for where the trials run."""
    measure_gpus: Literal[0, 1] | None = None
    """GPUs that a measurement takes of a node of measure_on: 1, or 0 to time on its CPU; none for what a trial trains on."""
    mlflow_uri: str | None = None
    """MLflow's tracking server; none for a SQLite store in `storage`."""
    system_metrics: bool = False
    """Whether CPU, memory and GPUs are recorded in the search's MLflow run every ten seconds: of all nodes with a tracking
    server, of the driver's node with SQLite."""
    env_vars: dict[str, str] = Field(default={})
    """Further environment of all workers, such as {GLOO_SOCKET_IFNAME: eth0} where host names resolve to 127.0.0.1."""

    def shown(self) -> dict[str, Any]:
        """Return the fields as plain values, fit to be shown: without passwords, and variables by name only."""
        values = self.model_dump(mode="json")
        hidden = dict.fromkeys(self.env_vars, "(not shown)")
        return values | {"mlflow_uri": self.mlflow_uri and masked(self.mlflow_uri), "env_vars": hidden}

    @field_validator("address")
    @classmethod
    def _is_reachable_from_a_driver(cls, address: str | None) -> str | None:
        if address is not None and "://" in address:
            raise ValueError("expected host:port or auto; from outside a cluster, use `ray job submit --address`")
        return address

    @field_validator("resources_per_worker")
    @classmethod
    def _names_are_known(cls, resources: dict[str, float]) -> dict[str, float]:
        for name in resources:
            if name not in RESOURCE_NAMES and not name.startswith("accelerator_type:"):
                raise ValueError(f"{name} is no resource{did_you_mean(name, RESOURCE_NAMES)}")
        return resources

    @model_validator(mode="after")
    def _is_a_range_of_workers(self) -> Self:
        if self.fewest_workers > self.workers_per_trial:
            raise ValueError(
                f"min_workers_per_trial {self.min_workers_per_trial} exceeds workers_per_trial {self.workers_per_trial}"
            )
        return self

    @model_validator(mode="after")
    def _measures_somewhere(self) -> Self:
        if self.measure_gpus is not None and self.measure_on is None:
            raise ValueError(
                "measure_gpus tells what a measurement takes of a node of measure_on, which is none; set both"
            )
        return self

    @property
    def gpus_to_measure(self) -> int:
        """The GPUs that a measurement takes: a whole one, or 0 where networks are timed on a CPU."""
        return int(bool(self.resources_per_worker.get("GPU"))) if self.measure_gpus is None else self.measure_gpus

    @property
    def measures_apart(self) -> bool:
        """Whether networks are not timed in their trials: on nodes of measure_on, and where trials share a CPU or a GPU.

        Trials estimate then, and all finished networks are timed at the end.
        """
        return self.measure_on is not None or self.resources_per_worker.get("GPU", 0.0) < 1

    @property
    def fewest_workers(self) -> int:
        """The workers that a trial needs at least."""
        return self.min_workers_per_trial or self.workers_per_trial

    @property
    def is_elastic(self) -> bool:
        """Whether a trial's number of workers may change."""
        return self.fewest_workers < self.workers_per_trial

    @model_validator(mode="after")
    def _workers_reserve_something(self) -> Self:
        if not any(self.resources_per_worker.values()):
            raise ValueError("resources_per_worker is all zero; workers without a reservation crowd one node")
        return self


def load_cluster(name_or_path: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Return the cluster that clusters/<name>/cluster.yaml, or any .yaml file, describes. Raises: ConfigError."""
    path = find_file(name_or_path, "clusters/{}/cluster.yaml", "cluster")
    source = f"cluster {name_or_path}"
    content = read_yaml(path, source)
    apply_overrides(content, overrides)
    return validate(ClusterConfig, content, source, overrides)


def locate_storage(cluster: ClusterConfig) -> ClusterConfig:
    """Return the cluster with an absolute storage inside a Ray job; unchanged elsewhere.

    A job's working directory is a copy that is thrown away, so a relative storage lies in the home folder instead: on
    one node, or with homes that all nodes mount, the same command finds it again. connect() refuses it elsewhere.
    """
    return cluster.model_copy(update={"storage": str(located(Path(cluster.storage)))}) if _in_ray_job() else cluster


def located(folder: Path) -> Path:
    """Return the folder as an absolute one; see locate_storage."""
    return (Path.home() if _in_ray_job() else Path.cwd()) / folder


def connect(cluster: ClusterConfig) -> None:
    """Connect to Ray, or start it on this machine, for what writes to the storage.

    Raises: ClusterError as reach does, or if a node does not see the storage.
    """
    reach(cluster)
    check_nodes_share(
        Path(cluster.storage).absolute(),
        "give a storage that all nodes mount: --run-dir /shared/runs, or storage in the cluster's YAML",
    )


def reach(cluster: ClusterConfig) -> None:
    """Connect to Ray, or start it on this machine.

    Raises: ClusterError if that fails, or if Ray runs without its dashboard.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    for name, value in {**ENVIRONMENT, WATCH_NODES: "0" if address is None else "1"}.items():
        os.environ.setdefault(name, value)
    try:
        dashboard = _start_here(cluster) if address is None else _join(cluster, address)
    # RuntimeError: no free memory, a damaged session folder, wrong credentials. ValueError: no host:port.
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        place = "started on this machine" if address is None else f"reached at {address}"
        hint = "" if address is None else "; does it run there, and is RAY_AUTH_MODE here what it is there?"
        raise ClusterError(f"Ray cannot be {place}{hint} ({error})") from error
    if not dashboard:
        raise ClusterError(
            "Ray runs without its dashboard, through which it frees the CPUs of trials that are stopped early; start it "
            "with `ray start --head --include-dashboard=true`"
        )


def capacity(cluster: ClusterConfig) -> int:
    """Return how many trials fit at once. Raises: ClusterError if not even one does."""
    import ray  # late: it takes a second or two, and --help or a typo in a YAML file should not

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = num_trials_that_fit(nodes, cluster.resources_per_worker, cluster.workers_per_trial)
    if fits == 0 and cluster.is_elastic:
        fits = min(1, num_trials_that_fit(nodes, cluster.resources_per_worker, cluster.fewest_workers))
    if fits == 0:
        names = ("CPU", *(name for name in cluster.resources_per_worker if name != "CPU"))
        present = [{name: node.get(name, 0) for name in names} for node in nodes]
        raise ClusterError(
            f"one trial needs {cluster.fewest_workers} workers with {cluster.resources_per_worker} each and "
            f"{TRIAL_DRIVER_CPU} CPU for its driver, the nodes have {present}; lower workers_per_trial or "
            "resources_per_worker in the cluster's YAML, or add nodes"
        )
    return min(fits, cluster.max_concurrent or fits)


def shape() -> dict[str, str]:
    """Return what the cluster consists of, for the record: nodes, CPU, GPU and the kinds of accelerators."""
    import ray  # late, as above

    nodes = [node for node in ray.nodes() if node["Alive"]]
    totals = ray.cluster_resources()
    kinds = sorted(name.partition(":")[2] for name in totals if name.startswith("accelerator_type:"))
    counts = {"nodes": len(nodes), "CPU": totals.get("CPU", 0), "GPU": totals.get("GPU", 0)}
    return {name: f"{count:g}" for name, count in counts.items()} | {"accelerators": ", ".join(kinds) or "none"}


def answers(timeout_s: float = 30.0) -> bool:
    """Return whether Ray still runs what it is given."""
    import ray  # late, as above

    try:
        return ray.get(ray.remote(num_cpus=0)(_sees).remote(os.sep), timeout=timeout_s) is not None
    except ray.exceptions.RayError:
        return False


def has_nodes() -> bool:
    """Return whether any node is alive; Tune would wait for ever for a place on none."""
    import ray  # late, as above

    return any(node["Alive"] for node in ray.nodes())


def num_trials_that_fit(nodes: Sequence[Mapping[str, float]], worker: Mapping[str, float], num_workers: int) -> int:
    """Return how many trials of so many workers fit beside their drivers; a worker does not span nodes.

    nodes: the resources of each.    worker: what one worker reserves.

    >>> num_trials_that_fit([{"CPU": 2}], {"CPU": 0.49}, 2), num_trials_that_fit([{"CPU": 2}], {"CPU": 0.5}, 2)
    (2, 1)
    """
    slots = [_num_that_fit(node, worker) for node in nodes]
    worker_cpu = _units(worker.get("CPU", 0))
    driver_cpu = _units(TRIAL_DRIVER_CPU)
    spare_cpu = [_units(node.get("CPU", 0)) - num * worker_cpu for node, num in zip(nodes, slots, strict=True)]
    num_drivers = sum(cpu // driver_cpu for cpu in spare_cpu)
    for num_trials in range(sum(slots) // num_workers, 0, -1):
        # Worker slots that no trial fills make room for more drivers.
        free_slots = sum(slots) - num_trials * num_workers
        if num_trials <= num_drivers + free_slots * (worker_cpu // driver_cpu):
            return num_trials
    return 0


def _num_that_fit(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return min(_units(node.get(name, 0)) // _units(amount) for name, amount in worker.items() if _units(amount))


def _units(amount: float) -> int:
    return round(amount / UNIT)


def _start_here(cluster: ClusterConfig) -> str:
    """Start Ray on this machine, to end with this process, and return its dashboard's address."""
    import ray  # late, as in capacity

    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Ray listens on every network interface and asks for a token unless told otherwise. This one lives in the
        # environment only; Ray itself would write one to the home folder, and then each `ray start` asks for that.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that it asks
    elif os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        logger.warning(
            "RAY_AUTH_MODE=disabled: Ray listens on every network interface, and whoever reaches this machine can run "
            "programs on it; unset it unless the network is closed"
        )
    port = _free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    try:
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",  # on the next free port when another Ray has 8265
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            **_options(cluster, f"{ray.util.get_node_ip_address()}:{port}"),
        )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]
    return str(context.dashboard_url or "")


def _join(cluster: ClusterConfig, address: str) -> str:
    """Connect to a Ray that runs, and return its dashboard's address."""
    import ray  # late, as in capacity

    if address == "auto":
        with ray.init(address=address, logging_level=logging.WARNING) as found:
            address = found.address_info["gcs_address"]
    context = ray.init(address=address, **_options(cluster, address))
    return str(context.dashboard_url or "")


def _options(cluster: ClusterConfig, address: str) -> dict[str, Any]:
    """Return what ray.init gets in either case; address: host:port of this Ray."""
    env_vars = {name: os.environ[name] for name in (*ENVIRONMENT, WATCH_NODES)} | {
        # Ray Train frees the CPUs of a stopped trial through the State API, which without this looks for any Ray on the
        # machine and gives up when there are two: seen on 2.60, the CPUs were gone until the end of the search.
        "RAY_ADDRESS": address,
        "OMP_NUM_THREADS": str(max(1, int(cluster.resources_per_worker.get("CPU", 1)))),
        **cluster.env_vars,
    }
    given = _job_env_vars()  # Ray refuses a variable that the job has set already
    return {
        "runtime_env": {"env_vars": {name: value for name, value in env_vars.items() if name not in given}},
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _in_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _job_env_vars() -> set[str]:
    """Return the names that `ray job submit --runtime-env-json` gave values; empty outside a job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return set((job.get("runtime_env") or {}).get("env_vars") or {})


def _sees(path: str) -> bool:
    return os.path.exists(path)


def _trouble_with(token: str) -> str | None:
    """Return what a node cannot do where the token was written; None if it sees the token, and writes beside it."""
    if not _sees(token):
        return "cannot see what is written here"
    answer = f"{token}.{secrets.token_hex(8)}"
    try:
        with open(answer, "xb"):
            pass
        os.unlink(answer)
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return None


def check_nodes_share(folder: Path, advice: str) -> None:
    """Raise ClusterError if a node does not read what this process writes to the folder, or cannot write there itself.

    advice: what to do about it.
    """
    import ray  # late, as in capacity
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_old_leftovers(folder)  # tokens of processes that died
    token = folder / f"{LEFTOVER_PREFIX}visible.{secrets.token_hex(8)}"
    token.touch()
    try:
        trouble = ray.remote(num_cpus=0)(_trouble_with)
        answers = [
            trouble.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(token)
            )
            for node in nodes
        ]
        told = [
            f"{node['NodeManagerAddress']} {what}"
            for node, what in zip(nodes, ray.get(answers), strict=True)
            if what is not None
        ]
    finally:
        token.unlink()
    if told:
        raise ClusterError(f"{folder} is not the same folder on every node: {', '.join(told)}; {advice}")
