"""Probes: is the process up, and can it do its work."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.access.authentication import Scraper
from service.operations import gauges, migrations
from service.operations.revisions import describe_mismatch
from service.optuna_bridge.sampler import Sampler
from service.problems import Problem
from service.web.dependencies import DbSession
from service.web.services import Database, find_service

router = APIRouter(tags=["probes"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """200 while the process answers; it says nothing about the database."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(session: DbSession) -> dict[str, str]:
    """200 when the database is there, at this version's revisions; 503 when it is not."""
    wrong = describe_mismatch(migrations.read_revisions(session.connection()))
    if wrong is not None:
        raise Problem(503, "needs-upgrade", wrong)
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(caller: Scraper, session: DbSession, request: Request) -> Response:
    """Prometheus metrics, over all projects: hence a scope of its own."""
    assert caller
    engines = {
        "service": find_service(request.app, Database).engine,
        "optuna": find_service(request.app, Sampler).engine,
    }
    text = gauges.render_metrics(session, engines)
    return Response(text, media_type=gauges.CONTENT_TYPE)
