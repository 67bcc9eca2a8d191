"""Repeats a trial from its record in MLflow: `search --from-run RUN_ID`.

It reads the trial's config.json and the search.yaml of its search from MLflow; the run directory is not needed. The trial
becomes a search of its own with one trial and no searched parameters, so it is measured and recorded like the first time.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.tracking.context.registry import resolve_tags
from pydantic import ValidationError

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.metrics import TRIAL
from orchestrator.config.search import SchedulerConfig, SearchAlgorithmConfig, SearchConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.config.yaml_files import load_yaml
from orchestrator.errors import ConfigError, TrackingError, first_line
from orchestrator.masking import masked
from orchestrator.storage.files import read_text
from orchestrator.storage.paths import StoragePaths
from orchestrator.tracking.store import STORE_ERRORS, open_client, sqlite_uri

logger = logging.getLogger(__name__)
TRUSTED = ("timm", "torchvision.models")
"""Modules whose functions a record may name."""
COMMIT, PARENT, TRIAL_ID = "mlflow.source.git.commit", "mlflow.parentRunId", "gator.trial_id"


def recorded_trial(run_id: str, cluster: ClusterConfig, trusted: Sequence[str] = ()) -> SearchConfig:
    """Return the search that repeats the trial recorded as this MLflow run; warn if it was made by another commit.

    Its name is <search>-<trial>-<first digits of the run id>, so it is next to the first one.
    trusted: modules whose functions it may name as well, with all that they contain: a person who can write to a shared MLflow
    would otherwise choose what this machine imports and calls.
    Raises: TrackingError if the store or the run cannot be read; ConfigError if the run is not a trial, names a function of
    another module, or does not fit this version.
    """
    storage = StoragePaths.at(cluster.storage, cluster.local)
    uri = cluster.mlflow_uri or sqlite_uri(storage)
    if cluster.mlflow_uri is None and not storage.mlflow_db.is_file():
        raise TrackingError(
            f"--from-run {run_id}: there is no {storage.mlflow_db}; give the --cluster and --run-dir of that search, on the machine "
            "where it ran, or the mlflow_uri of a server"
        )
    try:
        client = open_client(uri, must_exist=True)  # a plan writes nothing
        run = client.get_run(run_id)
        _check_kind(run)
        trial_json = _artifact(client, run_id, "config.json")
        search_yaml = _artifact(client, run.data.tags[PARENT], "search.yaml")
    except STORE_ERRORS as error:
        raise TrackingError(
            f"--from-run {run_id}: cannot read its files from {masked(uri)}: {first_line(error)}"
        ) from error
    _check_commit(run)
    try:
        search = load_yaml(search_yaml, f"--from-run {run_id}: its search.yaml")
        config = _one_trial(SearchConfig.model_validate(search), trial_json, run)
    except ValidationError as error:
        raise ConfigError(f"--from-run {run_id}: its record does not fit this version: {error}") from error
    for model in (config.base.model, *(reference.model for reference in config.references)):
        _check_trust(model.name, run_id, trusted)
    return config


def _check_trust(name: str, run_id: str, trusted: Sequence[str]) -> None:
    module, separator, _ = name.partition(":")
    if separator and not any(f"{module}.".startswith(f"{known}.") for known in (*TRUSTED, *trusted)):
        raise ConfigError(
            f"--from-run {run_id}: its model is {name}, a function that this command would import and call; expected a network by "
            f"its short name or of {' or '.join(TRUSTED)}; if you trust that code, add --trust {module.partition('.')[0]}"
        )


def _check_kind(run: Run) -> None:
    tags = run.data.tags
    if tags.get("gator.kind") != TRIAL or not {PARENT, TRIAL_ID} <= tags.keys():
        raise ConfigError(
            f"--from-run {run.info.run_id}: found a run of kind {tags.get('gator.kind', 'of another program')}, expected one "
            f"trial of a search, with its tags {PARENT} and {TRIAL_ID}; find its id on its page in MLflow"
        )


def _artifact(client: MlflowClient, run_id: str, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(run_id, name, folder))
        return read_text(path, ConfigError, f"the record of run {run_id} in MLflow is damaged")


def _one_trial(search: SearchConfig, trial_json: str, run: Run) -> SearchConfig:
    trial = TrialConfig.model_validate_json(trial_json)
    name = f"{search.name}-{run.data.tags[TRIAL_ID]}-{run.info.run_id[:8]}"
    once = SearchAlgorithmConfig(algorithm="random", num_trials=1, seed=search.search.seed)
    values = {"name": name, "base": trial, "params": {}, "search": once, "scheduler": SchedulerConfig(type="none")}
    return SearchConfig.model_validate(dict(search) | values)


def _check_commit(run: Run) -> None:
    """Warn if the code is of another commit: the same config may give another network then."""
    recorded, here = run.data.tags.get(COMMIT), resolve_tags().get(COMMIT)
    if recorded is None or recorded != here:
        logger.warning("run %s was made by commit %s, this is %s: results may differ", run.info.run_id, recorded, here)
