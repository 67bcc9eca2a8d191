"""What several files of faults need."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.disks import RemovableDisk


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 512 KiB, or of the size that the test asks for as this fixture's parameter."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = getattr(request, "param", "512k")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def removable_disk(tmp_path: Path) -> Iterator[RemovableDisk]:
    """Return a disk that is mounted and empty."""
    folders = tmp_path / "mount_point", tmp_path / "content"
    for folder in folders:
        folder.mkdir()
    disk = RemovableDisk(*folders)
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk.mount()
    try:
        yield disk
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # it is away
            disk.unmount()
