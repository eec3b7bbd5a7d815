"""Probes for load balancers and Prometheus: `/healthz`, `/readyz`, `/metrics`."""

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
    """Answer 200 while the process runs, whether or not the database can be reached."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(session: DbSession) -> dict[str, str]:
    """Answer 200 if the database has this version's revisions, and 503 if it has not or is away."""
    mismatch = describe_mismatch(migrations.read_revisions(session.connection()))
    if mismatch is not None:
        raise Problem(503, "needs-upgrade", mismatch)
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(caller: Scraper, session: DbSession, request: Request) -> Response:
    """Return Prometheus metrics over all projects, for keys of the scope `metrics`."""
    assert caller
    engines = {
        "service": find_service(request.app, Database).engine,
        "optuna": find_service(request.app, Sampler).engine,
    }
    text = gauges.render_metrics(session, engines)
    return Response(text, media_type=gauges.CONTENT_TYPE)
