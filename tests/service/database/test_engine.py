"""The start of a service before its database: it waits until the database is reachable."""

import threading

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

import service.app
from service.cli import serve
from service.cli.main import app
from service.database import engine


@pytest.fixture
def absent(postgres, home):
    """The URL of a server that cannot be reached until `link` is called."""
    link = home / "socket"
    url = postgres.url.set(query={"host": str(link)})
    return url, lambda: link.symlink_to(postgres.url.query["host"])


def test_a_database_that_comes_is_waited_for(absent):
    url, link = absent
    timer = threading.Timer(0.7, link)
    timer.start()
    engine.wait_until_reachable(url, 60)
    timer.join()


def test_a_database_that_does_not_come_is_an_error_in_the_end(absent):
    with pytest.raises(OperationalError, match="No such file"):
        engine.wait_until_reachable(absent[0], 0)


def test_serve_says_shortly_that_it_cannot_reach_its_database(monkeypatch, home):
    url = make_url("postgresql://nobody@127.0.0.1:1/nothing")
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url.render_as_string(hide_password=False))
    monkeypatch.setattr(serve, "_DATABASE_PATIENCE_SECONDS", 0)
    monkeypatch.setattr(serve, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(serve.logs, "configure_logging", lambda _: None)
    result = CliRunner().invoke(app, ["serve", "--home", str(home)])
    assert result.exit_code == 3
    assert "error: cannot reach the database: " in result.output


@pytest.mark.parametrize("error", [StorageInternalError("gone"), OperationalError("", {}, None)])
def test_a_database_that_goes_away_at_the_start_is_waited_for_again(
    monkeypatch, home, database_url, error
):
    """Without this, a replica stayed away if nothing restarted its process."""
    create, served, tries = service.app.create_app, [], iter([error, None])

    def created(*arguments):
        if (away := next(tries)) is not None:
            raise away
        return create(*arguments)

    url = database_url.render_as_string(hide_password=False)
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", url)
    monkeypatch.setattr(service.app, "create_app", created)
    monkeypatch.setattr(serve.Server, "run", lambda _: served.append("once"))
    monkeypatch.setattr(serve, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(serve.logs, "configure_logging", lambda _: None)
    result = CliRunner().invoke(app, ["serve", "--home", str(home)])
    assert (result.exit_code, len(served)) == (0, 1), result.output
