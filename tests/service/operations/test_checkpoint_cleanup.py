"""The collection of checkpoints keeps every checkpoint that a run may need, and their files."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from typer.testing import CliRunner

from service.cli.main import app
from service.client import ServiceError
from service.database.tables import Checkpoint
from service.lifecycle import LIVE_RUN_STATES
from service.operations.checkpoint_cleanup import folders
from service.operations.checkpoint_cleanup.collect import CleanupOptions, collect_checkpoints
from service.operations.checkpoint_cleanup.policy import CheckpointFact, decide_checkpoints
from service.studies.locks import lock_study
from warmcore.storage import locations

runner = CliRunner()
ALL = CleanupOptions(older_than_days=0.0, orphans_older_than_hours=1.0, delete=True)
TRIALS = {"trials": 3, "parallel": 2, "sampler": "random", "pruner": "none"}

facts = st.builds(
    CheckpointFact,
    id=st.integers(1, 30),
    run_id=st.sampled_from(["run_a", "run_b", "run_c"]),
    uri=st.just("file:///x"),
    hash=st.just("0"),
    num_bytes=st.just(1),
    final=st.booleans(),
    age_days=st.floats(0, 30),
    kind=st.sampled_from(["trial", "target"]),
    state=st.sampled_from(["queued", "leased", "succeeded", "pruned", "failed", "cancelled"]),
)


@given(
    st.lists(facts, unique_by=lambda f: f.id),
    st.sampled_from([None, "run_a", "run_b"]),
    st.dictionaries(st.integers(1, 30), st.just("run_z")),
    st.floats(0, 40),
)
def test_nothing_that_is_needed_is_ever_decided_against(found, best, used, days):
    decisions = decide_checkpoints(found, best_run=best, used_by=used, older_than_days=days)
    assert [d.fact for d in decisions] == found
    for one in decisions:
        f = one.fact
        needed = (
            f.state in LIVE_RUN_STATES
            or f.id in used
            or (f.final and f.run_id == best)
            or (f.final and (f.kind, f.state) == ("target", "succeeded"))
        )
        assert one.keep == (needed or f.age_days < days)
        assert one.reason


def write(uri, *, old=True):
    """Write a checkpoint's files; by default with the time of eleven days ago."""
    files, root = fsspec.core.url_to_fs(uri)
    files.makedirs(root, exist_ok=True)
    for name in ("checkpoint.json", "model.safetensors"):
        files.pipe_file(f"{root}/{name}", b"some bytes")
        if old and uri.startswith("file:"):
            os.utime(f"{root}/{name}", (time.time() - 10**6,) * 2)


def there(uri):
    files, root = fsspec.core.url_to_fs(uri)
    return files.exists(f"{root}/checkpoint.json")


@pytest.fixture
def saved(worker):
    """Return a function that publishes a checkpoint with files, and returns the URI."""

    def save(lease, step=20, *, final=True):
        uri = f"{lease.artifact_uri}/step-{step:08d}"
        write(uri)
        worker.publish(lease, step, final)
        return uri

    return save


@pytest.fixture
def study(submit, worker, saved):
    """Return a function that makes a study of three trials; the second trial has the lowest loss.

    The function returns the study's id and the URIs of the three final checkpoints.
    """

    def make_study(**more):
        created = submit(hpo=TRIALS, target=None, **more)
        uris = []
        for loss in (3.0, 1.0, 2.0):
            lease = worker.lease_one(study=created["id"])
            uris.append(saved(lease))
            worker.finish(lease, loss=loss)
        return created["id"], uris

    return make_study


@pytest.fixture
def gc(api, settings):
    """Return a function that collects a study's checkpoints below the artifact root."""

    def collect_below_root(study, options=ALL):
        return collect_checkpoints(api.sessions, study, settings.artifact_root, options)

    return collect_below_root


def test_the_best_trial_s_checkpoint_stays_and_the_others_go(study, gc, api, worker):
    name, uris = study()
    dry = gc(name, CleanupOptions(older_than_days=0.0, orphans_older_than_hours=1.0, delete=False))
    assert all(map(there, uris))
    assert dry.num_bytes > 0
    assert gc(name).num_bytes == dry.num_bytes
    assert [there(uri) for uri in uris] == [False, True, False]
    assert gc(name).num_bytes == 0
    path = f"/v1/studies/{name}/targets"
    with pytest.raises(ServiceError, match="no final checkpoint"):
        api.client.post(path, {"trial": 0, "target": {"width": 64}})
    api.client.post(path, {"target": {"width": 64}})
    bases = {lease.spec.growth.base.uri for lease in worker.lease(4) if lease.arm == "warm"}
    assert bases == {uris[1]}


def test_what_is_younger_stays(study, gc):
    name, uris = study()
    options = CleanupOptions(older_than_days=1.0, orphans_older_than_hours=1.0, delete=True)
    assert {d.reason for d in gc(name, options).decisions} >= {"younger than 1 days"}
    assert all(map(there, uris))


def test_every_run_can_go_on_after_a_collection_in_the_middle(submit, worker, saved, gc, api):
    created = submit(hpo=TRIALS)
    leased = worker.lease_one(study=created["id"])
    on_the_way = [saved(leased, step, final=False) for step in (5, 10)]
    orphan = f"{leased.artifact_uri}/.step-00000015-abc"
    write(orphan)
    gc(created["id"])
    # The run is live: it may resume from either, and its worker may still publish the orphan.
    assert all(map(there, [*on_the_way, orphan]))
    worker.finish(leased, "released")
    again = worker.lease_one(study=created["id"])
    assert [ref.uri for ref in again.resume_from] == on_the_way[::-1]
    assert all(there(ref.uri) for ref in again.resume_from)


def test_what_a_target_grew_from_and_its_own_end_stay(study, gc, api, worker, saved):
    name, uris = study()
    path = f"/v1/studies/{name}/targets"
    api.client.post(path, {"trial": 0, "target": {"width": 64}, "warmstart": {"seeds": 1}})
    ends = []
    for lease in worker.lease(2):
        ends.append(saved(lease))
        worker.finish(lease, loss=0.5)
    gc(name)
    assert [there(uri) for uri in [*uris, *ends]] == [True, True, False, True, True]


def test_a_crash_between_rows_and_files_is_finished_by_the_next(study, gc, monkeypatch):
    name, uris = study()

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folders, "delete_folder", crash)
        with pytest.raises(KeyboardInterrupt):
            gc(name)
    assert all(map(there, uris))
    again = gc(name)
    assert [r.reason for r in again.unpublished] == ["its checkpoint was superseded before"] * 2
    assert [there(uri) for uri in uris] == [False, True, False]


def test_orphans_of_ended_runs_go_when_they_are_old_and_of_unknown_runs_never(study, gc):
    name, uris = study()
    attempt = uris[1].rsplit("/", 1)[0]
    # A worker writes a checkpoint under a hidden name and renames it when it is complete.
    old, young = f"{attempt}/.step-00000005-abc", f"{attempt}/.step-00000006-abc"
    unknown = f"{attempt.replace('run_', 'run_not')}/step-00000001"
    for uri in (old, young, unknown):
        write(uri, old=uri != young)
    gc(name)
    assert [there(uri) for uri in (old, young, unknown, uris[1])] == [False, True, True, True]


def test_nothing_outside_the_root_is_touched(study, gc, settings, tmp_path, api):
    name, uris = study()
    outside = (tmp_path / "mine").as_uri()
    write(outside)
    # The attempt's folder becomes a link, and a row names a folder outside of the root.
    attempt = Path(fsspec.core.url_to_fs(uris[0])[1]).parent
    away = attempt.rename(tmp_path / "moved")
    attempt.symlink_to(away)
    with api.sessions.begin() as session:
        session.execute(text("UPDATE warmscale.checkpoints SET uri = :u WHERE uri = :was"),
                        {"u": outside, "was": uris[2]})  # fmt: skip
    collected = gc(name)
    assert any("leads to" in line for line in collected.skipped)
    assert any("not below" in line for line in collected.skipped)
    assert there(outside)
    assert (away / "step-00000020" / "checkpoint.json").exists()
    assert there(uris[1])
    with api.sessions.begin() as session:
        session.execute(text("UPDATE warmscale.checkpoints SET uri = :was WHERE uri = :u"),
                        {"u": outside, "was": uris[2]})  # fmt: skip


def test_a_link_that_is_put_in_a_folder_s_place_on_the_way_leads_nowhere(tmp_path, monkeypatch):
    """Swap a folder for a link between two steps of the deletion: here after the first step."""
    root, victim = tmp_path / "store", tmp_path / "mine"
    uri = (root / "st_1" / "run_1" / "attempt-001" / "step-00000020").as_uri()
    write(uri)
    write((victim / "step-00000020").as_uri())
    attempt, moved = root / "st_1" / "run_1" / "attempt-001", tmp_path / "moved"

    def then_swaps(step):
        def call(path, **more):
            step(path, **more)
            if not moved.exists():
                attempt.rename(moved)
                attempt.symlink_to(victim)

        return call

    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, then_swaps(getattr(os, name)))
    folders.delete_folder(uri, root.as_uri())
    assert moved.exists()
    assert there((victim / "step-00000020").as_uri())
    assert not (moved / "step-00000020").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


interrupt.avoids_symlink_attacks = True  # as shutil.rmtree says of itself


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_deletion_that_is_killed_half_way_leaves_no_manifest(tmp_path, monkeypatch, scheme):
    root = {"file": tmp_path.as_uri(), "memory": f"memory://half-{os.getpid()}"}[scheme]
    uri = f"{root}/st_1/run_1/attempt-001/step-00000020"
    write(uri)
    with monkeypatch.context() as patched:
        # The step after the manifest: the whole folder.
        patched.setattr(shutil, "rmtree", interrupt)
        patched.setattr(MemoryFileSystem, "rm", interrupt_recursive(MemoryFileSystem.rm))
        with pytest.raises(KeyboardInterrupt):
            folders.delete_folder(uri, root)
    files, path = locations.find_filesystem(uri)
    assert (files.exists(f"{path}/model.safetensors"), there(uri)) == (True, False)
    folders.delete_folder(uri, root)
    assert not files.exists(f"{path}/model.safetensors")


def interrupt_recursive(delete):
    def delete_file(files, path, recursive=False):
        return interrupt() if recursive else delete(files, path)

    return delete_file


def test_an_older_root_is_collected_too(study, gc, settings, api):
    name, uris = study()
    collect_checkpoints(api.sessions, name, "memory://elsewhere", ALL)
    assert [there(uri) for uri in uris] == [False, True, False]


def test_object_stores_are_collected_by_the_same_code():
    root = f"memory://gc-{os.getpid()}"
    uri = f"{root}/st_1/run_1/attempt-001/step-00000001"
    write(uri)
    (folder,) = folders.list_folders(root, "st_1")
    assert (folder.uri, folder.num_bytes, folder.age_hours < 1) == (uri, 20, True)
    folders.delete_folder(uri, root)
    assert folders.list_folders(root, "st_1") == []


def imported(api, uri):
    with api.sessions() as session:
        row = session.query(Checkpoint).filter_by(uri=uri).one()
        run = api.client.get(f"/v1/runs/{row.run_id}")
    model = run["spec"]["model"]
    base = {"uri": uri, "hash": row.hash, "model": model}
    return {"base": base, "target": {"width": 64}, "warmstart": {"seeds": 1}}


def test_a_target_of_another_study_never_points_to_what_is_collected(study, gc, api):
    """Let the collection and the target race: it finds the target's row, or the target fails."""
    name, uris = study()
    other, _ = study()
    request = imported(api, uris[0])
    # A start of a target that holds its lock on the checkpoint and has not committed.
    with api.sessions() as session:
        held = session.query(Checkpoint).filter_by(uri=uris[0]).with_for_update(read=True)
        assert held.one()
        collecting = threading.Thread(target=gc, args=(name,))
        collecting.start()
        collecting.join(0.3)
        assert collecting.is_alive()
        api.client.post(f"/v1/studies/{other}/targets", request)
    collecting.join(60)
    assert [there(uri) for uri in uris] == [True, True, False]
    with pytest.raises(ServiceError, match="was deleted"):
        api.client.post(f"/v1/studies/{other}/targets", imported(api, uris[2]))


def test_a_collection_waits_for_who_moves_the_study_on(study, gc, api):
    name, uris = study()
    with api.sessions() as session:
        lock_study(session, name)
        collecting = threading.Thread(target=gc, args=(name,))
        collecting.start()
        collecting.join(0.3)
        assert collecting.is_alive()
        assert all(map(there, uris))
    collecting.join(60)
    assert [there(uri) for uri in uris] == [False, True, False]


def test_a_name_of_two_projects_deletes_in_neither_until_one_is_named(
    study, study_spec, api, settings, database_url, monkeypatch
):
    name, uris = study(name="same")
    api.client.post("/v1/studies?project=other", study_spec(name="same"))
    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    command = ["checkpoints", "gc", "--older-than-days", "0", "--home", str(settings.home)]
    command += ["--study", "same", "--delete", "--json"]
    refused = runner.invoke(app, command)
    assert refused.exit_code == 4, refused.output
    assert "in projects default, other; name one with --project" in refused.stderr
    assert all(map(there, uris))
    done = runner.invoke(app, [*command, "--project", "default"])
    assert done.exit_code == 0, done.output
    assert [one["study"] for one in json.loads(done.stdout)] == [name]
    assert [there(uri) for uri in uris] == [False, True, False]
    assert runner.invoke(app, [*command, "--project", "third"]).exit_code == 4


def test_the_command_line_tells_first_and_deletes_when_told(
    study, api, settings, database_url, monkeypatch
):
    name, uris = study()
    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    command = ["checkpoints", "gc", "--older-than-days", "0", "--home", str(settings.home)]
    dry = runner.invoke(app, command)
    assert dry.exit_code == 0, dry.output
    assert "final checkpoint of the best trial" in dry.stdout
    assert "say --delete" in dry.stdout
    assert all(map(there, uris))
    done = runner.invoke(app, [*command, "--study", name, "--delete", "--json"])
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)
    assert {f["uri"]: f["keep"] for f in one["folders"]} == {uri: uri == uris[1] for uri in uris}
    assert [there(uri) for uri in uris] == [False, True, False]
    assert runner.invoke(app, [*command, "--study", "none"]).exit_code == 4


def test_a_checkpoint_that_another_study_grows_from_is_kept_by_its_own_run(api, submit, worker):
    submit(hpo={"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"})
    other = submit(hpo={"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"})
    lease = worker.lease_one()
    worker.publish(lease, 1, final=False)
    uri = f"{lease.artifact_uri}/step-00000001"
    api.client.post(f"/v1/studies/{other['id']}/targets", imported(api, uri))
    # A worker keeps its two newest checkpoints: step 1 would be superseded at step 3.
    replies = [worker.publish(lease, step, final=False) for step in (2, 3, 4)]
    assert uri not in [old for reply in replies for old in reply.superseded]
