"""Where checkpoints go: a disk of its own that can be full, where root may mount one."""

import os
import shutil
import subprocess
from pathlib import Path

_SIZE = "1g"  # of memory, and only what is used of it


class Disk:
    """A tmpfs at `path`; for others than root a plain folder, which cannot be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE},mode=0755", "chaos", str(path)]
        is_root = os.geteuid() == 0
        self.can_fill = is_root and subprocess.run(mount, check=False).returncode == 0

    def fill(self) -> None:
        """Leave no room at all, by making the disk as large as what is on it."""
        used = shutil.disk_usage(self.path).used
        self._remount(str(max(used, 4096)))

    def free(self) -> None:
        self._remount(_SIZE)

    def close(self) -> None:
        if self.can_fill:
            subprocess.run(["umount", "-l", str(self.path)], check=False, timeout=20)

    def _remount(self, size: str) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(self.path)], check=True, timeout=20
        )
