"""A disk for checkpoints that the faults can fill; it needs root to mount a tmpfs."""

import os
import shutil
import subprocess
from pathlib import Path

_SIZE = "1g"  # a tmpfs takes memory only for the files on it
_TRIES = 50


class Disk:
    """A tmpfs at `path`; without root a plain folder, which cannot be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE},mode=0755", "chaos", str(path)]
        is_root = os.geteuid() == 0
        self.can_fill = is_root and subprocess.run(mount, check=False).returncode == 0

    def fill_up(self) -> None:
        """Leave no free space: shrink the disk to the size of its files."""
        # Workers go on writing: a size that was enough a moment ago may be too small now.
        for _ in range(_TRIES):
            used = shutil.disk_usage(self.path).used
            if self._try_remount(str(max(used, 4096))):
                return
        raise OSError(f"{self.path} cannot be filled: its files grow faster than the disk shrinks")

    def restore_size(self) -> None:
        if not self._try_remount(_SIZE):
            raise OSError(f"{self.path} cannot be restored to {_SIZE}")

    def unmount(self) -> None:
        if self.can_fill:
            subprocess.run(["umount", "-l", str(self.path)], check=False, timeout=20)

    def _try_remount(self, size: str) -> bool:
        """Set the size and return whether it worked; a tmpfs cannot be smaller than its files."""
        command = ["mount", "-o", f"remount,size={size}", str(self.path)]
        done = subprocess.run(command, check=False, capture_output=True, timeout=20)
        return done.returncode == 0
