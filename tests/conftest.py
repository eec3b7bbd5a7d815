"""Fixtures with real parts: a PostgreSQL for the session, a database and an API for each test."""

import contextlib
import itertools
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.ports import free_port
from tests.by_hand import Worker

os.environ.setdefault("TZ", "UTC")
_numbers = itertools.count()


@contextlib.contextmanager
def make_scratch_folder():
    """Make a folder outside of pytest's folder, and delete it when the context ends."""
    # Every new pytest run closes pytest's folder to other users. When root runs the tests, the
    # embedded server runs as another user and could not read its data there.
    with tempfile.TemporaryDirectory(prefix="warmscale-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def home():
    """A folder for `WARMSCALE_HOME`, deleted after the test."""
    with make_scratch_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def postgres():
    """A running server with a database `template_warmscale` that has every table."""
    from sqlalchemy import create_engine, text

    from service.database import engine as db
    from service.operations import migrations

    db.use_utc()
    with make_scratch_folder() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs warns that root has no XDG_RUNTIME_DIR
            server = db.start_embedded(folder)
        with server:
            url = db.normalize_url(server.get_uri())
            admin = create_engine(url, isolation_level="AUTOCOMMIT")
            with admin.connect() as connection:
                # No test cuts the power, so an fsync would only cost time.
                connection.execute(text("ALTER SYSTEM SET fsync = off"))
                connection.execute(text("SELECT pg_reload_conf()"))
                connection.execute(text("CREATE DATABASE template_warmscale"))
            migrations.upgrade_database(url.set(database="template_warmscale"))
            yield SimpleNamespace(url=url, admin=admin, server=server)
            admin.dispose()


@contextlib.contextmanager
def create_database(postgres):
    from sqlalchemy import text

    name = f"test_{next(_numbers)}"
    with postgres.admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template_warmscale"))
    yield postgres.url.set(database=name)
    with postgres.admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def database_url(postgres):
    """The URL of a fresh, upgraded database."""
    with create_database(postgres) as url:
        yield url


@pytest.fixture
def sampler(database_url):
    """A sampler on a fresh database, with connections for four threads."""
    from service.database.engine import optuna_url
    from service.optuna_bridge.sampler import Sampler

    sampler = Sampler(optuna_url(database_url), pool_size=4)
    yield sampler
    sampler.close()


def make_settings(home):
    from service.settings import Settings

    return Settings(home=home, lease_seconds=5.0, port=free_port())


@pytest.fixture
def settings(home):
    return make_settings(home)


@contextlib.contextmanager
def serve_api(settings, database_url):
    """Serve the API in a thread of this process; `client` holds an admin key."""
    import uvicorn

    from service.access import keys
    from service.app import create_app
    from service.client import Client
    from service.optuna_bridge.sampler import Sampler
    from service.web.services import Database, find_service
    from service.web.shutdown import Server, Shutdown

    app = create_app(settings, database_url)
    config = uvicorn.Config(app, host="127.0.0.1", port=settings.port, log_level="warning")
    server = Server(config, find_service(app, Shutdown))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the API did not start; see its log above"
        time.sleep(0.01)
    database = find_service(app, Database)
    with database.sessions.begin() as session:
        _, key = keys.create_key(session, "tests", ["admin"])
    url = f"http://127.0.0.1:{settings.port}"
    try:
        with Client(url, key, patience_seconds=2) as client:
            yield SimpleNamespace(
                url=url,
                key=key,
                client=client,
                app=app,
                sessions=database.sessions,
                engine=database.engine,
                sampler=find_service(app, Sampler),
            )
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive(), "the API did not stop"


@pytest.fixture
def api(database_url, settings):
    """A serving API; `api.client` holds an admin key."""
    with serve_api(settings, database_url) as api:
        yield api


@pytest.fixture(scope="module")
def shared_api(postgres):
    """An API for all tests of a module; each test leaves it without queued runs."""
    with (
        make_scratch_folder() as home,
        create_database(postgres) as url,
        serve_api(make_settings(home), url) as api,
    ):
        yield api


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Check the invariants after every test with an API, unless it is marked `tampers`."""
    violations = ()
    try:
        api = getattr(item, "funcargs", {}).get("api")
        if api is not None and item.get_closest_marker("tampers") is None:
            violations = find_violations(api.engine)
    finally:
        result = yield
    assert violations == ()
    return result


def find_violations(engine, **options):
    """Return the violations that `warmscale db check` would print."""
    from service.operations import invariants

    with invariants.open_snapshot(engine) as session:
        return invariants.check_database(session, **options).violations


@pytest.fixture
def worker(api):
    return Worker(api.client)


@pytest.fixture
def submit(api, study_spec):
    def create(**changes):
        return api.client.post("/v1/studies", study_spec(**changes))

    return create


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of 40 small documents, 60 kB in all."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        lines = [f"document {i} line {j}: {i * j} is {i} times {j}\n" for j in range(40)]
        (folder / f"{i:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def study_spec(corpus):
    """Make the spec of a small study; keyword arguments replace its parts."""

    def make(**changes):
        spec = {
            "name": f"study-{next(_numbers)}",
            "data": {"source": str(corpus), "context": 32},
            "proxy": {"width": 32, "depth": 1, "head_dim": 16},
            "target": {"width": 64},
            "train": {"batch_size": 8, "num_tokens": 8 * 32 * 20, "evaluations": 4},
            "search_space": {"lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True}},
            "hpo": {"trials": 4, "parallel": 2, "sampler": "random", "pruner": "none"},
        }
        return spec | changes

    return make
