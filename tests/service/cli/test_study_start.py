"""The commands `study enqueue`, `study targets` and `key`, and the option `--project`."""

import json
from datetime import timedelta

import httpx
import pytest
from sqlalchemy import func
from typer.testing import CliRunner

from service.cli.main import app
from service.client import Client
from service.database.tables import ApiKey
from service.local_stack import home as homes
from service.local_stack.home import Access

runner = CliRunner()


# A developer's shell may set these; each test starts without them.
@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("URL", "API_KEY", "HOME", "PORT", "PROJECT", "DATABASE_URL"):
        monkeypatch.delenv(f"WARMSCALE_{name}", raising=False)


@pytest.fixture
def warmscale(tmp_path, api):
    """Return a function that runs a command against the test's API."""
    homes.write_access(tmp_path, Access(url=api.url, key=api.key))

    def call(*arguments, **options):
        return runner.invoke(app, [*arguments, "--home", str(tmp_path)], **options)

    return call


def test_enqueued_parameters_are_tried_next(warmscale, submit, worker):
    name = submit()["name"]
    made = warmscale("study", "enqueue", name, "lr=4e-3")
    assert (made.exit_code, made.stdout) == (0, "trial 0 is queued with lr 0.004\n")
    assert worker.lease_one().params == {"lr": 0.004}


def test_the_same_key_enqueues_once(warmscale, submit):
    name, key = submit()["name"], ("--idempotency-key", "k", "--json")
    first, second = (warmscale("study", "enqueue", name, "lr=0.004", *key) for _ in range(2))
    assert json.loads(first.stdout) == json.loads(second.stdout)
    other = warmscale("study", "enqueue", name, "lr=0.005", *key)
    assert other.exit_code == 4
    assert "'k' was used for trial 0" in other.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr"], "NAME=VALUE, such as lr=0.003 (got 'lr')"),
        (["=1"], "NAME=VALUE, such as lr=0.003 (got '=1')"),
        (["lr=1", "lr=2"], "params.lr: give it once (got 1 and '2')"),
        (["lr=NaN"], "params.lr: finite numbers work (got 'NaN')"),
        (["lr=high"], "params.lr"),
        (["lr=7"], "(got 7"),
        (["rate=0.004"], "rate"),
    ],
)
def test_bad_parameters_are_named_with_their_value(warmscale, submit, given, message):
    refused = warmscale("study", "enqueue", submit()["name"], *given)
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert "Traceback" not in refused.output


def test_an_answer_that_was_cut_off_is_asked_for_again_by_the_key_that_is_shown(
    warmscale, submit, api, monkeypatch
):
    name, post = submit()["name"], Client.post

    # The service enqueues the trial, and the connection breaks before the response arrives.
    def cut(client, path, *arguments, **options):
        post(client, path, *arguments, **options)
        raise httpx.ReadError("cut off")

    monkeypatch.setattr(Client, "post", cut)
    lost = warmscale("study", "enqueue", name, "lr=0.004")
    monkeypatch.undo()
    assert lost.exit_code == 3
    # The error message ends with the option that repeats the command.
    key = lost.stderr.rpartition("--idempotency-key ")[2].strip()
    again = warmscale("study", "enqueue", name, "lr=0.004", "--idempotency-key", key)
    assert again.exit_code == 0
    assert len(api.client.get(f"/v1/studies/{name}/trials")["items"]) == 1


@pytest.fixture
def searched(submit, worker):
    """Return the name of a study that has finished its search and has no target in its spec."""
    study = submit(target=None, hpo={"trials": 2, "sampler": "random", "pruner": "none"})
    for loss in (2.5, 2.0):
        worker.complete(worker.lease_one(), loss=loss)
    return study["name"]


def test_targets_are_started_from_the_best_trial_or_one_that_is_named(warmscale, searched, api):
    shown = warmscale("study", "targets", searched, "--width", "64")
    assert shown.exit_code == 0, shown.output
    assert [line.split()[1] for line in shown.stdout.splitlines()] == 2 * ["warm", "cold"]
    # Trial 0 is the worse trial: its parameters show that --trial was used.
    made = warmscale("study", "targets", searched, "--width", "96", "--trial", "0", "--json")
    runs = json.loads(made.stdout)["items"]
    assert {run["spec"]["model"]["width"] for run in runs} == {96}
    first = api.client.get(f"/v1/studies/{searched}/trials")["items"][0]
    assert runs[0]["params"] == first["params"]


def test_a_file_says_what_has_no_option(warmscale, searched, tmp_path):
    file = tmp_path / "request.yaml"
    file.write_text("warmstart: {control: false, seeds: 1}\ntarget: {train: {num_tokens: 5120}}\n")
    arguments = ["study", "targets", searched, "-f", str(file), "--width", "64"]
    key = ("--json", "--idempotency-key", "k")
    first, second = (json.loads(warmscale(*arguments, *key).stdout) for _ in range(2))
    assert first == second
    assert [(r["arm"], r["num_tokens"]) for r in first["items"]] == [("warm", 5120)]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "target.width"),
        (["--width", "65"], 2, "(got 65"),
        (["--width", "64", "--trial", "9"], 4, "'9'"),
        (["--width", "64", "--checkpoint", "1", "--trial", "0"], 2, "give one of"),
        (["-f", "nowhere.yaml"], 2, "nowhere.yaml cannot be read"),
        (["--width", "64", "--base", "nowhere.json"], 2, "nowhere.json cannot be read"),
    ],
)
def test_bad_targets_are_named_with_their_value(warmscale, searched, options, code, message):
    refused = warmscale("study", "targets", searched, *options)
    assert refused.exit_code == code, refused.output
    assert message in refused.stderr
    assert "Traceback" not in refused.output


@pytest.mark.parametrize("by", ["option", "environment"])
def test_study_commands_work_in_the_project_that_is_named(
    warmscale, api, study_spec, monkeypatch, by
):
    spec = study_spec()
    api.client.request("POST", "/v1/studies", body=spec, params={"project": "vision"})
    named = ["--project", "vision"] if by == "option" else []
    if by == "environment":
        monkeypatch.setenv("WARMSCALE_PROJECT", "vision")
    for command in ("show", "pause", "resume"):
        done = warmscale("study", command, spec["name"], *named)
        assert done.exit_code == 0, done.output
    assert warmscale("study", "enqueue", spec["name"], "lr=0.004", *named).exit_code == 0
    # The study of the project `vision` does not exist in the project `other`.
    other = warmscale("study", "show", spec["name"], "--project", "other")
    assert other.exit_code == 4
    listed = warmscale("study", "list", "--json", "--project", "other")
    assert json.loads(listed.stdout) == []
    bad = warmscale("study", "list", "--project", "no such/thing")
    assert bad.exit_code == 2
    assert "project" in bad.stderr
    assert "'no such/thing'" in bad.stderr


@pytest.fixture
def keys(tmp_path, database_url, api, monkeypatch):
    """Return a function that runs `warmscale key …` on the API's database."""
    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    return lambda *rest: runner.invoke(app, ["key", *rest, "--home", str(tmp_path)])


def test_a_key_of_a_project_sees_it_alone_until_it_is_revoked(keys, api):
    made = keys("create", "ana", "--project", "vision", "--scope", "read", "--scope", "write")
    assert made.exit_code == 0, made.output
    with Client(api.url, made.stdout.strip(), patience_seconds=0) as ana:
        assert ana.get("/v1/studies")["items"] == []
        (listed,) = [k for k in json.loads(keys("list", "--json").stdout) if k["name"] == "ana"]
        assert (listed["project"], listed["scopes"]) == ("vision", ["read", "write"])
        assert (listed["state"], listed["expires_at"]) == ("good", None)
        assert listed["last_used_at"] is not None
        assert keys("revoke", listed["id"]).stdout == f"{listed['id']} is revoked\n"
        with pytest.raises(Exception, match="expired or revoked"):
            ana.get("/v1/studies")
    line = next(text for text in keys("list").stdout.splitlines() if listed["id"] in text)
    assert "ana  read, write  vision  revoked  last used" in line
    # The list must not reveal the key itself.
    assert made.stdout.strip() not in keys("list").stdout


def test_a_key_expires_after_its_days(keys, api):
    made = keys("create", "ci", "--scope", "read", "--expires-days", "1")
    with Client(api.url, made.stdout.strip(), patience_seconds=0) as ci:
        assert ci.get("/v1/studies")["items"] == []
        # Move the expiry to the past rather than wait for a day.
        with api.sessions.begin() as session:
            session.query(ApiKey).filter_by(name="ci").update(
                {"expires_at": func.now() - timedelta(seconds=1)}
            )
        with pytest.raises(Exception, match="expired or revoked"):
            ci.get("/v1/studies")
    assert "ci  read  default  expired" in keys("list").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--project", "No Such"], "--project: must match"),
        (["--expires-days", "0"], "--expires-days"),
        (["--scope", "all"], "(got 'all')"),
    ],
)
def test_a_key_that_cannot_be_made_says_why(keys, options, message):
    refused = keys("create", "x", "--scope", "read", *options)
    assert refused.exit_code == 2
    assert message in refused.stderr
