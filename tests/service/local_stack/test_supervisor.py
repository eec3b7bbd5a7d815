"""Keys of the API and the fleet in a local stack; `tests/flow/test_up.py` runs a whole stack."""

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from service.access import keys
from service.cli import serve
from service.local_stack import supervisor
from service.local_stack.home import Access


def test_a_fleet_gets_a_key_that_may_work_and_nothing_else(
    settings, database_url, tmp_path, monkeypatch
):
    monkeypatch.setenv("WARMSCALE_DATABASE_URL", "postgresql://secret")
    access = Access(url="http://127.0.0.1:1", key="ws_all")
    settings = settings.model_copy(update={"home": tmp_path})
    api, fleet = supervisor._make_children(settings, database_url, access, [])
    held = api.environment["WARMSCALE_API_KEY"], api.environment["WARMSCALE_FLEET_KEY"]
    assert fleet.environment["WARMSCALE_API_KEY"] == held[1]
    assert not {"ws_all", "postgresql://secret"} & set(fleet.environment.values())
    # Every start of the stack admits the same keys again.
    serve.admit_keys(database_url, *held)
    serve.admit_keys(database_url, *held)
    engine = create_engine(database_url)
    with Session(engine) as session:
        assert keys.find_caller(session, held[0]).scopes == {"admin"}
        assert keys.find_caller(session, held[1]).scopes == {"work"}
    engine.dispose()
