"""Closed connections: after an idle time no request fails, and before it a single request."""

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from service.database import pool
from service.database.engine import make_engine


@pytest.fixture
def engine(database_url):
    engine = make_engine(database_url, 3)
    yield engine
    engine.dispose()


def read_backend_pid(engine):
    with engine.connect() as connection:
        return connection.scalar(text("SELECT pg_backend_pid()"))


def close_connections(engine, postgres):
    ids = set()
    with engine.connect() as one, engine.connect() as other:
        ids |= {c.scalar(text("SELECT pg_backend_pid()")) for c in (one, other)}
    with postgres.admin.connect() as admin:
        for pid in ids:
            admin.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    return ids


def test_after_a_while_closed_connections_are_replaced_unnoticed(engine, postgres, monkeypatch):
    ids = close_connections(engine, postgres)
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.0)
    assert read_backend_pid(engine) not in ids
    assert read_backend_pid(engine) not in ids


def test_at_once_one_request_fails_and_the_next_has_a_new_pool(engine, postgres, monkeypatch):
    monkeypatch.setattr(pool, "IDLE_SECONDS", 3600.0)
    ids = close_connections(engine, postgres)
    with pytest.raises(OperationalError):
        read_backend_pid(engine)
    assert read_backend_pid(engine) not in ids
    assert read_backend_pid(engine) not in ids


def test_a_connection_in_use_is_not_asked_first_whether_it_is_there(engine, monkeypatch):
    monkeypatch.setattr(pool, "IDLE_SECONDS", 3600.0)
    before, statements = read_backend_pid(engine), []
    event.listen(engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
    assert read_backend_pid(engine) == before
    # No statement that tests the connection comes first.
    assert statements == ["SELECT pg_backend_pid()"]
