"""Bad input is refused at submission; the message names field, value and a value that works."""

import json
import threading

import httpx
import pytest

from service.client import ServiceError
from service.settings import Settings
from service.web import json_body
from service.web.services import find_service


@pytest.fixture
def api(shared_api):
    """A shared API: a refused request leaves nothing behind."""
    return shared_api


def lr(**changes):
    return {"lr": {"type": "float", "low": 1e-3, "high": 3e-2} | changes}


# A changed field of the spec, the path and value in the answer, and a part of its message.
def bad(path, value, works, **spec):
    return pytest.param(spec, path, value, works, id=f"{path}={value}")


CASES = [
    bad("colour", "red", "unknown key", colour="red"),
    bad("hpo.tirals", 3, "unknown key", hpo={"trials": 4, "tirals": 3}),
    bad("search_space.lr.low", 0.5, "below high 0.03", search_space=lr(low=0.5)),
    bad("search_space.lr.low", 0.03, "below high 0.03", search_space=lr(low=0.03)),
    bad("search_space.lr.low", 0, "above 0", search_space=lr(low=0, log=True)),
    bad("search_space.lr", -1, "greater than 0", search_space=lr(low=-1)),
    bad("search_space.magic", "magic", "lr", search_space={"magic": lr()["lr"]}),
    bad(
        "search_space.lr.choices",
        [],
        "at least 1",
        search_space={"lr": {"type": "categorical", "choices": []}},
    ),
    bad("search_space", {}, "at least one dimension", search_space={}),
    bad("proxy", None, "32 or 48", proxy={"width": 40, "depth": 1, "head_dim": 16}),
    bad("proxy.depth", 0, "greater than 0", proxy={"width": 32, "depth": 0, "head_dim": 16}),
    bad("target.width", 16, "smaller than base width 32", target={"width": 16}),
    bad("target.width", 72, "64 or 80", target={"width": 72}),
    bad("target.width", 48, "32 or 64", target={"width": 48}, warmstart={"operator": "clone"}),
    bad("target.depth", 3, "use depth 1", target={"width": 64, "depth": 3},
        warmstart={"depth_operator": None}),
    bad("target.depth", 3, "2 or 4 work", target={"width": 64, "depth": 3},
        proxy={"width": 32, "depth": 2, "head_dim": 16}),
    bad("target.train.lr", -1, "greater than 0", target={"width": 64, "train": {"lr": -1}}),
    bad("target.train.colour", "red", "not permitted",
        target={"width": 64, "train": {"colour": "red"}}),
    bad("ladder.1.width", 48, "smaller", target=None, ladder=[{"width": 64}, {"width": 48}]),
    bad("ladder", 1, "exclude each other", ladder=[{"width": 64}]),
    bad("hpo.trials", 4, "3 would work", hpo={"trials": 4, "sampler": "grid"},
        search_space={"lr": {"type": "categorical", "choices": [0.1, 0.2, 0.3]}}),
    bad("search_space.lr.step", None, "needs a step", hpo={"trials": 4, "sampler": "grid"}),
    bad("hpo.sampler", "best", "tpe", hpo={"trials": 4, "sampler": "best"}),
    bad("hpo.trials", True, "a number, not true", hpo={"trials": True}),
    bad("search_space.lr.low", True, "a number, not true", search_space=lr(low=True)),
    bad("resources.trial.cpus", True, "a number, not True", resources={"trial": {"cpus": True}}),
    bad("hpo.trials", 0, "greater than or equal to 1", hpo={"trials": 0}),
    bad("name", "a b/c", "pattern", name="a b/c"),
    bad("train", None, "batch_size 4 or 8 would work", train={"batch_size": 6, "accumulate": 4}),
    bad("target.train", None, "4 or 8 would work",
        target={"width": 64, "train": {"batch_size": 6, "accumulate": 4}}),
    bad("search_space.batch_size", 4, "multiples of 4", train={"accumulate": 4},
        search_space={"batch_size": {"type": "int", "low": 8, "high": 16}}),
    bad("target.train.accumulate", 4, "multiples of 4",
        search_space={"batch_size": {"type": "int", "low": 4, "high": 8}},
        target={"width": 64, "train": {"accumulate": 4}}),
    bad("target.train.batch_size", 6, "4 or 8 would work",
        search_space={"batch_size": {"type": "categorical", "choices": [4, 6]}},
        target={"width": 64, "train": {"accumulate": 4}}),
    bad("target.train.warmup_fraction", 0.0, "0.01 works",
        search_space={"warmup_fraction": {"type": "float", "low": 0.0, "high": 0.1}},
        target={"width": 64, "train": {"schedule": "rewarm"}}),
    bad("warmstart.base_weights", "ema", "train.ema_half_life; use raw",
        warmstart={"base_weights": "ema"}),
    bad("resources.target.processes", 2, "processes 4 would work, or gpus 2",
        resources={"target": {"gpus": 4, "processes": 2}}),
    bad("resources.trial.processes", 2, "processes 1 would work, or gpus 2",
        resources={"trial": {"gpus": 0.5, "processes": 2}}),
    bad("resources.target.cpus", 3, "2 or 4 would work",
        resources={"target": {"cpus": 3, "processes": 2}}),
    bad("resources.target.cpus", 1, "2 would work", resources={"target": {"processes": 2}}),
    bad("resources.target.strategy", "zero", "fsdp", resources={"target": {"strategy": "zero"}}),
    bad("resources.target.processes", 4, "batch_size 6 is no multiple of 4 processes; 4 or 8",
        target={"width": 64, "train": {"batch_size": 6}}, resources={"target": {"gpus": 4}}),
    bad("resources.trial.processes", 2, "low and step of that kind",
        search_space={"batch_size": {"type": "int", "low": 4, "high": 16}},
        resources={"trial": {"cpus": 2, "processes": 2}}),
    bad("resources.target.processes", 2, "strategy ddp would work",
        train={"optimizer": "muon"},
        resources={"target": {"cpus": 2, "processes": 2, "strategy": "fsdp"}}),
    bad("data.source", "/no/such/file", "/no/such/file", data={"source": "/no/such/file"}),
    bad("data.tokenizer", "gpt2", "byte", data={"source": "stdlib", "tokenizer": "gpt2"}),
    bad("data.tokenizer", "bpe:256", "bpe:257", data={"source": "stdlib", "tokenizer": "bpe:256"}),
    bad("data.tokenizer", "/no/tokenizer.json", "No such file",
        data={"source": "stdlib", "tokenizer": "/no/tokenizer.json"}),
    bad("data.tokenizer", "none", "bpe:N",
        data={"source": "stdlib", "tokenizer": "none", "vocab_size": 9}),
    bad("data.vocab_size", None, "how many", data={"source": "stdlib", "tokenizer": "none"}),
    bad("data.vocab_size", 9, "not the 512 of tokenizer bpe:512",
        data={"source": "stdlib", "tokenizer": "bpe:512", "vocab_size": 9}),
    bad("proxy.vocab_size", 256, "the 512 of tokenizer bpe:512",
        data={"source": "stdlib", "tokenizer": "bpe:512"},
        proxy={"width": 32, "depth": 1, "head_dim": 16, "vocab_size": 256}),
    bad("data.source", "hf:no/such", "load_dataset('no/such', split='train')",
        data={"source": "hf:no/such"}),
    bad("train.warmup_fraction", 1.5, "less than 1", train={"warmup_fraction": 1.5}),
    bad("search_space.warmup_fraction", 0.9, "exceed 1", search_space=lr() | {
        "warmup_fraction": {"type": "float", "low": 0.1, "high": 0.9}}),
    bad("search_space.muon_lr_ratio", 0.5, "set optimizer muon", search_space={
        "muon_lr_ratio": {"type": "float", "low": 0.5, "high": 2.0}}),
    bad("target.train.muon_lr_ratio", 0.5, "set optimizer muon", train={"optimizer": "muon"},
        target={"width": 64, "train": {"optimizer": "adamw"}},
        search_space={"muon_lr_ratio": {"type": "float", "low": 0.5, "high": 2.0}}),
    bad("target.train.optimizer", "muon", "use reset, or optimizer adamw",
        target={"width": 64, "train": {"optimizer": "muon"}},
        warmstart={"operator": "clone", "optimizer_state": "transfer"}),
    bad("target.budgets", [5], "tokens_per_param 5", target={"width": 64, "budgets": [5]}),
    bad("target.budgets", [5, 2], "[2, 5] would", target={"width": 64, "budgets": [5, 2]}),
    bad("target.budgets", [5, 5], "[5] would", target={"width": 64, "budgets": [5, 5]}),
    bad("target.budgets.0", 0, "greater than 0", target={"width": 64, "budgets": [0, 5]}),
    bad("target.budgets", [5, 5.0001], "same step", target={"width": 64, "budgets": [5, 5.0001]}),
    bad("target.budgets", [0.05, 5], "in the warmup", target={"width": 64, "budgets": [0.05, 5]}),
    bad("target.budgets", [1, 2], "wsd with a cooldown", train={"schedule": "cosine"},
        target={"width": 64, "budgets": [1, 2]}),
    bad("target.budgets", [1, 2], "cooldown_fraction 0, in the search space",
        search_space={"cooldown_fraction": {"type": "float", "low": 0, "high": 0.5}},
        target={"width": 64, "budgets": [1, 2]}),
    bad("target.budgets", [1, 1.03], "at batch_size 128, in the search space",
        search_space={"batch_size": {"type": "categorical", "choices": [8, 128]}},
        target={"width": 64, "budgets": [1, 1.03]}),
    bad("target.train.tokens_per_param", 3, "leave one of the two out",
        target={"width": 64, "budgets": [1, 2], "train": {"tokens_per_param": 3}}),
    bad("ladder.1.budgets", [1, 2], "have one budget each", target=None,
        ladder=[{"width": 48}, {"width": 64, "budgets": [1, 2]}]),
    bad("train", None, "20 steps has 16 before its cooldown",
        train={"warmup_steps": 17, "batch_size": 8, "num_tokens": 8 * 32 * 20}),
    bad("search_space", None, "5 steps has 3 before its cooldown", search_space={
        "batch_size": {"type": "int", "low": 8, "high": 32},
        "cooldown_fraction": {"type": "float", "low": 0.1, "high": 0.4}},
        train={"warmup_steps": 4, "num_tokens": 8 * 32 * 20}),
    bad("search_space.warmup_fraction", 3, "decides nothing", search_space=lr() | {
        "warmup_fraction": {"type": "float", "low": 0.0, "high": 0.1}},
        train={"warmup_steps": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "path", "value", "works"), CASES)
def test_a_bad_field_is_named_with_its_value_and_what_works(
    api, study_spec, spec, path, value, works
):
    before = api.client.get("/v1/studies")
    with pytest.raises(ServiceError) as refused:
        api.client.post("/v1/studies", study_spec(**spec))
    assert refused.value.status == 422
    fields = {e["path"]: e for e in refused.value.problem["errors"]}
    assert path in fields, fields
    assert works in fields[path]["message"]
    if value is not None:
        assert fields[path]["value"] == value
    assert api.client.get("/v1/studies") == before


def corpus_problem(api, study_spec, source):
    with pytest.raises(ServiceError) as refused:
        api.client.post("/v1/studies", study_spec(data={"source": str(source), "context": 64}))
    (field,) = refused.value.problem["errors"]
    assert (refused.value.status, field["path"], field["value"]) == (
        422,
        "data.source",
        str(source),
    )
    return field["message"]


def test_an_empty_corpus_is_refused(api, study_spec, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "empty" in corpus_problem(api, study_spec, tmp_path / "empty.txt")
    (tmp_path / "nothing").mkdir()
    corpus_problem(api, study_spec, tmp_path / "nothing")
    corpus_problem(api, study_spec, tmp_path / "*.none")


def test_a_corpus_shorter_than_one_context_is_refused_with_both_numbers(api, study_spec, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 40)
    message = corpus_problem(api, study_spec, tmp_path / "short.txt")
    assert "65" in message


def data_problem(api, study_spec, **data):
    with pytest.raises(ServiceError) as refused:
        api.client.post("/v1/studies", study_spec(data={"context": 64} | data))
    (field,) = refused.value.problem["errors"]
    return refused.value.status, field["path"], field["message"]


def test_what_data_files_lack_is_named_with_the_field_to_change(api, study_spec, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "a.bin").write_bytes(b"\0" * 4000)
    status, path, message = data_problem(api, study_spec, source=str(tmp_path / "a.jsonl"))
    assert (status, path) == (422, "data.text_field")
    assert "a.jsonl:1: no 'text' in this record; its keys are: body" in message
    tokens = {"source": str(tmp_path / "a.bin")}
    assert data_problem(api, study_spec, **tokens)[:2] == (422, "data.tokenizer")
    named = tokens | {"tokenizer": "none", "vocab_size": 9}
    assert data_problem(api, study_spec, **named)[:2] == (422, "data.token_dtype")


def test_phases_that_fit_alone_but_not_together_are_refused(api, study_spec):
    space = lr() | {
        "warmup_fraction": {"type": "float", "low": 0.1, "high": 0.6},
        "cooldown_fraction": {"type": "float", "low": 0.1, "high": 0.6},
    }
    with pytest.raises(ServiceError, match="exceed 1"):
        api.client.post("/v1/studies", study_spec(search_space=space))


def test_an_enqueued_batch_without_equal_parts_is_refused(api, submit):
    space = lr() | {"batch_size": {"type": "int", "low": 4, "high": 16, "step": 4}}
    study = submit(search_space=space, train={"accumulate": 4})
    with pytest.raises(ServiceError, match="batch_size 6 is no multiple of accumulate 4"):
        api.client.post(f"/v1/studies/{study['id']}/trials", {"params": {"batch_size": 6}})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b'{"name": NaN}', b"\xff", b'{"a":' * 2000]
)
def test_a_body_that_is_no_spec_is_a_422_problem(api, body):
    headers = {"Authorization": f"Bearer {api.key}", "Content-Type": "application/json"}
    response = httpx.post(f"{api.url}/v1/studies", content=body, headers=headers)
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_in_specs_and_in_reports(
    api, study_spec, submit, worker, number
):
    headers = {"Authorization": f"Bearer {api.key}", "Content-Type": "application/json"}
    text = json.dumps(study_spec(train={"lr": 123.456})).replace("123.456", number)
    assert httpx.post(f"{api.url}/v1/studies", content=text, headers=headers).status_code == 422
    submit()
    lease = worker.lease_one()
    point = f'{{"measurements": [{{"step": 1, "tokens": 1, "loss_nats": {number}}}]}}'
    response = httpx.post(
        f"{api.url}/v1/runs/{lease.run_id}/measurements",
        content=point,
        headers=headers | {"Lease-Token": lease.lease_token},
    )
    assert response.status_code == 422
    assert api.client.get(f"/v1/runs/{lease.run_id}/measurements")["items"] == []


def test_warnings_name_what_does_not_transfer(api, study_spec):
    space = lr() | {"batch_size": {"type": "int", "low": 4, "high": 16}}
    spec = study_spec(search_space=space, warmstart={"seeds": 1})
    warnings = api.client.post("/v1/studies", spec)["warnings"]
    assert any("batch_size" in w and "muTransferable" in w for w in warnings)
    assert any("no interval" in w for w in warnings)


def send(api, method, path, body=None):
    headers = {"Authorization": f"Bearer {api.key}", "Content-Type": "application/json"}
    content = json.dumps(body) if not isinstance(body, str | bytes) else body
    return httpx.request(method, f"{api.url}{path}", content=content, headers=headers)


# The key is the path in the answer, or the beginning of it.
HUGE = {
    "train.num_tokens": {"train": {"num_tokens": 10**30}},
    "train.tokens_per_param": {"train": {"tokens_per_param": 1e300}},
    "train.batch_size": {"train": {"batch_size": 10**30}},
    "train.evaluations": {"train": {"evaluations": 10**12}},
    "target.width": {"target": {"width": 16 * 10**15}},
    "target.train.num_tokens": {"target": {"width": 64, "train": {"num_tokens": 10**30}}},
    "target.train.batch_size": {"target": {"width": 64, "train": {"batch_size": 10**30}}},
    "proxy.width": {"proxy": {"width": 16 * 10**400, "depth": 1, "head_dim": 16}},
    "proxy.ffn_ratio": {"proxy": {"width": 32, "depth": 1, "head_dim": 16, "ffn_ratio": 1e308}},
    "proxy.vocab_size": {"proxy": {"width": 32, "depth": 1, "head_dim": 16, "vocab_size": 10}},
    "search_space.lr.low": {"search_space": {"lr": {"type": "int", "low": 10**400, "high": 1}}},
    "search_space.lr": {"search_space": {"lr": {"type": "int", "low": 0, "high": 10**12}},
                        "hpo": {"trials": 4, "sampler": "grid"}},
    "search_space": {"search_space": {"lr": {"type": "float", "low": 1e-3, "high": 1e-2,
                                             "step": 1e-9}},
                     "hpo": {"trials": 4, "sampler": "grid"}},
    "search_space.batch_size.type": {
        "search_space": {"batch_size": {"type": "float", "low": 8, "high": 64}}},
    "search_space.batch_size": {
        "search_space": {"batch_size": {"type": "categorical", "choices": [8, 8.5]}}},
    "search_space.cooldown_fraction.choices.0": {
        "search_space": {"cooldown_fraction": {"type": "categorical", "choices": ["a", 0.2]}}},
    "resources.trial": {"resources": {"trial": {"gpus": 0.00001}}},
    "resources.target": {"resources": {"target": {"gpus": 1.5}}},
    "data.source": {"data": {"source": "~nosuchuser/x"}},
}  # fmt: skip


@pytest.mark.parametrize("path", HUGE)
def test_sizes_and_types_that_no_run_could_have_are_refused_at_submission(api, study_spec, path):
    response = send(api, "POST", "/v1/studies", study_spec(**HUGE[path]))
    assert response.status_code == 422, response.text
    found = [error["path"] for error in response.json()["errors"]]
    assert any(f == path or f.startswith(f"{path}.") for f in found), found


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/studies/%00", None),
        ("GET", "/v1/runs/a%00", None),
        ("POST", "/v1/leases", {"worker": "a\0b"}),
        ("POST", "/v1/leases", {"worker": "w", "study": "a\0b"}),
        ("POST", "/v1/studies", '{"name": "\\ud800"}'),
        ("POST", "/v1/studies", '{"\\ud800": 1}'),
        ("POST", "/v1/studies", b'{"name": ' + b"9" * 5000 + b"}"),
    ],
)
def test_text_that_cannot_be_stored_is_no_fault_of_ours(api, submit, method, path, body):
    study = submit()
    response = send(api, method, path, body)
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/problem+json"
    after = api.client.get(f"/v1/studies/{study['id']}")
    assert (after["state"], after["trials"]["leased"]) == ("active", 0)


def test_a_bad_lease_fails_no_study_and_is_named_by_its_field(api, submit, worker):
    study = submit()
    for bad in ("a\0b", "\ud800", "", "w" * 201):
        response = send(api, "POST", "/v1/leases", {"worker": bad})
        assert (response.status_code, response.json()["errors"][0]["path"]) == (422, "worker")
    assert worker.lease_one(study=study["id"])
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "active"


def test_numbers_beyond_the_database_are_refused(api, submit, worker):
    study = submit()
    lease = worker.lease_one()
    run = f"/v1/runs/{lease.run_id}/measurements"
    headers = {"Authorization": f"Bearer {api.key}", "Lease-Token": lease.lease_token}
    for step in (2**63, 10**30):
        body = {"measurements": [{"step": step, "tokens": 1}]}
        assert httpx.post(f"{api.url}{run}", json=body, headers=headers).status_code == 422
    for given in ({"trial": 10**30}, {"checkpoint": 10**30}):
        body = given | {"target": {"width": 64}}
        assert send(api, "POST", f"/v1/studies/{study['id']}/targets", body).status_code == 422
    error = {"outcome": "failed", "error": "a\0b"}
    finish = f"{api.url}/v1/runs/{lease.run_id}/finish"
    assert httpx.post(finish, json=error, headers=headers).status_code == 422


# Cursors are base64; these decode to nothing, to text, to a date alone, or to a row of another
# list.
CURSORS = [
    "",
    "x",
    "====",
    "'; DROP TABLE runs; --",
    "MjAyNg==",
    "MjAyNi0wMS0wMQphAA==",
    "\u202e",
    "9" * 4000,
]


@pytest.mark.parametrize("cursor", CURSORS)
def test_a_forged_cursor_or_event_id_is_refused(api, submit, cursor):
    study = submit()
    key = {"Authorization": f"Bearer {api.key}"}
    for path in ("studies", "runs"):
        found = httpx.get(f"{api.url}/v1/{path}", params={"cursor": cursor}, headers=key)
        assert found.status_code in (200, 422)
    if cursor:
        events = f"{api.url}/v1/studies/{study['id']}/events"
        header = {"Last-Event-ID": cursor.encode()}
        assert httpx.get(events, headers=key | header).status_code == 422


# A recursive parser without a limit would overflow its stack here.
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "body",
    [DEEP, b'{"name":' + DEEP, b'{"a":' * 50_000, b'{"name": 1' + b"0" * 100_000 + b"}"],
    ids=["list", "field", "mapping", "number"],
)
def test_a_body_too_deep_or_too_long_for_the_parser_is_a_4xx_problem(api, body):
    for path in ("/v1/studies", "/v1/leases"):
        response = send(api, "POST", path, body)
        assert 400 <= response.status_code < 500
        assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("name", ["..%2f..", "%2e%2e", "a%2fb", "%0d%0aX: 1", "%ff", "a" * 5000])
def test_a_path_that_names_nothing_is_a_404_problem(api, name):
    for path in (f"/v1/studies/{name}", f"/v1/runs/{name}", f"/v1/studies/{name}/report"):
        response = send(api, "GET", path)
        assert response.status_code in (404, 405, 422), (path, response.text)
        assert response.headers["content-type"] == "application/problem+json"
        assert "X" not in response.headers


def test_a_tokenizer_of_no_user_is_refused_by_its_field(api, study_spec):
    spec = study_spec(data={"source": "stdlib", "tokenizer": "~nosuchuser/tokenizer.json"})
    response = send(api, "POST", "/v1/studies", spec)
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["path"] == "data.tokenizer"


TWICE = b'[{"deep": {"lr": 1, "seed": 2, "lr": 3}}]'


def test_a_key_given_twice_is_refused_by_its_name_on_every_call(api):
    """Parsers differ in the value that they keep: two readers of a spec would train two runs."""
    document, asked = httpx.get(f"{api.url}/openapi.json").json(), 0
    for path, methods in document["paths"].items():
        for method in (m for m, call in methods.items() if "requestBody" in call):
            response = send(api, method.upper(), path, TWICE)
            assert response.status_code == 422, (path, response.text)
            (field,) = response.json()["errors"]
            assert (field["path"], field["value"]) == ("lr", [1, 3])
            asked += 1
    assert asked >= 7


def test_nothing_is_stored_of_a_body_with_a_key_twice(api, study_spec):
    before = api.client.get("/v1/studies")
    text = json.dumps(study_spec()).replace('{"name": ', '{"name": "first", "name": ', 1)
    # Python's parser accepts the text and keeps the last value.
    assert json.loads(text)
    assert send(api, "POST", "/v1/studies", text).json()["errors"][0]["path"] == "name"
    assert api.client.get("/v1/studies") == before


def test_a_long_body_is_read_beside_the_loop_that_serves_the_others(api, study_spec, monkeypatch):
    threads, parse_body = [], json_body._parse_body

    def seen(body):
        threads.append(threading.current_thread())
        return parse_body(body)

    monkeypatch.setattr(json_body, "_parse_body", seen)
    # Above 64 kB a body is parsed in a thread: the loop goes on serving other requests.
    short = json.dumps(study_spec(colour="red"))
    for text in (short, short + " " * 2**17):
        assert send(api, "POST", "/v1/studies", text).status_code == 422
    assert threads[0] is not threads[1]
    assert "worker" in threads[1].name


def test_of_two_hundred_parameters_that_are_none_the_first_is_named_with_those_that_work(
    api, study_spec
):
    space = lr() | {f"parameter_{i}": lr()["lr"] for i in range(200)}
    response = send(api, "POST", "/v1/studies", study_spec(search_space=space))
    (field,) = response.json()["errors"]
    assert (response.status_code, field["path"]) == (422, "search_space.parameter_0")
    assert "weight_decay" in field["message"]
    assert len(response.content) < 10_000


@pytest.mark.parametrize("name", ["LR", "Lr", "lR", "lr ", "\u217cr"])
def test_a_parameter_in_another_case_is_another_and_refused(api, study_spec, name):
    space = lr() | {name: lr()["lr"]}
    response = send(api, "POST", "/v1/studies", study_spec(search_space=space))
    assert response.status_code == 422
    assert [error["path"] for error in response.json()["errors"]] == [f"search_space.{name}"]


def test_names_of_studies_are_told_apart_by_case(api, study_spec):
    made = [api.client.post("/v1/studies", study_spec(name=name)) for name in ("Case", "case")]
    assert [api.client.get(f"/v1/studies/{s['name']}")["id"] for s in made] == [
        s["id"] for s in made
    ]


def test_a_body_of_the_limit_is_a_study_and_one_of_ten_megabytes_says_what_the_limit_is(
    api, study_spec
):
    most = find_service(api.app, Settings).max_body_bytes
    # Spaces around a JSON text are valid: the second body has exactly the largest size.
    large = send(api, "POST", "/v1/studies", b" " * 10_000_000)
    assert (large.status_code, large.json()["type"]) == (
        413,
        "urn:warmscale:request-entity-too-large",
    )
    assert f"at most {most} bytes (WARMSCALE_MAX_BODY_BYTES)" in large.json()["detail"]
    fits = json.dumps(study_spec()).encode().ljust(most)
    assert send(api, "POST", "/v1/studies", fits).status_code == 201
