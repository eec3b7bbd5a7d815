"""The FastAPI application: it makes the parts and connects them, nothing more."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.routing import APIRoute
from sqlalchemy.engine import URL
from sqlalchemy.orm import sessionmaker

from service import __version__, problems
from service.access.caller_cache import CallerCache
from service.access.rate_limits import RateLimits
from service.database.engine import autocommit_engine, make_engine, optuna_url
from service.event_stream import Streams
from service.events import audit_log
from service.events.wakeups import Wakeups
from service.leases.attempt_routes import router as attempts
from service.leases.presence import Presence
from service.leases.queue import LeaseQueue
from service.leases.routes import router as leases
from service.leases.services import LeaseServices
from service.operations import probes
from service.optuna_bridge import dashboard
from service.optuna_bridge.sampler import TRANSIENT, Sampler
from service.results.routes import router as results
from service.runs.routes import router as runs
from service.settings import Settings
from service.studies.routes import router as studies
from service.web import docs_page, error_handlers, openapi
from service.web.protection import ProtectionMiddleware
from service.web.request_log import RequestLogMiddleware
from service.web.services import Database, find_service, provide_services
from service.web.shutdown import Shutdown
from service.webhooks.outbox import Outbox

# FastAPI tries its routes in order, and matches a router in a router three times. The calls that
# workers make come first: they are almost all of the traffic.
_V1 = (leases, attempts, runs, studies, results)
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


def create_app(settings: Settings, url: URL) -> FastAPI:
    """Make the application on a database; its tables must be at this version's revision."""
    database = _connect(url, settings)
    sampler = Sampler(optuna_url(url), pool_size=settings.pool_size)
    wakeups = Wakeups(url)
    outbox = Outbox(database.sessions, allow_private=settings.webhook_allow_private)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with wakeups.keep_listening(), outbox.keep_delivering(wakeups):
            yield
        await find_service(app, LeaseQueue).close()
        sampler.close()
        database.engine.dispose()

    app = FastAPI(
        title="warmscale",
        version=__version__,
        summary="Tune small, grow, train the target, and tell whether growing paid.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from other hosts; ours is web/docs_page.py
        redoc_url=None,
        # Makes ProblemBody a component; web/openapi.py replaces `default` by the real statuses.
        responses={"default": {"model": error_handlers.ProblemBody}},
    )
    _provide(app, settings, database, sampler, wakeups)
    error_handlers.install_handlers(app, away=TRANSIENT)
    app.add_middleware(ProtectionMiddleware, settings=settings)
    app.add_middleware(RequestLogMiddleware)
    openapi.install_document(app)
    _add_routes(app)
    return app


def _connect(url: URL, settings: Settings) -> Database:
    engine = make_engine(url, settings.pool_size)
    sessions = sessionmaker(engine, expire_on_commit=False)
    audit_log.install_hooks(sessions)
    statements = sessionmaker(autocommit_engine(engine), expire_on_commit=False)
    return Database(engine=engine, sessions=sessions, statements=statements)


def _provide(
    app: FastAPI, settings: Settings, database: Database, sampler: Sampler, wakeups: Wakeups
) -> None:
    """Make the objects that live as long as the process, for `web.services.find_service`."""
    shutdown = Shutdown()
    lease_services = LeaseServices(
        sessions=database.sessions,
        statements=database.statements,
        sampler=sampler,
        settings=settings,
        presence=Presence(settings.lease_seconds),
    )
    provide_services(
        app,
        settings,
        database,
        sampler,
        wakeups,
        shutdown,
        lease_services,
        LeaseQueue(lease_services, wakeups, shutdown),
        CallerCache(),
        RateLimits(settings.requests_per_second),
        Streams(settings.max_event_streams),
    )


def _add_routes(app: FastAPI) -> None:
    for router in _V1:
        app.include_router(router, prefix="/v1")
    app.add_api_route("/v1/{path:path}", _refuse_call, methods=_METHODS, include_in_schema=False)
    app.include_router(probes.router)
    app.add_route("/docs", docs_page.serve_docs)
    # Last, because the dashboard serves paths at the root: it gets the requests that no route took.
    app.mount("/", dashboard.Dashboard(app))


def _refuse_call(path: str) -> None:
    """Answer an unknown path below /v1 with a problem; the dashboard would answer with a page."""
    allowed = sorted(_allowed_methods(f"/{path}"))
    if allowed:
        raise HTTPException(405, headers={"Allow": ", ".join(allowed)})
    raise problems.not_found("call", f"/v1/{path}")


def _allowed_methods(path: str) -> set[str]:
    """Return the methods of the routes that match a path below /v1."""
    routes = [route for router in _V1 for route in router.routes if isinstance(route, APIRoute)]
    return {method for r in routes if r.path_regex.match(path) for method in r.methods or ()}
