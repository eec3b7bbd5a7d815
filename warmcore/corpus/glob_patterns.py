"""Patterns -> paths: as `glob`, but through no link that leads back to where the walk came from.

Such a link has `*/*/*` find the same files under many names, and doubles the walk at every `*`.
"""

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MOST_LOOKS = 100_000


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder that was come to; `via` is where it and those above it really are."""

    path: Path
    via: tuple[Path, ...]

    def leads_back(self, to: Path) -> bool:
        """Whether a link to there leads to a folder that this one was come to through."""
        return any(place.is_relative_to(to) for place in self.via)


def find_matches(pattern: Path) -> Iterator[Path]:
    """What matches a pattern, which has a `*`, `?` or `[`; hidden names only by a dot.

    Raises:
        ValueError: it leads through too many folders.
    """
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    start = Path(*parts[:first])
    *above, last = (*parts[first:], "*") if parts[-1] == "**" else parts[first:]
    walk = _Walk(pattern)
    try:
        folders = [_Folder(path=start, via=(start.resolve(),))]
    except (OSError, RuntimeError):  # a link to itself; which of the two is Python's version's
        return
    for part in above:
        step = (
            walk.find_folders_below(folders) if part == "**" else walk.find_folders(folders, part)
        )
        folders = list(step)
    for folder in folders:
        yield from (folder.path / name for name in walk.list_names(folder, last))


class _Walk:
    """One pattern's way through the folders; it ends."""

    def __init__(self, pattern: Path) -> None:
        self._pattern, self._looks = pattern, 0

    def list_names(self, folder: _Folder, part: str) -> list[str]:
        """The names in a folder that match."""
        self._looks += 1
        if self._looks > _MOST_LOOKS:
            raise ValueError(
                f"source {self._pattern} leads through more than {_MOST_LOOKS} folders; a folder, "
                "or a pattern with fewer of them, would work"
            )
        if not glob.has_magic(part):
            return [part] if os.path.lexists(folder.path / part) else []
        try:
            found = fnmatch.filter([path.name for path in folder.path.iterdir()], part)
        except OSError:  # as glob has it
            return []
        return [name for name in found if part.startswith(".") or not name.startswith(".")]

    def find_folders(self, folders: Iterable[_Folder], part: str) -> Iterator[_Folder]:
        """The folders in these whose names match."""
        for folder in folders:
            for name in self.list_names(folder, part):
                path = folder.path / name
                if not path.is_dir():
                    continue
                place = path.resolve()
                if path.is_symlink() and folder.leads_back(place):
                    continue
                yield _Folder(path=path, via=(*folder.via, place))

    def find_folders_below(self, folders: Iterable[_Folder]) -> Iterator[_Folder]:
        """These folders and all below them."""
        left = list(folders)
        while left:
            folder = left.pop()
            yield folder
            left += self.find_folders([folder], "*")
