"""`hf:` sources -> Arrow files on this disk. Nothing is downloaded, here or anywhere in a run.

`hf:./folder` is what `Dataset.save_to_disk` wrote; `hf:NAME` and `hf:NAME:CONFIG` are looked up in
the cache of `datasets`. That library is large and reads its settings when it is imported, so the
look-up is in a process of its own, once per name.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

SPLIT = "train"
_PART = r"(?!\.+(?:[/:]|$))[\w.-]+"  # no `.` and no `..`
_NAME = re.compile(f"{_PART}(/{_PART})?(:{_PART})?", re.ASCII)
_SECONDS = 120
_LOOK_UP = """
import json, sys
import datasets
names = [name for name in sys.argv[1].split(":") if name]
rows = datasets.load_dataset(*names, split=sys.argv[2])
print(json.dumps([file["filename"] for file in rows.cache_files]))
"""


def find_cached_files(name: str) -> list[Path]:
    """Return the files of the train split of the data set `name`, in order.

    Raises:
        ValueError: no such data set on this machine, with the command that would download it.
    """
    if not _NAME.fullmatch(name):
        works = "hf:NAME, hf:OWNER/NAME:CONFIG or hf:./x"
        raise ValueError(f"source hf:{name} is no data set; {works}")
    return [Path(file) for file in _cached(name)]


def find_saved_files(folder: Path) -> list[Path]:
    """Return the files that `save_to_disk` wrote, of a data set or of its train split.

    Raises:
        ValueError: `save_to_disk` did not write this folder.
    """
    if (folder / "dataset_dict.json").is_file():
        folder = folder / SPLIT
    try:
        state: Any = json.loads((folder / "state.json").read_bytes())
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"source hf:{folder} was not written by save_to_disk ({error!r}); "
            f"for a folder of Parquet or JSONL files give {folder} without hf:"
        ) from None


@lru_cache(maxsize=8)
def _cached(name: str) -> tuple[str, ...]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-P", "-c", _LOOK_UP, name, SPLIT]
    # -P, and an empty folder: a file or folder here must not pass for a module or a data set, which
    # `datasets` would take before a name of its cache.
    with tempfile.TemporaryDirectory(prefix="warmscale-") as nowhere:
        try:
            found = subprocess.run(  # noqa: S603 - our code, and a name that is checked
                command,
                env=os.environ | offline,
                cwd=nowhere,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"source hf:{name} was not found in {_SECONDS} s") from None
    if found.returncode == 0:
        return tuple(json.loads(found.stdout.splitlines()[-1]))
    reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
    if "No module named 'datasets'" in reason:
        raise ValueError(f"source hf:{name} needs: pip install 'warmscale[datasets]'")
    names = ", ".join(repr(part) for part in name.split(":"))
    raise ValueError(
        f"source hf:{name} is not in this machine's cache ({reason}); runs download nothing: first "
        f"python -c \"import datasets; datasets.load_dataset({names}, split='{SPLIT}')\""
    )
