import errno
import os
import stat
from pathlib import Path

import pytest

import gator.files
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.storage.files import LEFTOVER_PREFIX, remove_leftovers, remove_old_leftovers, write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths


def test_write_atomic_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.txt"
    write_atomic(target, "first, and longer")
    write_atomic(target, b"second")
    assert target.read_bytes() == b"second"
    assert os.listdir(target.parent) == ["file.txt"]


def test_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.txt"
    write_atomic(target, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_rename_is_flushed_where_the_file_system_does_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []

    def refuses_folders(descriptor: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if flushed[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses_folders)
    for write in (write_atomic, gator.files.write_atomic):
        write(tmp_path / "file.txt", b"new")
    assert flushed == [False, True] * 2


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    trial = RunPaths(tmp_path).trial("trial_0000").root
    (trial / f"{LEFTOVER_PREFIX}folder").mkdir(parents=True)
    for path in (tmp_path / f"{LEFTOVER_PREFIX}a", trial / f"{LEFTOVER_PREFIX}b", trial / f"{LEFTOVER_PREFIX}folder/c"):
        path.touch()
    (tmp_path / f"{LEFTOVER_PREFIX}link").symlink_to(trial)
    (trial / "log.txt").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == ["log.txt"]


def test_what_may_still_be_written_is_left_alone(tmp_path: Path) -> None:
    """In a folder that nobody holds a lock of, and that may be somebody's home."""
    names = (".tmp.old.json.0123abcd", ".tmp.young.json.0123abcd", ".tmp.driveupload", ".tmp.notes.txt")
    old, young, *others = (tmp_path / name for name in names)
    for path in (old, young, others[1]):
        path.touch()
    others[0].mkdir()
    for path in (old, *others):
        os.utime(path, (0, 0))
    remove_old_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, *others])


def test_written_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    write_atomic(tmp_path / "atomic", "x")
    (tmp_path / "ordinary").write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_run_directory_is_laid_out_as_documented(tmp_path: Path) -> None:
    run = StoragePaths(tmp_path).run("digits")
    trial = run.trial("trial_0007")
    assert run.results == tmp_path / "digits" / "results.parquet"
    assert run.pareto == tmp_path / "digits" / "pareto.json"
    assert trial.weights == tmp_path / "digits" / "trials" / "trial_0007" / "weights.safetensors"


def test_trial_ids_are_sorted_and_empty_before_the_first_trial(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    assert run.trial_ids() == []
    for trial_id in ("trial_0001", "trial_0000"):
        run.trial(trial_id).root.mkdir(parents=True)
    assert run.trial_ids() == ["trial_0000", "trial_0001"]


def test_user_errors_exit_with_2_and_others_with_1() -> None:
    assert UserError.exit_code == 2
    assert OrchestratorError.exit_code == 1
