"""MLflow's store: where it is, how one process at a time creates it, what its failures say, how values are stored.

The embedded store is SQLite in write-ahead mode, for a local disk; it holds the artifact folder as an absolute path, so a
storage that was moved keeps its numbers in MLflow but loses its files there.
"""

import json
import logging
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.errors import TrackingError, first_line
from orchestrator.masking import masked, masked_values
from orchestrator.storage.files import lock
from orchestrator.storage.paths import StoragePaths

logger = logging.getLogger(__name__)
logging.getLogger("mlflow.store").setLevel(
    logging.CRITICAL
)  # it logs a traceback per failed write; Delivery logs one line
MAX_TAG_CHARS = 5000
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "smb", "cifs", "fuse.")
"""How the names of their types begin."""
STORE_ERRORS = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)
"""What a store that cannot be reached, opened or written raises."""


def sqlite_uri(storage: StoragePaths) -> str:
    """Return the URI of the embedded store. Raises: TrackingError for a path that a URI would cut off."""
    path = str(storage.mlflow_db.resolve())
    if "?" in path or "%" in path:
        raise TrackingError(
            f"storage {storage.root}: found ? or % in its path, which SQLite's URI cannot hold; choose another folder"
        )
    return f"sqlite:///{path}"


def open_client(uri: str, *, must_exist: bool) -> MlflowClient:
    """Return a client of the store, which is created if it is SQLite and does not exist.

    must_exist: refuse a store of SQLite that does not exist. Raises: TrackingError for one, for an invalid address, and for
    a database whose driver is not installed; STORE_ERRORS for a store that does not answer.
    """
    try:
        _ = urlsplit(uri).port  # ValueError for an invalid address
        path = _sqlite_path(uri)
        if path is not None and (path.exists() or must_exist) and not path.is_file():
            raise TrackingError(f"{masked(uri)}: {path} does not exist, or is not a file")
        return MlflowClient(tracking_uri=uri)
    except (ValueError, ImportError) as error:  # ImportError: of a database's driver
        raise TrackingError(f"mlflow_uri {masked(uri)} cannot be used: {first_line(error)}") from error


def _sqlite_path(uri: str) -> Path | None:
    """Return the file of a store that is SQLite; None for others, and for one in memory."""
    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return None if database in (None, "", ":memory:") else Path(database)


def is_there(uri: str, timeout_s: float) -> bool:
    """Return whether the server of a store answers, whatever it says; True for a store without a server."""
    if not uri.startswith("http"):
        return True
    credentials = get_default_host_creds(uri)
    try:
        http_request(credentials, "/health", "GET", max_retries=0, timeout=timeout_s, raise_on_status=False)
    except MlflowException:
        return False
    return True


@contextmanager
def creation_lock(storage: StoragePaths | None) -> Iterator[None]:
    """Let one process at a time create the SQLite store: MLflow's migrations break when two make the same new file."""
    if storage is None:
        yield
        return
    storage.root.mkdir(parents=True, exist_ok=True)
    _warn_of_network(storage.root)
    descriptor = os.open(storage.root, os.O_RDONLY)
    try:
        lock(descriptor, storage.root, waits=True)
        with closing(sqlite3.connect(storage.mlflow_db)) as connection:
            # stays with the file; 3 times the rate, and readers never wait
            connection.execute("PRAGMA journal_mode=WAL")
        yield
    finally:
        os.close(descriptor)


def _warn_of_network(folder: Path) -> None:
    """Warn if the folder is on a network file system, where SQLite's write-ahead mode damages its file."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        logger.warning(
            "MLflow's SQLite file is in %s, on a network file system (%s), where several nodes damage it: set mlflow_uri in the "
            "cluster's YAML to a tracking server",
            folder,
            kind,
        )


def find_or_create_experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    """Return the id of the experiment of this name. Raises: MlflowException if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        experiment_id: str = client.create_experiment(name, artifact_location)
        return experiment_id
    if experiment.lifecycle_stage == "deleted":
        raise MlflowException(f"its experiment {name!r} was deleted; restore it, or give the search another name")
    if artifact_location is not None and experiment.artifact_location != artifact_location:
        logger.warning(
            "MLflow stores the files of %s in %s, where this store was created", name, experiment.artifact_location
        )
    return str(experiment.experiment_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as MLflow parameters: dotted names; text stays as it is, except for secrets; everything else is JSON.

    >>> flatten({"model": {"name": "resnet18", "weights": None}, "seed": 0})
    {'model.name': 'resnet18', 'model.weights': 'null', 'seed': '0'}
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            shown = masked_values(value)
            flat[prefix + name] = shown if isinstance(shown, str) else json.dumps(shown)
    return flat


def points(values: Mapping[str, Any], timestamp_ms: int, step: int) -> list[Metric]:
    """Return the values as MLflow metrics without what is unknown or not finite: MLflow stores inf as 1.8e308."""
    known = {name: float(value) for name, value in values.items() if value is not None}
    return [Metric(name, value, timestamp_ms, step) for name, value in known.items() if math.isfinite(value)]
