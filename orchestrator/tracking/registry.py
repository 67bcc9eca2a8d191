"""The networks of the front as MLflow models, in the registry under the name of the space.

    mlflow.pyfunc.load_model("models:/digits@best")     numpy (N, channels, height, width) in, logits (N, classes) out
    mlflow.pytorch.load_model("models:/digits@best")    a torch module in eval mode, for any N

A model is a torch.export program: no pickle, and neither this project nor the network's class is needed to load it. In its
extra_files/ are architecture.json and weights.safetensors, from which gator.load_pruned makes a network that trains.

    alias best                  the most accurate network of the search (its first objective)
    alias knee                  the best balance of its front
    alias best-latency_ms-1_5   the best with latency_ms <= 1.5; one for each constraint and budget of the space

Aliases that name another search's networks stay, unless they are asked to move (--promote): people deploy by alias.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from orchestrator.config.trial import TrialConfig
from orchestrator.reporting.outcome import Outcome
from orchestrator.storage.files import LEFTOVER_PREFIX
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import Row
from orchestrator.storage.run_dir import read_trial_config
from orchestrator.tracking.search_run import SearchRun
from orchestrator.tracking.store import MAX_TAG_CHARS

logger = logging.getLogger(__name__)
Package = Callable[[list[str], str], dict[str, str]]
"""Trial ids and a folder -> {trial id: why there is no model of it}."""


class Registry:
    """Puts packaged networks into MLflow's registry; doing it again changes nothing. Writes are unguarded."""

    def __init__(self, client: MlflowClient, search: SearchRun, name: str, *, promotes: bool) -> None:
        """search: whose networks these are.    promotes: whether aliases of other searches' networks move to this one."""
        self._client = client
        self._search = search
        self._name = name
        self._promotes = promotes

    def register(self, outcome: Outcome, run: RunPaths, run_ids: Mapping[str, str], package: Package) -> list[str]:
        """Register the networks of the front and of the aliases that have no version yet, and set the aliases.

        run_ids: trial id -> run in MLflow. package: writes the networks of trials into a folder, see packaging.package().
        Returns: the aliases that stay with another search's networks.
        """
        self._create()
        rows = {row["trial_id"]: row for row in (*outcome.front, *aliases(outcome).values())}
        registered = self._versions()
        missing = [name for name in rows if name in run_ids and run_ids[name] not in registered]
        # absolute: a process of Ray, whose working directory may be another, writes there
        with tempfile.TemporaryDirectory(dir=run.root.resolve(), prefix=LEFTOVER_PREFIX) as folder:
            errors = package(missing, folder) if missing else {}
            for trial_id in missing:
                if trial_id in errors:
                    logger.warning("%s is not registered in MLflow: %s", trial_id, errors[trial_id])
                    self._client.set_tag(run_ids[trial_id], "gator.export_error", errors[trial_id][:MAX_TAG_CHARS])
                else:
                    config = read_trial_config(run.trial(trial_id))
                    self._add(rows[trial_id], run_ids[trial_id], config, Path(folder, trial_id))
        return self._set_aliases(outcome, run_ids)

    def _create(self) -> None:
        """Create the registered model, unless it is there."""
        try:
            self._client.get_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            description = f"Pruned networks of the space {self._search.config.name}."
            self._client.create_registered_model(self._name, description=description)

    def _add(self, row: Row, run_id: str, config: TrialConfig, folder: Path) -> None:
        """Upload one packaged network, link it to its run, numbers and data, and make it a version of the model.

        row: as in results.parquet. folder: what package() wrote.
        """
        dataset = _dataset(config)
        model_id = self._uploaded(run_id) or self._upload(row, run_id, config, folder)
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "test")])])
        self._client.log_batch(run_id, metrics=list(self._metrics(row, run_id, model_id, dataset)))
        self._client.create_model_version(
            self._name,
            # not models:/<id>, which MLflow 3.17 looks up in the process's default store instead of this client's
            source=self._client.get_logged_model(model_id).artifact_location,
            run_id=run_id,
            model_id=model_id,
            tags={"gator.trial_id": row["trial_id"], "gator.search_id": self._search.search_id},
        )

    def _uploaded(self, run_id: str) -> str | None:
        """Return the model of a run that was uploaded before, by a process that ended before it registered it."""
        outputs = self._client.get_run(run_id).outputs
        return outputs.model_outputs[0].model_id if outputs and outputs.model_outputs else None

    def _upload(self, row: Row, run_id: str, config: TrialConfig, folder: Path) -> str:
        model = self._client.create_logged_model(
            self._search.experiment_id,
            name=row["trial_id"],
            source_run_id=run_id,
            model_type="pruned",
            params={"model": config.model.name, "macs_ratio": f"{row['macs_ratio']:.4f}"},
            tags={"gator.trial_id": row["trial_id"], "gator.latency_device": str(row["latency_device"])},
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return str(model.model_id)

    def _set_aliases(self, outcome: Outcome, run_ids: Mapping[str, str]) -> list[str]:
        """Point the aliases at the versions of this search, remove its own that name nothing any more; return those that stay."""
        versions, wanted = self._versions(), aliases(outcome)
        old = self._client.get_registered_model(self._name).aliases
        own = {str(versions[run_id].version) for run_id in run_ids.values() if run_id in versions}
        kept = [alias for alias, version in old.items() if str(version) not in own and not self._promotes]
        for alias in old:
            if alias not in (*wanted, *kept) and (alias in ("best", "knee") or alias.startswith("best-")):
                self._client.delete_registered_model_alias(self._name, alias)
        for alias, row in wanted.items():
            version = versions.get(run_ids.get(row["trial_id"], ""))
            if version is not None and alias not in kept:
                self._client.set_registered_model_alias(self._name, alias, version.version)
        return [alias for alias in wanted if alias in kept]

    def _versions(self) -> dict[str, ModelVersion]:
        """Return run id -> version."""
        found = self._client.search_model_versions(f"name = '{self._name}'", max_results=10_000)
        return {version.run_id: version for version in found if version.run_id}

    def _metrics(self, row: Row, run_id: str, model_id: str, dataset: Dataset) -> Iterator[Metric]:
        """Yield the run's final numbers once more, tied to model and data: equal points are stored once."""
        for name, value in self._client.get_run(run_id).data.metrics.items():
            if "/" in name or row.get(name) is None:  # an epoch's
                continue
            last = self._client.get_metric_history(run_id, name)[-1]
            tied = {"model_id": model_id, "dataset_name": dataset.name, "dataset_digest": dataset.digest}
            yield Metric(name, value, last.timestamp, last.step, **tied, run_id=run_id)


def aliases(outcome: Outcome) -> dict[str, Row]:
    """Return the registry's aliases and the finished network that each names."""
    if not outcome.front:
        return {}
    found: dict[str, Row | None] = {"best": outcome.front[0], "knee": outcome.knee}
    limits = [(constraint.metric, constraint.max) for constraint in outcome.config.constraints]
    limits += [(budget.metric, budget.max) for budget in outcome.config.budgets]
    for metric, limit in limits:
        if limit is not None:
            # a dot is not allowed in an alias
            name = f"best-{metric}-{limit:.12g}".replace(".", "_").replace("+", "")
            found[name] = outcome.best_under({metric: limit})
    return {alias: row for alias, row in found.items() if row is not None}


def _dataset(config: TrialConfig) -> Dataset:
    """Return what accuracies were taken on, by name and by a digest of the data's config."""
    source = config.data.model_dump_json()
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    return Dataset(name=config.data.name, digest=digest, source_type="orchestrator.datasets", source=source)
