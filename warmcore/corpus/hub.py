"""`hf:` sources -> Arrow files on this disk. No run downloads anything.

`hf:./folder` names a folder that `Dataset.save_to_disk` wrote. `hf:NAME` and `hf:NAME:CONFIG` name
a data set in the cache of the library `datasets`. That library is large and reads its settings at
import. A process of its own therefore looks a name up, once per name.
"""

import json
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from warmcore.corpus.module_process import run_module

SPLIT = "train"
_PART = r"(?!\.+(?:[/:]|$))[\w.-]+"  # no `.` and no `..`
# NAME, OWNER/NAME, NAME:CONFIG or OWNER/NAME:CONFIG.
_NAME = re.compile(f"{_PART}(/{_PART})?(:{_PART})?", re.ASCII)
_SECONDS = 120
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def find_cached_files(name: str) -> list[Path]:
    """Return the files of the train split of the data set `name`, in order.

    Raises:
        ValueError: this machine has no data set of that name; the message has the command that
            downloads it.
    """
    if not _NAME.fullmatch(name):
        works = "hf:NAME, hf:OWNER/NAME:CONFIG or hf:./x"
        raise ValueError(f"source hf:{name} is no data set; {works}")
    return [Path(file) for file in _look_up(name)]


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
def _look_up(name: str) -> tuple[str, ...]:
    # In an empty folder: `datasets` takes a folder "acme/tiny" of the working directory before the
    # data set of that name in its cache.
    with tempfile.TemporaryDirectory(prefix="warmscale-") as empty_folder:
        found = run_module(
            __name__,
            [name],
            environment=_OFFLINE,
            folder=empty_folder,
            seconds=_SECONDS,
            too_slow=f"source hf:{name} was not found in {_SECONDS} s",
        )
    if found.returncode == 0:
        return tuple(json.loads(found.stdout.splitlines()[-1]))
    reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
    if "No module named 'datasets'" in reason:
        raise ValueError(f"source hf:{name} needs: pip install 'warmscale[datasets]'")
    names = ", ".join(repr(part) for part in name.split(":"))
    raise ValueError(
        f"source hf:{name} is not in this machine's cache ({reason}); runs download nothing; run "
        f"python -c \"import datasets; datasets.load_dataset({names}, split='{SPLIT}')\""
    )


def main(name: str) -> None:
    """Print the files of the data set as JSON; `name` may be `NAME:CONFIG`."""
    import datasets  # noqa: PLC0415 - of the extra `datasets`

    parts = [part for part in name.split(":") if part]
    rows = datasets.load_dataset(*parts, split=SPLIT)
    print(json.dumps([file["filename"] for file in rows.cache_files]))  # noqa: T201 - for `_cached`


if __name__ == "__main__":
    main(sys.argv[1])
