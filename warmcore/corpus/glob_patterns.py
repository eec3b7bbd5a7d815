"""Glob patterns -> paths, without the links that lead back to a folder on the walk's own way.

The module `glob` follows these links. With a link `loop -> .` the pattern `*/*/*` finds each file
under many names, and every `*` doubles the walk.
"""

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Listing 100 000 folders takes seconds on a local disk, and a request waits for it.
_MOST_LOOKS = 100_000


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder on the walk; `via` are the resolved paths of it and of the folders above."""

    path: Path
    via: tuple[Path, ...]

    def leads_back(self, to: Path) -> bool:
        """Return True if `to` is, or contains, a folder on the way to this folder."""
        return any(place.is_relative_to(to) for place in self.via)


def find_matches(pattern: Path) -> Iterator[Path]:
    """Yield the matches of a pattern with `*`, `?` or `[`. Hidden names need a dot in the pattern.

    Raises:
        ValueError: the pattern leads through too many folders.
    """
    # data/**/x*/*.txt: the walk starts at data, goes down `**` and `x*`, and lists `*.txt`.
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    start = Path(*parts[:first])
    *above, last = (*parts[first:], "*") if parts[-1] == "**" else parts[first:]
    walk = _Walk(pattern)
    try:
        folders = [_Folder(path=start, via=(start.resolve(),))]
    except (OSError, RuntimeError):  # a link to itself: RuntimeError before Python 3.13
        return
    for part in above:
        step = (
            walk.find_folders_below(folders) if part == "**" else walk.find_folders(folders, part)
        )
        folders = list(step)
    for folder in folders:
        yield from (folder.path / name for name in walk.list_names(folder, last))


class _Walk:
    """The walk of a single pattern; it ends after a fixed number of listed folders."""

    def __init__(self, pattern: Path) -> None:
        self._pattern, self._looks = pattern, 0

    def list_names(self, folder: _Folder, part: str) -> list[str]:
        """Return the names in a folder that match `part`."""
        self._looks += 1
        if self._looks > _MOST_LOOKS:
            raise ValueError(
                f"source {self._pattern} leads through more than {_MOST_LOOKS} folders; a folder, "
                "or a pattern with fewer folders, would work"
            )
        if not glob.has_magic(part):
            return [part] if os.path.lexists(folder.path / part) else []
        try:
            found = fnmatch.filter([path.name for path in folder.path.iterdir()], part)
        except OSError:  # a folder that cannot be read matches nothing, as in `glob`
            return []
        return [name for name in found if part.startswith(".") or not name.startswith(".")]

    def find_folders(self, folders: Iterable[_Folder], part: str) -> Iterator[_Folder]:
        """Yield the folders inside of `folders` with a name that matches `part`."""
        for folder in folders:
            for name in self.list_names(folder, part):
                path = folder.path / name
                if not path.is_dir():
                    continue
                # A link to a folder elsewhere is followed; a link back up would never end.
                place = path.resolve()
                if path.is_symlink() and folder.leads_back(place):
                    continue
                yield _Folder(path=path, via=(*folder.via, place))

    def find_folders_below(self, folders: Iterable[_Folder]) -> Iterator[_Folder]:
        """Yield these folders and all folders below them."""
        left = list(folders)
        while left:
            folder = left.pop()
            yield folder
            left += self.find_folders([folder], "*")
