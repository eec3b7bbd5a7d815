"""Where checkpoints go: a disk of its own that can be full, where root may mount one."""

import os
import shutil
import subprocess
from pathlib import Path

_SIZE = "1g"  # of memory, and only what is used of it
_TRIES = 50


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
        for _ in range(_TRIES):
            used = shutil.disk_usage(self.path).used
            if self._remount(str(max(used, 4096))):
                return
        raise OSError(f"{self.path} cannot be filled: it grows faster than it is measured")

    def free(self) -> None:
        if not self._remount(_SIZE):
            raise OSError(f"{self.path} cannot be given its size again")

    def close(self) -> None:
        if self.can_fill:
            subprocess.run(["umount", "-l", str(self.path)], check=False, timeout=20)

    def _remount(self, size: str) -> bool:
        """Whether the disk is of this size now: none may be smaller than what is on it."""
        command = ["mount", "-o", f"remount,size={size}", str(self.path)]
        found = subprocess.run(command, check=False, capture_output=True, timeout=20)
        return found.returncode == 0
