import json
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import service
from service.cli.main import app
from service.cli.spec_file import SpecError, anchor_paths, load_spec
from service.local_stack import home as homes
from service.local_stack.home import Access, HomeInUseError

runner = CliRunner()

SPEC = """
name: a-study
data: {source: corpus, context: 32}
proxy: {width: 32, depth: 1, head_dim: 16}
train: {batch_size: 8, num_tokens: 5120, evaluations: 4}
search_space: {lr: {type: float, low: 1e-3, high: 3e-2, log: true}}
hpo: {trials: 2, sampler: random, pruner: none}
"""


# A developer's shell may set these; each test starts without them.
@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("WARMSCALE_URL", "WARMSCALE_API_KEY", "WARMSCALE_HOME", "WARMSCALE_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def local(tmp_path, api):
    """Return a home with a client.json of the test's API."""
    folder = tmp_path / "local"
    folder.mkdir()
    homes.write_access(folder, Access(url=api.url, key=api.key))
    return folder


@pytest.fixture
def warmscale(local):
    """Return a function that runs a command against the test's API."""

    def call(*arguments):
        return runner.invoke(app, [*arguments, "--home", str(local)])

    return call


@pytest.fixture
def spec_file(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert corpus == tmp_path / "corpus"
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def test_every_command_explains_itself():
    for command in ((), ("up",), ("serve",), ("demo",), ("study", "watch"), ("key", "create")):
        shown = runner.invoke(app, [*command, "--help"])
        assert shown.exit_code == 0
        assert "Usage" in shown.output


def test_the_exit_codes_are_on_the_first_page():
    shown = runner.invoke(app, ["--help"]).output
    for line in ("0  done", "3  the service cannot be reached", "5  the API key"):
        assert line in shown


def test_the_version_is_printed_with_the_name():
    shown = runner.invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"warmscale {service.__version__}\n")


def test_completion_prints_a_script_for_bash_and_loads_neither_optuna_nor_torch():
    # typer prints the script of the calling shell; without `exit` bash would replace itself.
    command = f"{sys.executable} -X importtime -m service.cli --show-completion bash; exit $?"
    root = Path(service.__file__).parents[1]
    done = subprocess.run(
        ["bash", "-c", command], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert "complete -o default -F _warmscale_completion warmscale" in done.stdout
    # `-X importtime` writes a line for each imported module to stderr.
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not {"optuna", "torch", "sqlalchemy", "fastapi"} & loaded


def test_completion_offers_the_commands(monkeypatch):
    monkeypatch.setenv("_WARMSCALE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "warmscale study wa")
    monkeypatch.setenv("COMP_CWORD", "2")
    shown = runner.invoke(app, [], prog_name="warmscale")
    assert shown.stdout.split() == ["watch"]


def test_a_study_goes_from_its_file_to_the_list(warmscale, spec_file):
    created = warmscale("study", "create", "-f", str(spec_file), "--json")
    assert created.exit_code == 0, created.output
    assert json.loads(created.stdout)["name"] == "a-study"
    (listed,) = json.loads(warmscale("study", "list", "--json").stdout)
    assert listed["id"] == json.loads(created.stdout)["id"]
    assert "a-study" in warmscale("study", "list").stdout


def test_a_relative_source_is_taken_from_the_working_directory(warmscale, spec_file, corpus):
    warmscale("study", "create", "-f", str(spec_file))
    shown = json.loads(warmscale("study", "show", "a-study", "--json").stdout)
    assert shown["spec"]["data"]["source"] == str(corpus)


def test_steering_says_what_the_study_is_now(warmscale, spec_file):
    warmscale("study", "create", "-f", str(spec_file))
    lines = [warmscale("study", v, "a-study").stdout for v in ("pause", "resume", "cancel")]
    assert lines == ["a-study is paused\n", "a-study is active\n", "a-study is cancelled\n"]
    refused = warmscale("study", "resume", "a-study")
    assert refused.exit_code == 4
    assert "cancelled" in refused.stderr


def test_a_cancelled_study_s_watch_fails(warmscale, spec_file):
    warmscale("study", "create", "-f", str(spec_file))
    warmscale("study", "cancel", "a-study")
    # A study that did not complete gives exit code 1, after its last state was printed.
    watched = warmscale("study", "watch", "a-study", "--json")
    assert watched.exit_code == 1
    assert json.loads(watched.stdout.splitlines()[-1])["state"] == "cancelled"


def test_results_without_a_verdict_say_why_and_fail(warmscale, spec_file, tmp_path):
    warmscale("study", "create", "-f", str(spec_file))
    page = tmp_path / "report.html"
    shown = warmscale("study", "results", "a-study", "--html", str(page))
    assert shown.exit_code == 1
    assert "No verdict yet: the study has no target" in shown.stdout
    assert page.read_text().startswith("<!doctype html>")


def test_a_run_is_shown_with_its_checkpoints(warmscale, spec_file, worker):
    warmscale("study", "create", "-f", str(spec_file))
    lease = worker.lease_one()
    worker.evaluate(lease, 1, 2.5)
    worker.complete(lease, loss=2.25)
    shown = json.loads(warmscale("run", "show", lease.run_id, "--json").stdout)
    assert (shown["state"], shown["val_loss_nats"]) == ("succeeded", 2.25)
    assert len(shown["checkpoints"]) == 1
    assert "2.2500 nats/token" in warmscale("run", "show", lease.run_id).stdout


def test_text_of_a_user_is_never_markup(warmscale, spec_file, worker):
    # Rich would fail on the unknown tag [/nope] if it parsed the error as markup.
    warmscale("study", "create", "-f", str(spec_file))
    lease = worker.lease_one()
    worker.finish(lease, "failed", error="[bold]boom[/nope]", retryable=False)
    shown = warmscale("run", "show", lease.run_id)
    assert shown.exit_code == 0
    assert "[bold]boom[/nope]" in shown.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hpo:", "hop:"), "hop: unknown key"),
        (("high: 3e-2", "high: 1e-4"), "search_space.lr"),
        (("source: corpus", "source: nowhere"), "nowhere"),
        (("width: 32", "width: 33"), "proxy"),
    ],
)
def test_a_bad_spec_names_its_field_and_value(warmscale, spec_file, change, message):
    spec_file.write_text(SPEC.replace(*change))
    refused = warmscale("study", "create", "-f", str(spec_file))
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "got" in refused.stderr
    assert "Traceback" not in refused.output


def test_a_name_that_is_taken_is_a_conflict(warmscale, spec_file):
    warmscale("study", "create", "-f", str(spec_file))
    again = warmscale("study", "create", "-f", str(spec_file))
    assert again.exit_code == 4
    assert "a-study" in again.stderr
    # --name makes the same file a second study.
    other = warmscale("study", "create", "-f", str(spec_file), "--name", "another")
    assert other.exit_code == 0


@pytest.mark.parametrize("command", [("study", "show"), ("study", "watch"), ("run", "show")])
def test_what_is_not_there_is_not_found(warmscale, command):
    refused = warmscale(*command, "no such/thing")
    assert refused.exit_code == 4
    assert "no such/thing" in refused.stderr


def test_a_service_that_is_away_is_said_to_be_unreachable(tmp_path, monkeypatch):
    monkeypatch.setattr("service.cli.common.PATIENCE_SECONDS", 0.0)
    # Port 9 (discard) has no listener.
    homes.write_access(tmp_path, Access(url="http://127.0.0.1:9", key="ws_x"))
    refused = runner.invoke(app, ["study", "watch", "x", "--home", str(tmp_path)])
    assert refused.exit_code == 3
    assert "http://127.0.0.1:9" in refused.stderr


def test_a_page_in_place_of_an_answer_is_said_shortly(warmscale, monkeypatch):
    # A proxy in front of the service may respond with its own page.
    page = httpx.Response(200, text="<html>", request=httpx.Request("GET", "http://proxy/"))
    monkeypatch.setattr("service.client.Client.request", lambda *_, **__: page)
    refused = warmscale("study", "list")
    assert refused.exit_code == 3
    assert "'<html>' of http://proxy/ is not JSON" in refused.stderr
    assert "Traceback" not in refused.output


def test_without_a_key_it_says_where_keys_come_from(tmp_path):
    refused = runner.invoke(app, ["study", "list", "--home", str(tmp_path)])
    assert refused.exit_code == 5
    assert "WARMSCALE_API_KEY" in refused.stderr


def test_a_wrong_key_is_refused(warmscale, monkeypatch):
    monkeypatch.setenv("WARMSCALE_API_KEY", "ws_wrong")
    assert warmscale("study", "list").exit_code == 5


def test_a_home_s_key_is_never_sent_to_another_service(warmscale, monkeypatch):
    # The home's file names the test's API, so its key must not go to this URL.
    monkeypatch.setenv("WARMSCALE_URL", "http://127.0.0.1:9")
    refused = warmscale("study", "list")
    assert refused.exit_code == 5
    assert "no API key for http://127.0.0.1:9" in refused.stderr


@pytest.fixture
def became(monkeypatch):
    """Return the command lines of `os.execv`, which the test replaces."""
    found = []
    monkeypatch.setattr("os.execv", lambda _, command: found.append(command[1:]))
    return found


def test_a_run_s_final_checkpoint_is_exported(warmscale, spec_file, worker, became):
    warmscale("study", "create", "-f", str(spec_file))
    lease = worker.lease_one()
    # Before the run completes it has no checkpoint.
    assert warmscale("export", lease.run_id, "--out", "hf").exit_code == 4
    assert became == []
    worker.complete(lease)
    (checkpoint,) = json.loads(warmscale("run", "show", lease.run_id, "--json").stdout)[
        "checkpoints"
    ]
    warmscale(
        "export", lease.run_id, "--out", "hf", "--weights", "ema", "--dtype", "bfloat16", "--json"
    )
    source = [checkpoint["uri"], "--hash", checkpoint["hash"]]
    options = ["--out", "hf", "--weights", "ema", "--dtype", "bfloat16"]
    assert became == [["-m", "workers.convert", "--json", "export", *source, *options]]


def test_folders_are_converted_without_a_service(tmp_path, became):
    folder = str(tmp_path)
    runner.invoke(app, ["export", folder, "--out", "hf", "--max-shard-bytes", "9"])
    runner.invoke(app, ["import", folder, "--out", "s3://bucket/base"])
    options = ["--out", "hf", "--weights", "raw", "--dtype", "float32", "--max-shard-bytes", "9"]
    convert = ["-m", "workers.convert"]
    assert became == [
        [*convert, "export", folder, *options],
        [*convert, "import", folder, "--out", "s3://bucket/base"],
    ]


@pytest.mark.parametrize("run", ["no-such-folder", "run_unknown"])
def test_what_cannot_be_exported_is_named(warmscale, became, run):
    refused = warmscale("export", run, "--out", "hf")
    assert refused.exit_code == {"no-such-folder": 2, "run_unknown": 4}[run]
    assert run in refused.stderr
    assert became == []


@pytest.fixture
def started(monkeypatch):
    """Return command line and API key of each `os.execve`, which the test replaces."""
    found = []
    monkeypatch.setattr(
        "os.execve", lambda _, command, env: found.append((command[3:], env["WARMSCALE_API_KEY"]))
    )
    return found


@pytest.mark.parametrize("url", [["--url", "http://other:1"], ["--url=http://other:1"]])
def test_a_fleet_takes_no_home_s_key_to_another_service(warmscale, started, monkeypatch, url):
    refused = warmscale("fleet", "--cpus", "2", *url)
    assert refused.exit_code == 5
    assert "no API key for http://other:1" in refused.stderr
    assert "WARMSCALE_API_KEY" in refused.stderr
    monkeypatch.setenv("WARMSCALE_API_KEY", "ws_others")
    warmscale("fleet", "--cpus", "2", *url)
    assert started == [(["--url", "http://other:1", "--cpus", "2"], "ws_others")]


def test_a_fleet_of_the_home_s_service_needs_no_key_beside_it(warmscale, started, api):
    for options in ([], ["--url", api.url], [f"--url={api.url}"]):
        warmscale("fleet", *options, "--name", "a")
    assert started == 3 * [(["--url", api.url, "--name", "a"], api.key)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML"),
        ("- a\n- b\n", "a spec is a mapping"),
        ("name: a\nname: b\n", "'name' is given twice"),
        ("when: !!timestamp 2020-01-01\n", "line 1: tag !!timestamp"),
        ('name: "\\ud800"\n', "whole characters"),
        ("data: {source: ~nosuchuser/x}\n", "no such user"),
        ("lr: .inf\n", "JSON"),
    ],
)
def test_a_file_that_is_no_spec_says_why(tmp_path, text, message):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_spec(path, tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_spec(tmp_path / "nowhere.yaml", tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stdlib", "stdlib"),
        ("hf:org/name", "hf:org/name"),
        ("hf:./saved", "hf:/here/saved"),
        ("hf:/abs/saved", "hf:/abs/saved"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("/abs/text", "/abs/text"),
        ("text", "/here/text"),
        ("text/*.py", "/here/text/*.py"),
        ("../text", "/here/../text"),
    ],
)
def test_only_relative_paths_are_anchored(tmp_path, source, expected):
    spec = anchor_paths({"data": {"source": source}}, tmp_path.__class__("/here"))
    assert spec["data"]["source"] == expected


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [("byte", "byte"), ("bpe:512", "bpe:512"), ("t/tokenizer.json", "/here/t/tokenizer.json")],
)
def test_the_path_of_a_tokenizer_is_anchored_and_its_name_is_not(tmp_path, tokenizer, expected):
    spec = anchor_paths({"data": {"tokenizer": tokenizer}}, tmp_path.__class__("/here"))
    assert spec["data"] == {"tokenizer": expected}


@pytest.mark.parametrize("spec", [{}, {"data": None}, {"data": "x"}, {"data": {"source": 3}}])
def test_a_spec_without_a_source_is_left_to_the_service(spec, tmp_path):
    assert anchor_paths(spec, tmp_path) == spec


def test_access_is_for_this_user_alone(tmp_path):
    for url in ("http://a", "http://b"):
        homes.write_access(tmp_path, Access(url=url, key="k"))
    path = tmp_path / "client.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert homes.read_access(tmp_path) == Access(url="http://b", key="k")
    assert [p.name for p in tmp_path.iterdir()] == ["client.json"]


def test_a_damaged_access_file_says_what_to_do(tmp_path):
    (tmp_path / "client.json").write_text("{")
    refused = runner.invoke(app, ["study", "list", "--home", str(tmp_path)])
    assert refused.exit_code == 2
    assert "delete it" in refused.stderr


def test_a_home_has_one_holder_at_a_time(tmp_path):
    with homes.hold_home(tmp_path), pytest.raises(HomeInUseError, match="in use by another"):
        homes.hold_home(tmp_path).__enter__()
    # The lock is free again after the block.
    with homes.hold_home(tmp_path):
        pass


def test_a_key_s_life_is_create_use_revoke(tmp_path, database_url, api, monkeypatch):
    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    made = runner.invoke(app, ["key", "create", "ci", "--scope", "read", "--home", str(tmp_path)])
    assert made.exit_code == 0, made.output
    homes.write_access(tmp_path, Access(url=api.url, key=made.stdout.strip()))
    listing = ["study", "list", "--json", "--home", str(tmp_path)]
    assert runner.invoke(app, listing).stdout == "[]\n"
    key_id = made.stderr.split()[0]
    assert runner.invoke(app, ["key", "revoke", key_id]).exit_code == 0
    assert runner.invoke(app, listing).exit_code == 5
    assert runner.invoke(app, ["key", "revoke", key_id]).exit_code == 4


def test_an_unknown_scope_is_refused_with_those_that_are(tmp_path):
    refused = runner.invoke(app, ["key", "create", "x", "--scope", "all", "--home", str(tmp_path)])
    assert refused.exit_code == 2
    assert "read, write, work, metrics, admin (got 'all')" in refused.stderr
