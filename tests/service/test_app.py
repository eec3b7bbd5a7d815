"""The application as a whole: keys on every route, probes, the dashboard, its size, its schema."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from service.access import keys
from service.database.tables import ApiKey

SNAPSHOT = Path(__file__).with_name("openapi.json")
OPEN = {"/healthz", "/readyz"}


def make_key(api, scopes, **more):
    with api.sessions.begin() as session:
        return keys.create_key(session, "test", scopes, **more)


def send_get(api, path, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{api.url}{path}", headers=headers)


def list_calls(api):
    for path, methods in api.app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{", "").replace("}", "")


def test_every_call_but_the_probes_needs_a_key(api):
    checked = 0
    for method, path in list_calls(api):
        response = httpx.request(method, f"{api.url}{path}", json={})
        assert (response.status_code == 401) == (path not in OPEN), (method, path)
        checked += 1
    assert checked > 20


def test_every_call_refuses_a_key_of_another_scope(api):
    keys = {scope: make_key(api, [scope])[1] for scope in ("read", "write", "work", "metrics")}
    for method, path in list_calls(api):
        if path in OPEN:
            continue
        answers = [
            httpx.request(
                method, f"{api.url}{path}", json={}, headers={"Authorization": f"Bearer {key}"}
            ).status_code
            for key in keys.values()
        ]
        assert sorted(status == 403 for status in answers) == [False, True, True, True], (
            method,
            path,
        )


def test_a_key_is_stored_as_its_hash_and_ends_when_revoked_or_expired(api):
    key_id, key = make_key(api, ["read"])
    with api.sessions() as session:
        row = session.get(ApiKey, key_id)
        assert key not in (row.hash, row.name)
    assert send_get(api, "/v1/studies", key).status_code == 200
    with api.sessions.begin() as session:
        assert keys.revoke_key(session, key_id)
        assert not keys.revoke_key(session, key_id)
    assert send_get(api, "/v1/studies", key).status_code == 401
    _, old = make_key(api, ["read"], expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert send_get(api, "/v1/studies", old).status_code == 401
    assert send_get(api, "/v1/studies", "ws_wrong").headers["WWW-Authenticate"] == "Bearer"


def test_probes_answer_without_a_key(api):
    assert send_get(api, "/healthz").json() == {"status": "ok"}
    assert send_get(api, "/readyz").json() == {"status": "ready"}


def test_metrics_answer_a_key_of_their_own_scope(api):
    _, key = make_key(api, ["metrics"])
    send_get(api, "/healthz")
    assert "warmscale_request_seconds_bucket" in send_get(api, "/metrics", key).text


def test_metrics_count_runs_by_state(api, submit, worker):
    submit()
    worker.lease(2)
    assert (
        'warmscale_runs{kind="trial",state="leased"} 2.0' in send_get(api, "/metrics", api.key).text
    )


@pytest.mark.parametrize("auth_of", [lambda k: ("any", k), None])
def test_the_dashboard_shows_the_study_to_a_key_and_to_nobody_else(api, submit, auth_of):
    study = submit()
    basic = auth_of(api.key) if auth_of else None
    page = httpx.get(f"{api.url}/dashboard/", auth=basic)
    studies = httpx.get(f"{api.url}/api/studies", auth=basic)
    if basic is None:
        assert (page.status_code, studies.status_code) == (401, 401)
        assert "Basic" in page.headers["WWW-Authenticate"]
    else:
        assert page.status_code == 200
        assert study["name"] in studies.text


def test_the_dashboard_cannot_write_what_leases_own(api, submit):
    submit()
    basic = ("any", api.key)
    for method, path in (
        ("POST", "/api/studies"),
        ("DELETE", "/api/studies/1"),
        ("POST", "/api/studies/1/rename"),
        ("POST", "/api/trials/1/tell"),
    ):
        assert httpx.request(method, f"{api.url}{path}", auth=basic, json={}).status_code == 403


def test_a_database_that_is_away_is_a_503_problem_and_the_process_stays_healthy(
    api, postgres, database_url
):
    from sqlalchemy import text

    name = database_url.database
    with postgres.admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n"),
            {"n": name},
        )
        try:
            assert send_get(api, "/healthz").status_code == 200
            away = send_get(api, "/readyz")
            assert (away.status_code, away.json()["type"]) == (
                503,
                "urn:warmscale:database-unavailable",
            )
        finally:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    assert send_get(api, "/readyz").status_code == 200


def test_the_openapi_document_is_the_one_on_record(api):
    found = json.dumps(api.app.openapi(), indent=1, sort_keys=True) + "\n"
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(found)
        pytest.fail(f"{SNAPSHOT.name} was missing and is written now: read it and commit it")
    assert found == SNAPSHOT.read_text(), f"the API changed: delete {SNAPSHOT.name} and run again"


def test_the_api_process_is_small_and_loads_neither_torch_nor_ray(database_url, tmp_path):
    program = """
import sys, threading, time, resource, httpx, uvicorn
from pathlib import Path
from service.access import keys
from service.app import create_app
from service.database.engine import normalize_url
from service.settings import Settings
from service.web.services import Database, find_service
app = create_app(Settings(home=Path(sys.argv[2])), normalize_url(sys.argv[1]))
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
with find_service(app, Database).sessions.begin() as session:
    key = keys.create_key(session, "k", ["admin"])[1]
headers = {"Authorization": f"Bearer {key}"}
http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers)
spec = {
    "name": "small", "data": {"source": "stdlib"},
    "proxy": {"width": 32, "depth": 1, "head_dim": 16}, "target": {"width": 64},
    "search_space": {"lr": {"type": "float", "low": 0.001, "high": 0.01}},
    "hpo": {"trials": 30, "parallel": 30, "sampler": "tpe"},
}
assert http.post("/v1/studies", json=spec).status_code == 201
for _ in range(30):
    ask = {"worker": "w", "resources": {"cpus": 9}}
    (lease,) = http.post("/v1/leases", json=ask).json()["leases"]
    run, token = f"/v1/runs/{lease['run_id']}", {"Lease-Token": lease["lease_token"]}
    point = {"step": 1, "tokens": 1, "val_loss_nats": 2.0, "evaluation": 1}
    http.post(f"{run}/measurements", json={"measurements": [point]}, headers=token)
    http.post(f"{run}/finish", json={"outcome": "succeeded", "val_loss_nats": 2.0}, headers=token)
for path in ("/docs", "/openapi.json", "/metrics", "/dashboard/", "/v1/studies/small/results",
             "/v1/studies/small/report", "/v1/studies/small/importance", "/api/studies/1"):
    assert http.get(path).status_code == 200, path
loaded = sorted({"torch", "ray", "transformers", "workers"} & set(sys.modules))
resident = [line for line in open("/proc/self/status") if line.startswith("VmRSS")][0].split()[1]
print(loaded, int(resident) // 1024)
"""
    url = database_url.render_as_string(hide_password=False)
    arguments = [sys.executable, "-c", program, url, str(tmp_path)]
    output = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr[-3000:]
    loaded, megabytes = output.stdout.rsplit(maxsplit=1)
    assert loaded == "[]"
    assert int(megabytes) < 300
