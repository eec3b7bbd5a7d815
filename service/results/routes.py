"""`/v1/studies/{study}/results` and `/report`."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, StreamingResponse

from service.auth import Reader
from service.bodies import Route
from service.deps import DbSession
from service.results import report, store
from service.results.schemas import StudyResults
from service.shield import NO_FRAMES
from service.studies.specs import parsed
from service.studies.store import find

router = APIRouter(prefix="/studies", tags=["results"], route_class=Route)


@router.get("/{study}/results")
def read_results(caller: Reader, session: DbSession, study: str) -> StudyResults:
    """Best trial, target runs, costs, and the verdict or what it waits for."""
    return store.results(session, find(session, caller, study))


@router.get("/{study}/report", response_class=HTMLResponse)
def read_report(caller: Reader, session: DbSession, study: str) -> StreamingResponse:
    """The same as one self-contained page with plots."""
    found = find(session, caller, study)
    spec, trials = parsed(found.spec), store.report_trials(session, found.id)
    page = report.page(store.results(session, found), trials, spec)
    headers = {"Content-Security-Policy": NO_FRAMES}  # the rest stands in the page
    return StreamingResponse(page, media_type="text/html; charset=utf-8", headers=headers)
