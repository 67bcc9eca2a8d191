"""How a trial's files travel where the storage is an object store: the worker of rank 0 sends them, the head receives them.

Workers see no disk of the head. Each works on a copy of its own, made from the store at its start and removed at its end. Before a
checkpoint is reported, the files that belong to it are in the store; between checkpoints they are sent every few seconds.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock

from orchestrator.config.trial import with_values
from orchestrator.errors import StorageError
from orchestrator.storage.addresses import AddressedFolder, Stamp, repeated
from orchestrator.storage.files import wait_until_reachable, write_atomic
from orchestrator.storage.paths import StoragePaths, TrialPaths
from orchestrator.trial.assignment import Assignment

logger = logging.getLogger(__name__)
EVERY_S = 2.0
"""Seconds between two looks at what has changed."""


class Outbox:
    """Sends the files below a folder that have changed since the last time."""

    def __init__(self, folder: Path, store: AddressedFolder, name: str) -> None:
        self._folder = folder
        self._store = store
        self._name = name
        self._lock = Lock()
        self._sent = self._stamps()

    def send(self) -> None:
        """Send what has changed. Raises: StorageError."""
        with self._lock:
            for path, stamp in self._stamps().items():
                if self._sent.get(path) != stamp:
                    name = f"{self._name}/{path.relative_to(self._folder).as_posix()}"
                    self._store.write(name, path.read_bytes())
                    self._sent[path] = stamp

    def _stamps(self) -> dict[Path, Stamp]:
        found = (path for path in sorted(self._folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
        return {path: (stat.st_size, stat.st_mtime_ns) for path in found for stat in [path.stat()]}


class Inbox:
    """Receives the files below a folder of the store that have changed since the last time."""

    def __init__(self, folder: Path, store: AddressedFolder, name: str) -> None:
        self._folder = folder
        self._store = store
        self._name = name
        self._received: dict[str, Stamp] = {}

    def receive(self, *, wanted: tuple[str, ...] = ("",)) -> None:
        """Write what has changed into the folder. wanted: how the names begin. Raises: StorageError."""
        for name, stamp in self._store.stamps(self._name).items():
            own = name.removeprefix(f"{self._name}/")
            is_hidden = own.startswith((".", "ray/"))
            if own.startswith(wanted) and not is_hidden and self._received.get(name) != stamp:
                write_atomic(self._folder / own, self._store.read(name))
                self._received[name] = stamp


@contextmanager
def files_received(assignment: Assignment) -> Iterator[Callable[[], bool]]:
    """On the head, while the workers train: their files arrive in the trial's folder, and a stop file there reaches them.

    Yields a function that waits until the storage is reachable, and returns whether it was away.
    """
    paths = TrialPaths(assignment.folder)
    if assignment.storage is None:
        yield lambda: _waited(paths.config.is_file, lambda: wait_until_reachable(paths.config))
        return
    store, name = AddressedFolder(str(assignment.storage.address)), assignment.storage.name_of(assignment.folder)
    inbox, stop = Inbox(paths.root, store, name), f"{name}/{paths.stop.name}"
    config = f"{name}/{paths.config.name}"
    is_stop_sent = paths.stop.exists()

    def prepare() -> None:
        """Send what the workers need, and receive what earlier ones have left."""
        store.write(config, paths.config.read_bytes())
        if not is_stop_sent:
            store.remove_file(stop)
        inbox.receive()

    def exchange() -> None:
        """Receive the epochs and the log, and send the request to stop."""
        nonlocal is_stop_sent
        if paths.stop.exists() and not is_stop_sent:
            store.write(stop, b"")
            is_stop_sent = True
        inbox.receive(wanted=(paths.metrics.name, paths.log.name))

    store.waited_for(prepare)
    try:
        with repeated(exchange, EVERY_S, f"files of {assignment.name}"):
            yield lambda: _waited(
                lambda: store.is_there(config), lambda: store.waited_for(lambda: store.read(config)) and None
            )
    except BaseException:
        with suppress(StorageError):
            inbox.receive()
        raise
    store.waited_for(inbox.receive)


def _waited(is_there: Callable[[], bool], wait: Callable[[], object]) -> bool:
    """Wait if the storage is away; return whether it was."""
    try:
        was_away = not is_there()
    except OSError:  # Path.is_file raises if the mount is away
        was_away = True
    wait()
    return was_away


@contextmanager
def files_sent(assignment: Assignment, *, is_sender: bool) -> Iterator[tuple[Assignment, Callable[[], None]]]:
    """On a worker: yield the assignment with paths of its own copy, and a function that sends what has changed, to be called before a
    checkpoint is reported. It waits while the store is away. With a storage that all nodes mount there is no copy.

    is_sender: whether this is rank 0, which writes files.
    """
    if assignment.storage is None:
        yield assignment, lambda: None
        return
    store = AddressedFolder(str(assignment.storage.address))
    with tempfile.TemporaryDirectory(prefix="gator-") as root:
        copy = store.waited_for(lambda: _copied(assignment, store, Path(root).resolve()))
        if not is_sender:
            yield copy, lambda: None
            return
        paths = TrialPaths(copy.folder)
        name = assignment.storage.name_of(assignment.folder)
        outbox = Outbox(copy.folder, store, name)

        def exchange() -> None:
            """Send what has changed, and receive the request to stop."""
            outbox.send()
            if store.is_there(f"{name}/{paths.stop.name}"):
                paths.stop.touch()

        try:
            with repeated(exchange, EVERY_S, f"files of {assignment.name}"):
                yield copy, lambda: store.waited_for(outbox.send)
        except BaseException:
            with suppress(StorageError):
                outbox.send()
            raise
        store.waited_for(outbox.send)


def _copied(assignment: Assignment, store: AddressedFolder, root: Path) -> Assignment:
    """Copy what the assignment names below the storage, and return it with the paths of the copy."""
    assert assignment.storage is not None
    storage = assignment.storage

    def copied(path: Path) -> Path:
        """Copy a folder, and return its path here."""
        name = storage.name_of(path)
        Inbox(root / name, store, name).receive()
        return root / name

    def copied_file(path: Path | None) -> Path | None:
        """Copy a file, and return its path here."""
        if path is None:
            return None
        name = storage.name_of(path)
        write_atomic(root / name, store.read(name))
        return root / name

    copy = replace(
        assignment,
        folder=copied(assignment.folder),
        base_weights=copied_file(assignment.base_weights),
        latency_curve=copied_file(assignment.latency_curve),
    )
    config = copy.config
    if config.gating.start_from is not None and storage.holds(Path(config.gating.start_from)):
        start_from = copied(Path(config.gating.start_from))
        config = with_values(config, {"gating.start_from": str(start_from)})
        write_atomic(TrialPaths(copy.folder).config, config.to_json())
    return copy


def storage_of(storage: StoragePaths) -> StoragePaths | None:
    """Return what an assignment's `storage` is: the storage if it is an object store."""
    return None if storage.address is None else replace(storage, root=storage.root.resolve())
