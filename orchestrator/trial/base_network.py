"""The network that the trials start from: trained once for all of them."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gator
from gator.pruning.weights import load_weights
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.trial import TrialConfig
from orchestrator.models import networks as models
from orchestrator.models.saved import save_base
from orchestrator.storage.addresses import AddressedFolder
from orchestrator.storage.files import lock, open_lock, remove_leftovers, write_atomic
from orchestrator.storage.paths import BasePaths, StoragePaths
from orchestrator.storage.records import EpochMetrics
from orchestrator.trial.assignment import Assignment
from orchestrator.trial.exchange import Inbox, storage_of
from orchestrator.trial.train_run import fit_here

logger = logging.getLogger(__name__)
"""How the base network was made, for people; this program does not read it."""
BASE_RECORD_VERSION = 1


def ensure_base(
    config: TrialConfig, storage: StoragePaths, cluster: ClusterConfig, stop_files: list[Path] | None = None
) -> Path:
    """Return the weights that trials of this config start from; trains them if the storage does not hold them yet.

    They are shared by all searches with the same TrialConfig.base_hash(); of two that need them at once, one trains and
    the other waits. Damaged weights are made again.
    stop_files: gets the network's stop file before its training begins, if that happens in this process.
    Weights in a file are known by its content, so that a file that was replaced gives another network.
    Raises: TrialError, UserError; RunDirError if a file of it is a link.
    """
    paths = storage.base(config.base_hash())
    paths.root.mkdir(parents=True, exist_ok=True)
    with _exclusive(paths.root / ".lock"):
        paths.refuse_links()
        remove_leftovers(paths.root)
        store = None if storage.address is None else AddressedFolder(storage.address)
        if store is not None and not paths.weights.exists():
            Inbox(paths.root, store, storage.name_of(paths.root)).receive()
        if not _is_there(paths.weights):
            paths.stop.unlink(missing_ok=True)  # left by an interrupted process
            if stop_files is not None:
                stop_files.append(paths.stop)
            metrics = _make_base(config, paths, cluster, storage)
            record = {"version": BASE_RECORD_VERSION, "config": config.model_dump(mode="json"), "metrics": metrics}
            write_atomic(paths.record, json.dumps(record, indent=2))
        if store is not None:
            for file in (paths.record, paths.weights):  # the weights last: they show that all is there
                if file.exists() and not store.is_there(name := storage.name_of(file)):
                    store.write(name, file.read_bytes())
    return paths.weights


def _is_there(weights: Path) -> bool:
    """Return whether the base network exists and is undamaged."""
    if not weights.is_file():
        return False
    try:
        load_weights(weights)
    except gator.ArtifactError as error:
        logger.warning("the base network is made again: %s", error)
        return False
    return True


def _make_base(config: TrialConfig, paths: BasePaths, cluster: ClusterConfig, storage: StoragePaths) -> EpochMetrics:
    config.model.with_digest()  # refuses a file that was replaced since
    if config.pretraining.epochs == 0:
        save_base(models.build(config.model), paths)
        return {}
    assignment = Assignment.of(
        config, name="base", folder=paths.root.resolve(), base_weights=None, storage=storage_of(storage)
    )
    return fit_here(assignment, cluster, storage.place(paths.ray))


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file; waits for another process that holds it. The kernel releases it when the process dies."""
    with open_lock(path) as file:
        try:
            lock(file, path, waits=False)
        except BlockingIOError:
            logger.info("this search waits for another one that trains the same base network (%s)", path.parent)
            lock(file, path, waits=True)
        yield
