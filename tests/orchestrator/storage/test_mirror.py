"""The copy of a run directory in an object store, and a trial whose files travel through one; the store is a folder here."""

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ConfigError, RunDirError
from orchestrator.storage import mirror as module
from orchestrator.storage.addresses import AddressedFolder
from orchestrator.storage.fetching import fetched
from orchestrator.storage.mirror import Holder, Mirror
from orchestrator.storage.paths import RunPaths, StoragePaths, TrialPaths
from orchestrator.storage.records import read_metrics
from orchestrator.storage.run_dir import claim
from orchestrator.training.checkpoint import Checkpoint
from orchestrator.training.saver import StoppedError
from orchestrator.trial import exchange
from orchestrator.trial.worker import run_assignment
from tests.orchestrator import planted
from tests.orchestrator.tiny_trial import MemorySession, assign


@pytest.fixture
def storage(tmp_path: Path) -> StoragePaths:
    """A storage in a store that is empty."""
    return StoragePaths(tmp_path / "local", f"file://{tmp_path}/store")


def mirror_of(storage: StoragePaths, *, is_taken: bool = False) -> tuple[RunPaths, Mirror]:
    run = storage.run("planted")
    return run, Mirror(storage, run, is_taken=is_taken)


def begin(storage: StoragePaths) -> RunPaths:
    """Run a search that writes a row, of a trial whose worker sends its files, and end its process."""
    run, mirror = mirror_of(storage)
    with claim(run, planted.search_config(), mirror):
        AddressedFolder(storage.place(run.root)).write("trials/trial_0000/weights.safetensors", b"weights")
        run.reports.write_bytes(b"a row")
        run.study.write_bytes(b"its trial")
    return run


def sign(storage: StoragePaths, host: str, age_s: float = 0.0, is_open: bool = True, token: str = "") -> None:
    """Leave the sign of a process on this host. token: of its run directory; "" as an earlier release did."""
    holder = Holder(host=host, time_s=time.time() - age_s, is_open=is_open, token=token)
    AddressedFolder(storage.place(storage.run("planted").root)).write(module.HOLDER, holder.model_dump_json().encode())


def test_a_run_whose_disk_is_lost_is_fetched(storage: StoragePaths) -> None:
    run = begin(storage)
    expected = {name: (run.root / name).read_bytes() for name in ("search.json", "reports.jsonl", "study.log")}
    shutil.rmtree(storage.root)
    run, mirror = mirror_of(storage)
    with claim(run, planted.search_config(), mirror, must_exist=True):
        assert {name: (run.root / name).read_bytes() for name in expected} == expected
        assert run.trial("trial_0000").weights.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("host", "age_s", "is_open", "is_taken", "is_refused"),
    [
        ("other", 10, True, False, True),
        ("other", 10, True, True, False),
        ("other", 10, False, False, False),
        ("other", module.HELD_S + 1, True, False, False),
        (socket.gethostname(), 10, True, False, False),
    ],
    ids=["at work elsewhere", "taken over", "ended elsewhere", "silent for long", "killed here, by an earlier release"],
)
def test_one_head_at_a_time_works_in_a_run(
    storage: StoragePaths, host: str, age_s: float, is_open: bool, is_taken: bool, is_refused: bool
) -> None:
    run = begin(storage)
    sign(storage, host, age_s, is_open)
    run.reports.write_bytes(b"a row of long ago")
    run, mirror = mirror_of(storage, is_taken=is_taken)
    if is_refused:
        with pytest.raises(RunDirError, match=r"in use by a process on other, 10 s ago; .*--take-over"):
            claim(run, planted.search_config(), mirror).__enter__()
        return
    with claim(run, planted.search_config(), mirror):
        # what another head has left is newer than this disk
        assert run.reports.read_bytes() == (b"a row" if host == "other" else b"a row of long ago")


def test_two_folders_on_one_host_are_two_heads(storage: StoragePaths) -> None:
    other = replace(storage, root=storage.root.with_name("other"))
    run, mirror = mirror_of(storage)
    other_run, other_mirror = mirror_of(other)
    with claim(run, planted.search_config(), mirror):
        run.reports.write_bytes(b"a row")
        with pytest.raises(RunDirError, match=r"in another folder of this machine or in one .* --take-over if"):
            claim(other_run, planted.search_config(), other_mirror).__enter__()
    with claim(other_run, planted.search_config(), other_mirror):
        assert other_run.reports.read_bytes() == b"a row"
        other_run.reports.write_bytes(b"another row")
    with claim(run, planted.search_config(), mirror):
        assert run.reports.read_bytes() == b"another row"


def test_a_head_that_was_killed_resumes_at_once(storage: StoragePaths) -> None:
    run = begin(storage)
    sign(storage, module.HOST, token=run.lock.read_text())
    run.reports.write_bytes(b"a row of this disk alone")
    with claim(run, planted.search_config(), mirror_of(storage)[1]):
        assert run.reports.read_bytes() == b"a row of this disk alone"


def test_a_refusal_leaves_no_folder(storage: StoragePaths) -> None:
    sign(storage, "other")
    run, mirror = mirror_of(storage)
    with pytest.raises(RunDirError, match="in use"):
        claim(run, planted.search_config(), mirror).__enter__()
    assert not storage.root.exists()


def test_a_head_whose_run_was_taken_over_stops(storage: StoragePaths) -> None:
    begin(storage)
    run, mirror = mirror_of(storage)
    with claim(run, planted.search_config(), mirror):
        run.reports.write_bytes(b"another row")
        sign(storage, "other")
        with pytest.raises(RunDirError, match="was taken over by a process on other"):
            mirror.save()
    store = AddressedFolder(storage.place(run.root))
    assert store.read("reports.jsonl") == b"a row"
    assert Holder.model_validate_json(store.read(module.HOLDER)).host == "other"


def test_the_copy_has_what_the_run_directory_has(storage: StoragePaths) -> None:
    run = begin(storage)
    run.trials.joinpath("trial_0001").mkdir(parents=True)
    run.trial("trial_0001").weights.write_bytes(b"other weights")  # the store was emptied
    run, mirror = mirror_of(storage)
    with claim(run, planted.search_config(), mirror):
        run.report.write_text("page")
        mirror.save()
        run.reports.unlink()
        run.report.write_text("another page")
        mirror.save()
        found = AddressedFolder(storage.place(run.root))
        assert set(found.stamps()) == {
            "mirror.json", "report.html", "search.json", "study.log",
            "trials/trial_0000/weights.safetensors", "trials/trial_0001/weights.safetensors",
        }  # fmt: skip
        assert found.read("report.html") == b"another page"


def test_a_new_run_starts_in_an_empty_folder_of_the_store(storage: StoragePaths) -> None:
    run, mirror = mirror_of(storage)
    store = AddressedFolder(storage.place(run.root))
    store.write("ray/train/trial_0000/checkpoint_1/state.json", b"of a run that was refused")
    with claim(run, planted.search_config(), mirror):
        assert set(store.stamps()) == {"mirror.json"}


def test_what_is_not_in_the_store_is_one_error(storage: StoragePaths) -> None:
    with (
        pytest.raises(RunDirError, match=r"store/planted holds none of search\.json, expected the address of a run"),
        fetched(storage.place(storage.root / "planted"), "search.json"),
    ):
        pass


def trial_in_a_store(tmp_path: Path, storage: StoragePaths) -> tuple[TrialPaths, Callable[[MemorySession], object]]:
    """Return the head's folder of a tiny trial, and what runs it on a worker that sees the store alone."""
    assignment = replace(assign(tmp_path / "local"), storage=storage)
    assert assignment.base_weights is not None
    store = AddressedFolder(str(storage.address))
    store.write(storage.name_of(assignment.base_weights), assignment.base_weights.read_bytes())
    assignment.base_weights.unlink()

    def run(session: MemorySession) -> object:
        """Run it to its end."""
        report = session.report

        with exchange.files_received(assignment), exchange.files_sent(assignment, is_sender=True) as (copy, send):

            def sent_first(*values: object) -> None:
                send()
                report(*values)  # type: ignore[arg-type]

            session.report = sent_first  # type: ignore[assignment]
            session.folder_of_worker = copy.folder  # type: ignore[attr-defined]
            assert not copy.folder.is_relative_to(tmp_path)
            return run_assignment(copy, session)

    return TrialPaths(assignment.folder), run


def test_a_trial_through_a_store_leaves_its_files_on_the_head(tmp_path: Path, storage: StoragePaths) -> None:
    paths, run = trial_in_a_store(tmp_path, storage)
    session = MemorySession(tmp_path / "checkpoints")
    run(session)
    assert [row["epoch"] for row in read_metrics(paths.metrics)] == [1, 2, 3, 4, 4]
    assert paths.weights.exists()
    assert paths.architecture.exists()
    assert "final" in paths.log.read_text()


def test_a_request_to_stop_reaches_the_worker(
    tmp_path: Path, storage: StoragePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "EVERY_S", 0.01)
    paths, run = trial_in_a_store(tmp_path, storage)

    class Stopping(MemorySession):
        """Is asked to stop after the first epoch, and waits until its worker knows."""

        def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
            """Ask."""
            super().report(metrics, checkpoint)
            paths.stop.touch()
            while not TrialPaths(self.folder_of_worker).stop.exists():  # type: ignore[attr-defined]
                time.sleep(0.01)

    with pytest.raises(StoppedError):
        run(Stopping(tmp_path / "checkpoints"))
    assert "stopped on request, and saved" in paths.log.read_text()


def test_files_are_in_the_store_before_the_checkpoint_that_needs_them(tmp_path: Path, storage: StoragePaths) -> None:
    paths, run = trial_in_a_store(tmp_path, storage)
    store, name = AddressedFolder(str(storage.address)), storage.name_of(paths.root)
    rows: list[int] = []

    class Watching(MemorySession):
        """Looks into the store whenever a checkpoint is kept."""

        def report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
            """Count the epochs that the store has."""
            (tmp_path / "seen").write_bytes(store.read(f"{name}/metrics.parquet"))
            rows.append(len(read_metrics(tmp_path / "seen")))
            if checkpoint.stage == "done":
                assert store.is_there(f"{name}/weights.safetensors")

    run(Watching(tmp_path / "checkpoints"))
    assert rows == [1, 2, 3, 4, 5]


def test_an_address_of_another_kind_is_refused() -> None:
    from orchestrator.config.cluster import ClusterConfig
    from orchestrator.config.messages import validate

    for storage, message in (
        ("ftp://host/runs", "unknown kind of address, expected a folder, s3://"),
        ("s3://", "unknown kind of address"),
        ("s3://key:secret@bucket/runs", "has credentials in it, expected them in the environment"),
    ):
        with pytest.raises(ConfigError, match=message) as found:
            validate(ClusterConfig, {"storage": storage}, "cluster x")
        assert "secret@" not in str(found.value)
