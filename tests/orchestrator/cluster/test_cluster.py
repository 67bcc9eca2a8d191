"""Where a search runs: the YAML, how many trials fit, what Ray is started or reached with, and what is refused."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ray
from pydantic import ValidationError

from orchestrator.cli import chosen_cluster
from orchestrator.cluster import connection as cluster_module
from orchestrator.cluster.capacity import capacity, num_now, num_trials_that_fit
from orchestrator.cluster.connection import connect, session
from orchestrator.cluster.waiting import Waiting
from orchestrator.config.cluster import ClusterConfig, load_cluster
from orchestrator.errors import ClusterError, ConfigError
from tests.orchestrator.servers import free_port

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _environment_is_restored() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        yield


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return str(path)


def test_local_cluster_runs_on_this_machine_with_one_worker_a_trial() -> None:
    local = load_cluster("local")
    assert (local.address, local.storage, local.workers_per_trial) == (None, "runs", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "mlflow_experiment: '/x/{search}'", "found '/x/{search}', expected a name in which", id="template"
        ),
        pytest.param("mlflow_model: '{name'", "found '{name' .expected '}' before end of string", id="half-template"),
        pytest.param("mlflow_model: ''", "found '', expected a name in which", id="empty-template"),
        pytest.param("storge: runs", "storge is not a field of ClusterConfig; did you mean storage", id="unknown-key"),
        pytest.param(
            "min_workers_per_trial: 3", "min_workers_per_trial 3 exceeds workers_per_trial 2", id="no range of workers"
        ),
        pytest.param("workers_per_trial: 0", "workers_per_trial: found 0, expected a number", id="out-of-range"),
        pytest.param(
            "resources_per_worker: {GPUs: 1}", "GPUs is not a known resource; did you mean GPU", id="unknown-resource"
        ),
        pytest.param("resources_per_worker: {CPU: 0}", "resources_per_worker is all zero", id="no-reservation"),
        pytest.param(
            "resources_per_worker: {GPU: 0.5}",
            "several of the 2 workers of a trial on one GPU",
            id="workers-share-a-gpu",
        ),
        pytest.param("resources_per_worker: {GPU: 2}", "GPU: 2, but a worker uses one", id="gpus-of-one-worker"),
        pytest.param("address: ray://head:10001", "expected host:port or auto", id="ray-client"),
        pytest.param('resources_per_worker: {"\\ud800": 1}', "line 1: .* holds half a character", id="no-utf-8"),
    ],
)
def test_wrong_cluster_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster(written(tmp_path, text))


def test_unknown_cluster_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"cluster 'locla' is neither .* did you mean local\?"):
        load_cluster("locla")


def test_accelerator_type_becomes_the_resource_that_ray_makes_of_it(tmp_path: Path) -> None:
    gpu = load_cluster(written(tmp_path, "resources_per_worker: {CPU: 4, GPU: 1, accelerator_type: A10G}"))
    assert gpu.resources_per_worker == {"CPU": 4, "GPU": 1, "accelerator_type:A10G": 0.001}
    assert ClusterConfig.model_validate_json(gpu.model_dump_json()) == gpu


def test_custom_resources_and_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "resources_per_worker: {CPU: 4, gold: 1}\nworker_labels: {ray.io/market-type: spot}"
    cluster = load_cluster(written(tmp_path, text))
    assert cluster.resources_per_worker == {"CPU": 4, "gold": 1}
    assert ClusterConfig.model_validate_json(cluster.model_dump_json()) == cluster


# A driver takes no CPU. The workers of one trial may lie on several nodes, one worker may not.
@pytest.mark.parametrize(
    ("nodes", "worker", "num_workers", "expected"),
    [
        pytest.param([{"CPU": 2}], {"CPU": 0.49}, 2, 2, id="default-on-2-cores"),
        pytest.param([{"CPU": 1.2}], {"CPU": 0.3}, 2, 2, id="all-of-it"),
        pytest.param([{"CPU": 1}], {"CPU": 0.49}, 2, 1, id="one-core"),
        pytest.param([{"CPU": 0.9}], {"CPU": 0.49}, 2, 0, id="too-small"),
        pytest.param([{"CPU": 16}], {"CPU": 1}, 2, 8, id="whole-cpus"),
        pytest.param([{"CPU": 3}, {"CPU": 3}], {"CPU": 2}, 1, 2, id="worker-does-not-span-nodes"),
        pytest.param([{"CPU": 2}, {"CPU": 2}], {"CPU": 2}, 2, 1, id="trial-spans-nodes"),
        pytest.param([{"CPU": 32, "GPU": 4}, {"CPU": 4}], {"CPU": 4, "GPU": 1}, 2, 2, id="gpus-decide"),
        pytest.param([{"CPU": 0}, {"CPU": 8, "GPU": 2}], {"CPU": 1, "GPU": 1}, 2, 1, id="empty-head"),
        pytest.param([{"CPU": 0}, {"CPU": 2}], {"CPU": 0.49}, 2, 2, id="head-without-cpus"),
        pytest.param([], {"CPU": 1}, 1, 0, id="no-nodes"),
    ],
)
def test_as_many_trials_as_fit(
    nodes: list[dict[str, float]], worker: dict[str, float], num_workers: int, expected: int
) -> None:
    assert num_trials_that_fit(nodes, worker, num_workers) == expected


def one_node(**resources: float) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": resources}, {"Alive": False, "Resources": {"CPU": 1000.0}}]


def test_capacity_counts_living_nodes_up_to_max_concurrent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=16.0))
    assert capacity(ClusterConfig()) == 16
    assert capacity(ClusterConfig(max_concurrent=3)) == 3


def test_cluster_that_grows_runs_as_many_trials_as_it_grows_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=0.0))  # its workers have left
    assert capacity(ClusterConfig(grows_to=8)) == 8
    assert capacity(ClusterConfig(grows_to=8, max_concurrent=3)) == 3


@pytest.mark.parametrize(
    ("condition", "has"),
    [("spot", True), ("on-demand", False), ("!spot", False), ("in(on-demand, spot)", True), ("!in(spot)", False)],
)
def test_workers_go_where_the_labels_are(monkeypatch: pytest.MonkeyPatch, condition: str, has: bool) -> None:
    labelled = {"Alive": True, "Resources": {"CPU": 16.0}, "Labels": {"market": "spot"}}
    monkeypatch.setattr(ray, "nodes", lambda: [labelled])
    assert num_now(ClusterConfig(worker_labels={"market": condition})) == (16 if has else 0)


def test_label_that_no_node_has_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"market": "spot", "ray.io/node-id": "f0"}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}, "Labels": labels}] * 2)
    message = r"labels {market: gold}, the nodes have 2 x {CPU: 2} labelled {market: spot}; .*or set grows_to"
    with pytest.raises(ClusterError, match=message):
        capacity(ClusterConfig(worker_labels={"market": "gold"}))


def test_measuring_on_nodes_that_are_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=2.0, quiet=1.0))
    assert capacity(ClusterConfig(measure_on="quiet")) == 2
    with pytest.raises(
        ClusterError, match=r"measure_on is quite, .* the nodes have 1 x {CPU: 2, quiet: 1}; start one with"
    ):
        capacity(ClusterConfig(measure_on="quite"))


def test_wait_for_nodes_is_reported_ever_more_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=1.0))
    waiting = Waiting(ClusterConfig(workers_per_trial=1, resources_per_worker={"CPU": 6, "GPU": 1}))
    reported = {now: text for now in range(0, 4000, 10) if (text := waiting.text(["trial_0003"], now)) is not None}
    assert list(reported) == [50, 300, 1500, 3000]
    assert reported[50].startswith("trial_0003 waits for 1 worker with {CPU: 6, GPU: 1}; the nodes have 1 x {CPU: 1},")
    assert waiting.text([], 4000) is None  # it has started
    assert waiting.text(["trial_0003"], 4010) is None  # and waits again, for a new node


@pytest.mark.parametrize(
    ("settings", "gpus", "apart"),
    [
        ({"resources_per_worker": {"CPU": 1}}, 0, True),  # trials train on the cores
        ({"resources_per_worker": {"GPU": 1}}, 1, False),
        (
            {"workers_per_trial": 1, "resources_per_worker": {"GPU": 0.5}},
            1,
            True,
        ),  # another trial trains on the same GPU
        ({"resources_per_worker": {"GPU": 1}, "measure_on": "quiet"}, 1, True),
        ({"resources_per_worker": {"GPU": 1}, "measure_on": "quiet", "measure_gpus": 0}, 0, True),
        ({"resources_per_worker": {"CPU": 1}, "measure_on": "quiet", "measure_gpus": 1}, 1, True),
    ],
)
def test_where_networks_are_timed(settings: dict[str, Any], gpus: int, apart: bool) -> None:
    cluster = ClusterConfig(**settings)
    assert (cluster.gpus_to_measure, cluster.measures_apart) == (gpus, apart)


def test_gpus_to_measure_with_need_nodes_to_measure_on() -> None:
    with pytest.raises(
        ValidationError, match=r"measure_gpus sets how many GPUs a measurement reserves on a node of measure_on"
    ):
        ClusterConfig(measure_gpus=1)


def test_trial_that_may_shrink_fits_where_its_fewest_workers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=1.0))
    assert capacity(ClusterConfig(workers_per_trial=4, min_workers_per_trial=2)) == 1
    with pytest.raises(ClusterError, match="one trial needs 3 workers"):
        capacity(ClusterConfig(workers_per_trial=4, min_workers_per_trial=3))


def test_capacity_of_nothing_names_what_is_needed_and_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=16.0))
    with pytest.raises(ClusterError, match=r"needs 2 workers with {GPU: 1} each, the nodes have 1 x {CPU: 16}; "):
        capacity(ClusterConfig(resources_per_worker={"GPU": 1}))


class FakeRay:
    """Stands in for ray.init and ray.nodes: keeps what init was called with, and answers like one node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dashboard_url: str = "127.0.0.1:8265") -> None:
        self.options: dict[str, Any] = {}
        self.environment: dict[str, str] = {}
        self.dashboard_url = dashboard_url
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
            os.environ.pop(name, None)
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(cluster_module, "_wait_for_answer", lambda address: None)
        monkeypatch.setattr(ray, "nodes", lambda: one_node(CPU=2.0))

    def init(self, **options: Any) -> SimpleNamespace:
        self.options, self.environment = options, dict(os.environ)
        return SimpleNamespace(dashboard_url=self.dashboard_url)

    @property
    def env_vars(self) -> dict[str, str]:
        return self.options["runtime_env"]["env_vars"]


def test_ray_is_started_here_with_its_dashboard_on_loopback_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    connect(ClusterConfig())
    assert fake.options["address"] == "local"
    assert (fake.options["include_dashboard"], fake.options["dashboard_host"]) == (True, "127.0.0.1")
    assert "dashboard_port" not in fake.options  # so that Ray takes the next one when 8265 is taken
    assert len(fake.environment["RAY_AUTH_TOKEN"]) == 64
    assert fake.env_vars["RAY_TRAIN_METRICS_ENABLED"] == "0"


def test_workers_are_told_which_ray_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    connect(ClusterConfig())
    assert fake.env_vars["RAY_ADDRESS"].endswith(f":{fake.environment['RAY_GCS_SERVER_PORT']}")
    assert not {"RAY_GCS_SERVER_PORT", "RAY_ADDRESS"} & os.environ.keys()  # the next connect() starts another one


def test_an_auth_mode_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    connect(ClusterConfig())
    assert "RAY_AUTH_TOKEN" not in fake.environment


@pytest.mark.parametrize(("cpus", "num_threads"), [(0.49, "1"), (4, "4")])
def test_workers_get_a_thread_for_each_of_their_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: float, num_threads: str
) -> None:
    fake = FakeRay(monkeypatch)
    connect(ClusterConfig(resources_per_worker={"CPU": cpus}, env_vars={"GLOO_SOCKET_IFNAME": "eth0"}))
    assert fake.env_vars["OMP_NUM_THREADS"] == num_threads
    assert fake.env_vars["GLOO_SOCKET_IFNAME"] == "eth0"
    assert fake.env_vars["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


def test_a_ray_job_connects_to_its_ray_and_its_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch)
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "3"}}})
    connect(ClusterConfig())
    assert fake.options["address"] == fake.env_vars["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "OMP_NUM_THREADS" not in fake.env_vars  # ray.init refuses what the job has set
    assert fake.env_vars["RAY_TRAIN_METRICS_ENABLED"] == "1"  # for that cluster's dashboards


def test_ray_whose_dashboard_does_not_start_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRay(monkeypatch)
    monkeypatch.setattr(ray, "init", mock.Mock(side_effect=Exception("Module MetricsHead failed to start")))
    with pytest.raises(ClusterError, match=r"cannot be started on this machine \(Module MetricsHead failed to start\)"):
        connect(ClusterConfig())


def test_ray_without_dashboard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRay(monkeypatch, dashboard_url="")
    with pytest.raises(ClusterError, match="without its dashboard"):
        connect(ClusterConfig(address="10.0.0.1:6379"))


@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "another server, such as Ray's dashboard"])
def test_address_at_which_no_ray_answers_is_one_message(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    monkeypatch.setattr(cluster_module, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1] if listens else free_port()}")
        with pytest.raises(
            ClusterError, match=r"reached at 127\.0\.0\.1:\d+; .*RAY_AUTH_MODE.*no Ray has answered for 0.5 s"
        ):
            connect(ClusterConfig())


def test_relative_storage_lies_in_the_home_folder_inside_a_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    relative, absolute = (Namespace(cluster="local", run_dir=run_dir) for run_dir in ("runs", "/shared/runs"))
    assert chosen_cluster(relative).storage == "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert chosen_cluster(relative).storage == "/home/somebody/runs"
    assert chosen_cluster(absolute).storage == "/shared/runs"


def test_a_tilde_in_the_storage_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert ClusterConfig(storage="~/runs").storage == "/home/somebody/runs"
    assert chosen_cluster(Namespace(cluster="local", run_dir="~/runs")).storage == "/home/somebody/runs"
    assert ClusterConfig(storage="s3://bucket/~x").storage == "s3://bucket/~x"


@pytest.mark.parametrize("field", ["storage", "local"])
def test_a_path_without_a_home_folder_and_an_empty_one_are_refused(field: str) -> None:
    for value, message in (("~nosuchuser/x", "no such home folder, expected one"), ("", "expected a path; . is the")):
        with pytest.raises(ValidationError, match=message):
            ClusterConfig.model_validate({field: value})


REACH = """
import socket, sys
port = socket.socket()
try:
    port.bind(("127.0.0.1", 8265)); port.listen()
except OSError:
    pass  # taken by another Ray: just as well
import ray
from orchestrator.cluster.capacity import capacity
from orchestrator.cluster.connection import connect
from orchestrator.config.cluster import ClusterConfig
connect(ClusterConfig())
print("capacity", capacity(ClusterConfig()), flush=True)

@ray.remote(num_cpus=0)
def num_nodes():
    from ray.util.state import list_nodes
    return len(list_nodes(timeout=60))

input()  # until the other one runs too
print("nodes", ray.get(num_nodes.remote()), flush=True)
input()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_searches_on_one_machine_each_find_their_own_ray() -> None:
    # Ray Train frees the CPUs of stopped trials through the State API, which by itself refuses to choose between two.
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", REACH], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for expected in ("capacity", "nodes 1"):
            for process in pair:
                assert process.stdout is not None
                assert process.stdout.readline().startswith(expected)
            for process in pair:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        assert [process.wait(60) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def test_node_that_can_only_read_the_storage_is_told(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    assert cluster_module._trouble_with(str(tmp_path / "token")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    assert cluster_module._trouble_with("/proc/self/status") == "cannot write there (No such file or directory)"
    assert cluster_module._trouble_with(str(tmp_path / "other")) == "cannot see what is written here"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_node_is_asked_for_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": 150 * 2**20, "dashboard_port": free_port()}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes.add_node(num_cpus=1, object_store_memory=150 * 2**20)
        with session(ClusterConfig(address=nodes.address), tmp_path):
            assert os.listdir(tmp_path) == []  # what was written for the others to see is gone again
            assert capacity(ClusterConfig()) == 2  # on each node a trial of 2 x 0.49 CPU
            # Another folder under the same name, as on nodes that do not share it.
            monkeypatch.setattr(cluster_module, "_trouble_with", lambda token: "cannot see what is written here")
            message = r"not the same folder on every node: \S+ cannot see what is written here.*; mount it"
            with pytest.raises(ClusterError, match=message):
                cluster_module.check_nodes_share(tmp_path, "mount it")
    finally:
        nodes.shutdown()
