"""Paths that users name: corpora stay in the data roots, checkpoints in their run and project."""

from types import SimpleNamespace

import pytest

from service.access.caller import Caller
from service.access.paths import check_published
from service.client import ServiceError
from service.problems import Problem
from service.settings import Settings
from service.studies.imported_base import check_base_uri
from service.studies.submission import list_source
from service.web.services import find_service, provide_services
from warmcore.corpus import glob_patterns
from warmcore.specs.data import DataSpec


@pytest.fixture
def tree(tmp_path):
    """A root with a corpus, a secret folder beside it, and links from the root to the secret."""
    root, secret = tmp_path / "root", tmp_path / "secret"
    for folder in (root / "corpus", root / "mixed", secret):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("text\n")
    (secret / "tokenizer.json").write_text("{}")
    (root / "out").symlink_to(secret)
    (root / "mixed" / "b.txt").symlink_to(secret / "a.txt")
    (root / "in").symlink_to(root / "corpus")
    return SimpleNamespace(root=root, secret=secret)


def refuse_source(roots, **data):
    with pytest.raises(Problem) as problem:
        list_source(DataSpec.model_validate(data), roots)
    return problem.value


@pytest.mark.parametrize("inside", ["corpus", "corpus/a.txt", "corpus/*.txt", "c*/a.txt", "in",
                                    "corpus/../corpus", "*/a.tx[t]"])  # fmt: skip
def test_what_lies_in_a_root_is_read(tree, inside):
    # This pattern also matches the link `out`, which leads to the secret.
    if inside == "*/a.tx[t]":
        (tree.root / "out").unlink()
    list_source(DataSpec(source=f"{tree.root}/{inside}"), (tree.root,))


@pytest.mark.parametrize(
    "outside",
    ["../secret", "corpus/../../secret/a.txt", "out", "out/a.txt", "mixed", "mixed/*.txt",
     "*/a.txt",
     "*/../../secret/a.txt", "../s*/a.txt", "../nowhere", "corpus/../../nowhere"],
)  # fmt: skip
def test_what_leads_out_of_the_roots_is_refused_by_field_value_and_root(tree, outside):
    source = f"{tree.root}/{outside}"
    problem = refuse_source((tree.root,), source=source)
    assert problem.status == 422
    (field,) = problem.errors
    assert (field.path, field.value) == ("data.source", source)
    assert str(tree.root) in field.message


@pytest.mark.parametrize("source", ["/etc/passwd", "/etc/nothing", "~/x", "~nosuchuser/x", "hf:./x",
                                    "hf:/etc", "http://10.0.0.1/x", "s3://b/k",
                                    "/proc/1/environ"])  # fmt: skip
def test_a_place_elsewhere_is_refused_alike_whether_or_not_it_is_there(tree, source):
    problem = refuse_source((tree.root,), source=source)
    assert problem.detail == refuse_source((tree.root,), source="/nowhere").detail


def test_a_tokenizer_is_confined_as_a_corpus_is(tree):
    outside = f"{tree.root}/out/tokenizer.json"
    problem = refuse_source((tree.root,), source="stdlib", tokenizer=outside)
    assert problem.errors[0].path == "data.tokenizer"


def test_a_source_has_no_more_characters_than_a_path():
    DataSpec(source="/" * 4096)
    with pytest.raises(ValueError, match="at most 4096 characters"):
        DataSpec(source="/" * 4097)


@pytest.mark.parametrize("source", ["/etc/**/**/*.conf", "hf:etc/.."])
def test_what_no_source_can_be_is_refused_by_field_and_value(api, study_spec, source):
    data = study_spec()["data"] | {"source": source}
    with pytest.raises(ServiceError, match=r"would work|hf:NAME") as refused:
        api.client.post("/v1/studies", study_spec() | {"data": data})
    (error,) = refused.value.problem["errors"]
    assert (refused.value.status, error["path"], error["value"]) == (422, "data.source", source)


def test_names_need_no_root(tree):
    list_source(DataSpec(source="stdlib"), ())
    list_source(DataSpec(source="hf:owner/name"), ())
    list_source(DataSpec(source="/etc"), None)


@pytest.mark.parametrize(
    ("given", "readable"),
    [
        ({}, None),
        ({"host": "localhost"}, None),
        ({"host": "::1"}, None),
        ({"host": "0.0.0.0"}, ()),  # noqa: S104
        ({"host": "example.org"}, ()),
        ({"database_url": "postgresql://db/x"}, ()),
        ({"data_roots": ""}, ()),
    ],
)
def test_files_are_read_anywhere_only_where_nobody_else_can_ask(given, readable):
    assert Settings(**given).readable == readable


def test_roots_are_written_as_path_is(monkeypatch, tmp_path):
    monkeypatch.setenv("WARMSCALE_DATA_ROOTS", f"/data:{tmp_path}")
    assert [str(p) for p in Settings().readable] == ["/data", str(tmp_path)]


def test_a_service_with_roots_takes_no_study_from_outside(api, study_spec, tmp_path):
    settings = find_service(api.app, Settings)
    provide_services(api.app, settings.model_copy(update={"data_roots": (tmp_path / "else",)}))
    with pytest.raises(ServiceError, match="WARMSCALE_DATA_ROOTS"):
        api.client.post("/v1/studies", study_spec())
    assert api.client.get("/v1/studies")["items"] == []


PLACES = ("file:///root/st_1/run_1/attempt-001", "s3://bucket/root/st_1/run_1/attempt-001")
# Each of these leads elsewhere for some store: `..` in several encodings, an empty or hidden name,
# a query, a fragment, a backslash, a space, a line break.
ESCAPES = ["", "/", "/../x", "/a/../../x", "/%2e%2e/x", "/..%2fx", "//x", "/a//b", "/.hidden",
           "/a?b", "/a#b", "/a\\b", "/a b", "/\u2025/x", "x", "/a\n"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("escape", ESCAPES)
def test_a_checkpoint_is_published_below_its_attempt_by_plain_names_alone(place, escape):
    with pytest.raises(Problem, match="publishes below"):
        check_published(place + escape, place, "run_1")
    check_published(f"{place}/step-00000001", place, "run_1")


def test_another_scheme_host_or_attempt_is_another_place():
    file, s3 = PLACES
    for uri in (s3, f"file://host{file[7:]}/x", f"{file[:-1]}2/x", f"http{file[4:]}/x", "/x"):
        with pytest.raises(Problem, match="publishes below"):
            check_published(f"{uri}/step", file, "run_1")


def test_a_link_in_an_attempts_place_leads_nowhere(tmp_path):
    (tmp_path / "attempt-001").mkdir()
    (tmp_path / "attempt-001" / "step").symlink_to("/etc")
    with pytest.raises(Problem, match="publishes below"):
        check_published(
            f"file://{tmp_path}/attempt-001/step", f"file://{tmp_path}/attempt-001", "run_1"
        )


def make_caller(project):
    return Caller(key_id="key", scopes=frozenset(), project=project)


@pytest.fixture
def study(shared_api, study_spec):
    body = study_spec()
    path = {"params": {"project": "b"}}
    made = shared_api.client.request("POST", "/v1/studies", body=body, **path).json()
    yield made["id"]
    shared_api.client.request("POST", f"/v1/studies/{made['id']}/cancel", **path)


@pytest.mark.parametrize("spelled", ["{root}/{study}/run_1/a", "{path}/{study}/run_1/a",
                                     "{path}/x/../{study}/a", "{path}/link/run_1/a"])  # fmt: skip
def test_a_checkpoint_of_another_projects_run_is_no_base_however_it_is_spelled(
    shared_api, study, spelled
):
    settings = find_service(shared_api.app, Settings)
    path = settings.home.resolve() / "artifacts"
    path.mkdir(exist_ok=True)
    link = path / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(path / study)
    uri = spelled.format(root=settings.artifact_root, path=path, study=study)
    with shared_api.sessions() as session:
        check_base_uri(session, make_caller("b"), settings, uri)
        check_base_uri(session, make_caller(None), settings, uri)
        with pytest.raises(Problem) as refusal:
            check_base_uri(session, make_caller("a"), settings, uri)
    assert (refusal.value.status, "no checkpoint" in refusal.value.detail) == (404, True)


def test_an_imported_base_stands_in_the_store_or_in_a_root(shared_api, tmp_path):
    local = find_service(shared_api.app, Settings).model_copy(update={"data_roots": (tmp_path,)})
    cloud = local.model_copy(update={"artifacts": "s3://bucket/root"})
    with shared_api.sessions() as session:
        for settings, good in (
            (local, f"{local.artifact_root}/imported/llama"),
            (local, f"{tmp_path}/llama"),
            (local, f"file://{tmp_path}/llama"),
            (cloud, "s3://bucket/root/imported/llama"),
        ):
            check_base_uri(session, make_caller("a"), settings, good)
        for settings, bad in (
            (local, "/etc"),
            (local, f"{tmp_path}/../x"),
            (local, "http://169.254.169.254/latest"),
            (local, "s3://bucket/root/x"),
            (cloud, "s3://bucket/root/../x"),
            (cloud, "s3://bucket/rooted/x"),
            (cloud, "s3://bucket/root/%2e%2e/x"),
            (cloud, "ftp://host/x"),
        ):
            with pytest.raises(Problem) as refusal:
                check_base_uri(session, make_caller("a"), settings, bad)
            assert refusal.value.errors[0].path == "base.uri", bad


def test_a_pattern_that_leads_through_too_many_folders_is_refused_by_field_and_value(
    api, study_spec, tmp_path, monkeypatch
):
    monkeypatch.setattr(glob_patterns, "_MOST_LOOKS", 3)
    for i in range(4):
        (tmp_path / f"{i}").mkdir()
    source = f"{tmp_path}/*/*.txt"
    with pytest.raises(ServiceError) as refused:
        api.client.post("/v1/studies", study_spec(data={"source": source, "context": 32}))
    assert refused.value.status == 422
    assert "data.source" in str(refused.value)
    assert source in str(refused.value)
    assert "fewer" in str(refused.value)
