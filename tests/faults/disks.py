"""A disk without room, and one that is away for a while."""

import subprocess
from pathlib import Path


def fill(disk: Path) -> Path:
    """Fill the disk to its last byte; return the file that does it."""
    with open(disk / "filler", "ab", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:
                return disk / "filler"


class RemovableDisk:
    """A folder whose content can go away and come back, as that of a network's file system does. Needs root."""

    def __init__(self, mount_point: Path, content: Path) -> None:
        self.mount_point = mount_point
        self._content = content

    def mount(self) -> None:
        """Show the content at the mount point."""
        subprocess.run(["mount", "--bind", self._content, self.mount_point], check=True)

    def unmount(self) -> None:
        """Take it away; files that are open stay so."""
        subprocess.run(["umount", "--lazy", self.mount_point], check=True)
