"""The collection of checkpoints that no run needs: rows first, in a transaction, then files.

A crash between the two leaves files of superseded rows. The next collection deletes them.
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
    """The limits of a collection; without `delete` it only reports its decisions."""

    older_than_days: float
    orphans_older_than_hours: float
    delete: bool


@dataclass(frozen=True, kw_only=True)
class UnpublishedFolder:
    """A folder without a published checkpoint, and the reason to delete or to keep it."""

    folder: Folder
    delete: bool
    reason: str


@dataclass(kw_only=True)
class CleanupResult:
    """The decisions on one study's checkpoints and folders.

    `skipped` has a message for each folder that could not be deleted safely.
    """

    study_id: str
    decisions: tuple[Decision, ...]
    unpublished: tuple[UnpublishedFolder, ...] = ()
    skipped: list[str] = field(default_factory=list[str])

    @property
    def num_bytes(self) -> int:
        """Size of the files that were deleted, or would be."""
        published = sum(d.fact.num_bytes for d in self.decisions if not d.keep)
        return published + sum(u.folder.num_bytes for u in self.unpublished if u.delete)

    @property
    def doomed(self) -> set[int]:
        """Ids of the checkpoints that were decided against."""
        return {decision.fact.id for decision in self.decisions if not decision.keep}


def collect_checkpoints(
    sessions: sessionmaker[Session], study_id: str, root: str, options: CleanupOptions
) -> CleanupResult:
    """Collect one study's checkpoints; `root` is the place of new checkpoints today."""
    with sessions() as session:
        decisions = store.lock_and_decide(session, study_id, options.older_than_days)
        if options.delete:
            store.supersede_checkpoints(session, study_id, decisions)
            session.commit()
    result = CleanupResult(study_id=study_id, decisions=decisions)
    roots = _list_roots(sessions, study_id, root, result)
    found = [(above, folder) for above in roots for folder in folders.list_folders(above, study_id)]
    # Read the rows after the files. In the other order a checkpoint that a worker publishes between
    # the two would have files and no row, and would count as an orphan.
    with sessions() as session:
        rows = store.load_checkpoints(session, study_id)
        states = store.load_run_states(session, study_id)
    result.unpublished = tuple(
        unpublished
        for _, folder in found
        if (unpublished := _judge_folder(folder, rows, states, result.doomed, options)) is not None
    )
    if options.delete:
        _delete_files(result, rows, found)
    return result


def _list_roots(
    sessions: sessionmaker[Session], study_id: str, root: str, result: CleanupResult
) -> list[str]:
    """Return the root of today, and each root that has held a checkpoint of the study."""
    roots, doomed = {root}, result.doomed
    with sessions() as session:
        for row, _ in store.load_checkpoints(session, study_id):
            try:
                roots.add(folders.find_root(row.uri, study_id, row.run_id, row.attempt))
            except OutsideRootError as error:
                # Of a checkpoint that an earlier collection superseded, the message came then.
                if not row.superseded or row.id in doomed:
                    result.skipped.append(str(error))
    return sorted(roots)


def _judge_folder(
    folder: Folder,
    rows: list[tuple[Checkpoint, str]],
    states: dict[str, str],
    doomed: set[int],
    options: CleanupOptions,
) -> UnpublishedFolder | None:
    """Decide on a folder without a published checkpoint; None if it has or may still get one."""
    inside = [row for row, _ in rows if folder.contains_uri(row.uri)]
    if any(not row.superseded or row.id in doomed for row in inside):
        return None
    if folder.run_id not in states:
        reason = "its run is not in this database"
        return UnpublishedFolder(folder=folder, delete=False, reason=reason)
    if states[folder.run_id] in LIVE_RUN_STATES:
        return None
    if inside:
        return UnpublishedFolder(
            folder=folder, delete=True, reason="its checkpoint was superseded before"
        )
    limit = options.orphans_older_than_hours
    # A worker that crashes after it wrote a checkpoint, and before it published it, leaves an
    # orphan. A young folder may be no orphan: the worker of a run that was cancelled a moment ago
    # still writes.
    if folder.age_hours is None or folder.age_hours < limit:
        reason = f"never published, younger than {limit:g} h"
        return UnpublishedFolder(folder=folder, delete=False, reason=reason)
    reason = "never published, and its run has ended"
    return UnpublishedFolder(folder=folder, delete=True, reason=reason)


def _delete_files(
    result: CleanupResult, rows: list[tuple[Checkpoint, str]], found: list[tuple[str, Folder]]
) -> None:
    doomed = result.doomed
    targets: list[tuple[str, str]] = []
    kept = [row.uri for row, _ in rows if not row.superseded and row.id not in doomed]
    for row, _ in rows:
        # A worker of another framework may publish a folder and a folder inside it. Deleting the
        # outer checkpoint would delete an inner checkpoint that must be kept.
        if row.id not in doomed or any(f"{uri}/".startswith(f"{row.uri}/") for uri in kept):
            continue
        with contextlib.suppress(OutsideRootError):  # _list_roots has its message
            root = folders.find_root(row.uri, result.study_id, row.run_id, row.attempt)
            targets.append((row.uri, root))
    going = {unpublished.folder.uri for unpublished in result.unpublished if unpublished.delete}
    targets += [(folder.uri, root) for root, folder in found if folder.uri in going]
    for uri, root in targets:
        try:
            folders.delete_folder(uri, root)
        except (OutsideRootError, OSError) as error:
            result.skipped.append(str(error))
