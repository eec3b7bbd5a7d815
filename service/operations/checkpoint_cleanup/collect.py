"""Collects what no run needs: first the rows, in a transaction, then the files.

A crash between the two leaves files of rows that are given up: the next collection deletes them.
"""

import contextlib
from dataclasses import dataclass, field

from sqlalchemy.orm import Session, sessionmaker

from service.database.tables import Checkpoint
from service.lifecycle import LIVE_RUN_STATES
from service.operations.checkpoint_cleanup import folders, store
from service.operations.checkpoint_cleanup.folders import Folder, OutsideRootError
from service.operations.checkpoint_cleanup.policy import Decision


@dataclass(frozen=True, kw_only=True)
class CleanupOptions:
    """What may be deleted; without `delete` it is only told."""

    older_than_days: float
    orphans_older_than_hours: float
    delete: bool


@dataclass(frozen=True, kw_only=True)
class UnpublishedFolder:
    """A folder without a published checkpoint: why it can go, or why it is left."""

    folder: Folder
    delete: bool
    reason: str


@dataclass(kw_only=True)
class CleanupResult:
    """What was found, and what was (or would be) freed, in one study."""

    study_id: str
    decisions: tuple[Decision, ...]
    remains: tuple[UnpublishedFolder, ...] = ()
    left: list[str] = field(default_factory=list[str])

    @property
    def num_bytes(self) -> int:
        """Freed, or to be freed."""
        rows = sum(one.fact.num_bytes for one in self.decisions if not one.keep)
        return rows + sum(one.folder.num_bytes for one in self.remains if one.delete)


def collect_checkpoints(
    sessions: sessionmaker[Session], study_id: str, root: str, options: CleanupOptions
) -> CleanupResult:
    """Collect one study's checkpoints; `root` is where new ones are written today."""
    with sessions() as session:
        decisions = store.lock_and_decide(session, study_id, options.older_than_days)
        if options.delete:
            store.supersede_checkpoints(session, study_id, decisions)
            session.commit()
    collected = CleanupResult(study_id=study_id, decisions=decisions)
    roots = _roots(sessions, study_id, root, collected)
    found = [(below, folder) for below in roots for folder in folders.list_folders(below, study_id)]
    # The rows after the files: what is published meanwhile is never taken for an orphan.
    with sessions() as session:
        rows, states = (
            store.load_checkpoints(session, study_id),
            store.load_run_states(session, study_id),
        )
    doomed = {one.fact.id for one in decisions if not one.keep}
    collected.remains = tuple(
        remains
        for _, folder in found
        if (remains := _remains(folder, rows, states, doomed, options)) is not None
    )
    if options.delete:
        _delete(collected, rows, doomed, found)
    return collected


def _roots(
    sessions: sessionmaker[Session], study_id: str, root: str, collected: CleanupResult
) -> list[str]:
    """Every root that a checkpoint of the study was ever published below, and today's."""
    roots, doomed = {root}, {one.fact.id for one in collected.decisions if not one.keep}
    with sessions() as session:
        for row, _ in store.load_checkpoints(session, study_id):
            try:
                roots.add(folders.find_root(row.uri, study_id, row.run_id, row.attempt))
            except OutsideRootError as error:
                if not row.superseded or row.id in doomed:
                    collected.left.append(str(error))
    return sorted(roots)


def _remains(
    folder: Folder,
    rows: list[tuple[Checkpoint, str]],
    states: dict[str, str],
    doomed: set[int],
    options: CleanupOptions,
) -> UnpublishedFolder | None:
    """What a folder is without a published checkpoint in it; None for one that has one."""
    inside = [row for row, _ in rows if folder.holds(row.uri)]
    if any(not row.superseded or row.id in doomed for row in inside):
        return None
    if folder.run_id not in states:
        return UnpublishedFolder(
            folder=folder, delete=False, reason="of a run that this database has not"
        )
    if states[folder.run_id] in LIVE_RUN_STATES:
        return None
    if inside:
        return UnpublishedFolder(folder=folder, delete=True, reason="given up before")
    limit = options.orphans_older_than_hours
    if folder.age_hours is None or folder.age_hours < limit:
        return UnpublishedFolder(
            folder=folder, delete=False, reason=f"never published, under {limit:g} h"
        )
    return UnpublishedFolder(
        folder=folder, delete=True, reason="never published, and its run has ended"
    )


def _delete(
    collected: CleanupResult,
    rows: list[tuple[Checkpoint, str]],
    doomed: set[int],
    found: list[tuple[str, Folder]],
) -> None:
    targets: list[tuple[str, str]] = []
    kept = [row.uri for row, _ in rows if not row.superseded and row.id not in doomed]
    for row, _ in rows:
        if row.id not in doomed or any(f"{uri}/".startswith(f"{row.uri}/") for uri in kept):
            continue  # a worker of another framework may write all of its own in one place
        with contextlib.suppress(OutsideRootError):  # told already
            root = folders.find_root(row.uri, collected.study_id, row.run_id, row.attempt)
            targets.append((row.uri, root))
    going = {one.folder.uri for one in collected.remains if one.delete}
    targets += [(folder.uri, root) for root, folder in found if folder.uri in going]
    for uri, root in targets:
        try:
            folders.delete_folder(uri, root)
        except (OutsideRootError, OSError) as error:
            collected.left.append(str(error))
