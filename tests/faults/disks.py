"""A disk without room."""

from pathlib import Path


def fill(disk: Path) -> Path:
    """Fill the disk to its last byte; return the file that does it."""
    with open(disk / "filler", "ab", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                return disk / "filler"
