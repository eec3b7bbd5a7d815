"""Probes: is the process up, and can it do its work."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from sqlalchemy import text

from service import metrics
from service.deps import DbSession

router = APIRouter(tags=["probes"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """200 while the process answers; it says nothing about the database."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(session: DbSession) -> dict[str, str]:
    """200 when the database answers and has our tables; 503 when it is away."""
    session.execute(text("SELECT count(*) FROM warmscale.studies WHERE false"))
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(session: DbSession) -> Response:
    """Prometheus metrics."""
    return Response(metrics.render(session), media_type=metrics.CONTENT_TYPE)
