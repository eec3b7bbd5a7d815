"""`/v1/studies/{study}/results` and `/report`."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, StreamingResponse

from service.access.authentication import Reader
from service.access.lookup import find_study
from service.results import store
from service.results.report import page as report
from service.results.schemas import StudyResults
from service.specs.stored import parse_stored
from service.web.dependencies import DbSession
from service.web.json_body import JsonRoute
from service.web.protection import NO_FRAMES

router = APIRouter(prefix="/studies", tags=["results"], route_class=JsonRoute)


@router.get("/{study}/results")
def read_results(caller: Reader, session: DbSession, study: str) -> StudyResults:
    """Return best trial, target runs, costs, and the verdict or the reason why it is pending."""
    return store.load_results(session, find_study(session, caller, study))


@router.get("/{study}/report", response_class=HTMLResponse)
def read_report(caller: Reader, session: DbSession, study: str) -> StreamingResponse:
    """Return the results as one self-contained HTML page with plots."""
    found = find_study(session, caller, study)
    spec, trials = parse_stored(found.spec), store.load_report_trials(session, found.id)
    page = report.render_report(store.load_results(session, found), trials, spec)
    # The page itself holds the rest of its policy: it works from a disk too.
    headers = {"Content-Security-Policy": NO_FRAMES}
    return StreamingResponse(page, media_type="text/html; charset=utf-8", headers=headers)
