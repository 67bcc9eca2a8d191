"""The connection to Ray: start it on this machine or join it, and check that all nodes share a folder."""

import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.interrupts import Interrupts, unwrapped
from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import ClusterError
from orchestrator.storage.files import LEFTOVER_PREFIX, remove_old_leftovers

logger = logging.getLogger(__name__)
# Read by Ray in this process and, through the runtime environment, by trials and workers on every node.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 this is what silences Tune
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often reports travel from Train to Tune; 2 s by default
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
TRAIN_METRICS = "RAY_TRAIN_METRICS_ENABLED"
"""Whether Ray Train counts for Ray's dashboards; a Ray that this process starts has none."""
WATCH_NODES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether each trial has a process that is notified of nodes that will be removed; that of a Ray that this process starts ends with it."""
ANSWER_S = 20.0
"""How long a Ray that is being started may take to answer."""
LOCAL_OBJECT_STORE_BYTES = 256 * 2**20  # only configs and metrics travel; Ray would reserve 30 % of the memory
SHARE_STORAGE = "give a storage that all nodes mount: --run-dir /shared/runs, or storage in the cluster's YAML"


@contextmanager
def session(
    cluster: ClusterConfig | None, shared: Path | None = None, advice: str = SHARE_STORAGE
) -> Iterator[Interrupts]:
    """Connect to Ray while the body runs, in which SIGINT and SIGTERM raise Interrupted; an earlier connection is used, and kept.

    cluster: None if the body needs no Ray.
    shared: a folder that every node has to read and write.    advice: what to do if a node does not.
    Raises: ClusterError as connect does, or if a node does not share the folder.
    """
    interrupts = Interrupts()
    if cluster is None or ray.is_initialized():
        interrupts.install()
        with unwrapped():
            yield interrupts
        return
    try:
        connect(cluster)
        interrupts.install()  # after ray.init, which replaces the handler of SIGTERM
        if shared is not None:
            check_nodes_share(shared.absolute(), advice)
        with unwrapped():
            yield interrupts
    finally:
        ray.shutdown()


def connect(cluster: ClusterConfig) -> None:
    """Connect to Ray, or start it on this machine.

    Raises: ClusterError if that fails, or if Ray runs without its dashboard.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    for name, value in {
        **ENVIRONMENT,
        **dict.fromkeys((WATCH_NODES, TRAIN_METRICS), "0" if address is None else "1"),
    }.items():
        os.environ.setdefault(name, value)
    try:
        dashboard = _start_here(cluster) if address is None else _join(cluster, address)
    # RuntimeError: no free memory, a damaged session folder, wrong credentials. ValueError: no host:port. A plain Exception: the
    # dashboard did not start within 30 s, seen on a busy machine.
    except Exception as error:
        place = "started on this machine" if address is None else f"reached at {address}"
        hint = "" if address is None else "; does it run there, and is RAY_AUTH_MODE here what it is there?"
        raise ClusterError(f"Ray cannot be {place}{hint} ({error})") from error
    if not dashboard:
        raise ClusterError(
            "Ray runs without its dashboard, through which it frees the CPUs of trials that are stopped early; start it "
            "with `ray start --head --include-dashboard=true`"
        )


def answers(timeout_s: float = 30.0) -> bool:
    """Return whether Ray still runs what it is given."""
    try:
        return ray.get(ray.remote(num_cpus=0)(_sees).remote(os.sep), timeout=timeout_s) is not None
    except ray.exceptions.RayError:
        return False


def _start_here(cluster: ClusterConfig) -> str:
    """Start Ray on this machine, to end with this process, and return its dashboard's address."""
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Ray listens on every network interface and asks for a token unless told otherwise. This one lives in the
        # environment only; Ray itself would write one to the home folder, and then each `ray start` asks for that.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that it asks
    elif os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        logger.warning(
            "RAY_AUTH_MODE=disabled: Ray listens on every network interface, and anyone who reaches this machine can run "
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
    if address == "auto" and "RAY_ADDRESS" in os.environ:  # what auto means to Ray as well
        address = os.environ["RAY_ADDRESS"]
    if address == "auto":
        with ray.init(address=address, logging_level=logging.WARNING) as found:
            address = found.address_info["gcs_address"]
    _wait_for_answer(address)
    context = ray.init(address=address, **_options(cluster, address))
    return str(context.dashboard_url or "")


def _wait_for_answer(address: str) -> None:
    """Return when a program that speaks gRPC, as Ray's head does and its dashboard does not, answers at host:port.

    Raises: ConnectionError if none does within ANSWER_S; Ray would try for 14 minutes.
    """
    if not address.rpartition(":")[2].isdecimal() or os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # Ray refuses the former at once, and knows the certificates
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError(f"no Ray has answered for {ANSWER_S:g} s") from error


def _options(cluster: ClusterConfig, address: str) -> dict[str, Any]:
    """Return what ray.init gets in either case; address: host:port of this Ray."""
    env_vars = {name: os.environ[name] for name in (*ENVIRONMENT, WATCH_NODES, TRAIN_METRICS)} | {
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


def _job_env_vars() -> set[str]:
    """Return the names that `ray job submit --runtime-env-json` gave values; empty outside a job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return set((job.get("runtime_env") or {}).get("env_vars") or {})


def _sees(path: str) -> bool:
    return os.path.exists(path)


def _trouble_with(token: str) -> str | None:
    """Return what a node cannot do where the token was written; None if it sees the token, and can write next to it."""
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
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_old_leftovers(folder)  # tokens of processes that died
    token = folder / f"{LEFTOVER_PREFIX}visible.{secrets.token_hex(8)}"
    token.touch()
    try:
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        ask = ray.remote(num_cpus=0)(_trouble_with)
        answers = ray.get([ask.options(scheduling_strategy=place).remote(str(token)) for place in places])
        troubles = [
            f"{node['NodeManagerAddress']} {trouble}" for node, trouble in zip(nodes, answers, strict=True) if trouble
        ]
    finally:
        token.unlink()
    if troubles:
        raise ClusterError(f"{folder} is not the same folder on every node: {', '.join(troubles)}; {advice}")
