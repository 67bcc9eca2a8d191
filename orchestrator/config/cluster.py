"""ClusterConfig: where a search runs and what each worker reserves, and how it is read from YAML."""

import difflib
from collections.abc import Sequence
from getpass import getuser
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from orchestrator.config.base import Config, Count, with_home
from orchestrator.config.messages import validate
from orchestrator.config.yaml_files import apply_overrides, find_file, read_yaml
from orchestrator.errors import did_you_mean
from orchestrator.masking import masked

OBJECT_STORES = ("s3", "gs")
RESOURCE_NAMES = ("CPU", "GPU", "memory", "accelerator_type")


def _is_template(text: str) -> str:
    """Return the text if it is a name with {name} and {user} as its only fields."""
    expected = (
        "expected a name in which {name} and {user} stand for the search and the user, such as /Shared/gator/{name}"
    )
    try:
        fields = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"found {text!r} ({error}), {expected}") from error
    if not text or not fields <= {"name", "user"} or {"'", '"'} & set(text):
        raise ValueError(f"found {text!r}, {expected}")
    return text


Template = Annotated[str, AfterValidator(_is_template)]


def _accelerator_as_resource(value: object) -> object:
    """Turn {accelerator_type: A10G} into the name that Ray gives this resource."""
    if not isinstance(value, dict) or not isinstance(value.get("accelerator_type"), str):
        return value
    others = {name: amount for name, amount in value.items() if name != "accelerator_type"}
    return {**others, f"accelerator_type:{value['accelerator_type']}": 0.001}


Resources = Annotated[
    dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], BeforeValidator(_accelerator_as_resource)
]


class ClusterConfig(Config):
    """A place to run: this machine or a Ray cluster."""

    address: str | None = None
    """Ray's address, host:port or auto; none starts Ray on this machine, unless RAY_ADDRESS is set, as in a Ray job."""
    storage: str = "runs"
    """Folder for run directories and MLflow's store; on more than one node one that every node mounts. Or the address of an object
    store: s3://bucket/runs, gs://bucket/runs."""
    local: Annotated[str, AfterValidator(with_home)] | None = None
    """Folder on the head's disk for the run directories of a storage that is an address; none for one in ~/.cache/gator."""
    workers_per_trial: Count = 2
    """Train workers of one trial."""
    min_workers_per_trial: Count | None = None
    """Fewest workers with which a trial continues while nodes are missing; none for all of them. The global batch and lr stay the same.

    It resumes from its last checkpoint when a node is lost, and again when there is room for more workers.
    """
    resources_per_worker: Resources = Field(default={"CPU": 0.49})
    """What each worker reserves: CPU, GPU (1, or a share of one), memory (bytes), accelerator_type, and custom resources of the nodes.

    Below half a CPU by default, so that two trials of two workers fit on two CPUs.
    """
    worker_labels: dict[str, str] = Field(default={})
    """Labels of the nodes that workers run on, such as {ray.io/market-type: spot}: each a value, !value, in(a, b) or !in(a, b)."""
    max_concurrent: Count | None = None
    """Most trials at once; none for as many as fit."""
    grows_to: Count | None = None
    """Trials at once when the cluster's autoscaler has added its nodes; none for a cluster that consists of the nodes it has now."""
    measure_on: str | None = None
    """Custom resource of the nodes on which latency is measured, apart from the trials; none for where the trials run."""
    measure_gpus: Literal[0, 1] | None = None
    """GPUs that a measurement reserves on a node of measure_on: 1, or 0 to time on its CPU; none for what a trial trains on."""
    mlflow_uri: str | None = None
    """MLflow's tracking server; none for a SQLite store in `storage`."""
    mlflow_experiment: Template = "{name}"
    """Name of the experiment; {name} is the search's, {user} the user's. Databricks expects a path: /Shared/gator/{name}."""
    mlflow_model: Template | None = "{name}"
    """Name of the registered model, as above; Unity Catalog expects main.vision.{name}. none: the front is not registered."""
    system_metrics: bool = False
    """Whether CPU, memory and GPUs are recorded in the search's MLflow run every ten seconds: of all nodes with a tracking
    server, of the driver's node with SQLite."""
    env_vars: dict[str, str] = Field(default={})
    """Further environment variables of all workers, such as {GLOO_SOCKET_IFNAME: eth0} where host names resolve to 127.0.0.1,
    or {NCCL_SOCKET_IFNAME: eth0} where machines with GPUs have several networks."""

    def experiment_of(self, name: str) -> str:
        """Return the name of a search's experiment in MLflow."""
        return self.mlflow_experiment.format(name=name, user=getuser())

    def model_of(self, name: str) -> str | None:
        """Return the name of a search's model in MLflow's registry; None if it is not registered."""
        return None if self.mlflow_model is None else self.mlflow_model.format(name=name, user=getuser())

    def shown(self) -> dict[str, Any]:
        """Return the fields as plain values that may be shown: without passwords, and variables by name only."""
        values = self.model_dump(mode="json")
        hidden = dict.fromkeys(self.env_vars, "(not shown)")
        return values | {"mlflow_uri": self.mlflow_uri and masked(self.mlflow_uri), "env_vars": hidden}

    @field_validator("address")
    @classmethod
    def _is_reachable_from_a_driver(cls, address: str | None) -> str | None:
        if address is not None and "://" in address:
            raise ValueError("expected host:port or auto; from outside a cluster, use `ray job submit --address`")
        return address

    @field_validator("storage")
    @classmethod
    def _is_a_folder_or_an_object_store(cls, storage: str) -> str:
        scheme, mark, rest = storage.partition("://")
        if not mark:
            return with_home(storage)
        if scheme not in OBJECT_STORES or not rest.strip("/"):
            raise ValueError(
                f"{masked(storage)} is an unknown kind of address, expected a folder, s3://bucket/... or gs://bucket/..."
            )
        if ":" in rest.partition("/")[0].rpartition("@")[0]:
            raise ValueError(
                f"{masked(storage)} has credentials in it, expected them in the environment (AWS_ACCESS_KEY_ID, ...)"
            )
        return storage

    @field_validator("resources_per_worker")
    @classmethod
    def _names_are_known(cls, resources: dict[str, float]) -> dict[str, float]:
        known = [name.lower() for name in RESOURCE_NAMES]
        for name in resources:
            is_known = name.partition(":")[0] in RESOURCE_NAMES
            if not is_known and difflib.get_close_matches(name.lower(), known, cutoff=0.8):
                raise ValueError(f"{name} is not a known resource{did_you_mean(name, RESOURCE_NAMES)}")
        return resources

    @model_validator(mode="after")
    def _has_a_gpu_for_each_worker(self) -> Self:
        gpus = self.resources_per_worker.get("GPU", 0)
        if gpus > 1:
            raise ValueError(
                f"resources_per_worker has GPU: {gpus:g}, but a worker uses one; set workers_per_trial: {gpus:g}, GPU: 1"
            )
        if 0 < gpus < 1 and self.workers_per_trial > 1:
            raise ValueError(
                f"resources_per_worker has GPU: {gpus:g}, which puts several of the {self.workers_per_trial} workers of a trial on "
                "one GPU, and NCCL refuses that; set workers_per_trial: 1, or GPU: 1"
            )
        return self

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
                "measure_gpus sets how many GPUs a measurement reserves on a node of measure_on, but measure_on is not set; set both"
            )
        return self

    @property
    def gpus_to_measure(self) -> int:
        """The GPUs that a measurement takes: a whole one, or 0 where networks are timed on a CPU."""
        return int(bool(self.resources_per_worker.get("GPU"))) if self.measure_gpus is None else self.measure_gpus

    @property
    def measures_apart(self) -> bool:
        """Whether networks are timed outside their trials: on nodes of measure_on, or because trials share a CPU or a GPU.

        Trials then estimate latency, and all finished networks are timed at the end.
        """
        return self.measure_on is not None or self.resources_per_worker.get("GPU", 0.0) < 1

    @property
    def fewest_workers(self) -> int:
        """The fewest workers that a trial needs."""
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
