"""Probes: is the process up, and can it do its work."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from service import metrics
from service.auth import Scraper
from service.deps import DbSession
from service.errors import Problem

router = APIRouter(tags=["probes"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """200 while the process answers; it says nothing about the database."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(session: DbSession) -> dict[str, str]:
    """200 when the database answers and has our tables; 503 when it is away."""
    try:
        session.execute(text("SELECT FROM warmscale.studies LIMIT 0"))
    except ProgrammingError:
        raise Problem(503, "no-tables", "run `warmscale db upgrade`") from None
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(caller: Scraper, session: DbSession) -> Response:
    """Prometheus metrics, over all projects: hence a scope of its own."""
    assert caller
    return Response(metrics.render(session), media_type=metrics.CONTENT_TYPE)
