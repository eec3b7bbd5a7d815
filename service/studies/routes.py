"""`/v1/studies`: submit, read, pause, resume and cancel; trials, targets and events."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request

from service import event_stream
from service.access import lookup
from service.access.authentication import Reader, Writer
from service.optuna_bridge.sampler import Sampler
from service.protocol import IDEMPOTENCY_HEADER
from service.runs import store as runs
from service.specs.study import StudySpec
from service.studies import imported_base, store, submission, targets, trials
from service.studies.schemas import (
    EnqueueRequest,
    Importance,
    StudyPage,
    StudyView,
    TargetList,
    TargetRequest,
    TrialPage,
    TrialView,
)
from service.web.dependencies import DbSession, TheSettings
from service.web.json_body import JsonRoute
from service.web.openapi import may_answer
from service.web.services import find_service


async def _sampler(request: Request) -> Sampler:
    return find_service(request.app, Sampler)


TheSampler = Annotated[Sampler, Depends(_sampler)]
router = APIRouter(prefix="/studies", tags=["studies"], route_class=JsonRoute)
Key = Annotated[str | None, Header(alias=IDEMPOTENCY_HEADER, max_length=200)]


@router.post("", status_code=201)
def create_study(
    body: StudySpec,
    caller: Writer,
    session: DbSession,
    sampler: TheSampler,
    settings: TheSettings,
    key: Key = None,
) -> StudyView:
    """Create a study; every fault is reported now, not when its first run starts."""
    study = submission.submit_study(session, caller, body, settings.readable, key)
    # Optuna commits by itself. If our commit fails, the next submission finds its study.
    sampler.create_study(study.optuna_name)
    return store.view_study(session, study)


@router.get("")
def list_studies(
    caller: Reader,
    session: DbSession,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> StudyPage:
    """List studies, newest first."""
    return store.list_studies(session, caller, cursor, limit)


@router.get("/{study}")
def read_study(caller: Reader, session: DbSession, study: str) -> StudyView:
    """Read a study: state, counts by run state, best trial, progress, cost so far."""
    return store.view_study(session, lookup.find_study(session, caller, study))


@router.post("/{study}/pause")
def pause_study(caller: Writer, session: DbSession, study: str) -> StudyView:
    """Lease no further runs; runs that are leased go on to their end."""
    return store.view_study(
        session, store.change_state(session, lookup.find_study(session, caller, study), "paused")
    )


@router.post("/{study}/resume")
def resume_study(caller: Writer, session: DbSession, study: str) -> StudyView:
    """Lease runs again."""
    return store.view_study(
        session, store.change_state(session, lookup.find_study(session, caller, study), "active")
    )


@router.post("/{study}/cancel")
def cancel_study(caller: Writer, session: DbSession, study: str) -> StudyView:
    """End the study; the answer to its next report tells a running worker."""
    return store.view_study(
        session, store.change_state(session, lookup.find_study(session, caller, study), "cancelled")
    )


@router.get("/{study}/trials")
def list_trials(
    caller: Reader,
    session: DbSession,
    sampler: TheSampler,
    study: str,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 500,
) -> TrialPage:
    """List trials by number with parameters, value and state; enqueued trials are included."""
    return trials.list_trials(
        session, sampler, lookup.find_study(session, caller, study), cursor, limit
    )


@router.post("/{study}/trials", status_code=201)
def enqueue_trial(
    body: EnqueueRequest,
    caller: Writer,
    session: DbSession,
    sampler: TheSampler,
    study: str,
    key: Key = None,
) -> TrialView:
    """Enqueue the given parameters as the next trial."""
    return trials.enqueue_trial(
        session, sampler, lookup.find_study(session, caller, study), body.params, key
    )


@router.get(
    "/{study}/importance",
    responses=may_answer(409, "Too few trials have finished."),
)
def read_importance(
    caller: Reader, session: DbSession, sampler: TheSampler, study: str
) -> Importance:
    """Compute each parameter's share in the variance of the loss."""
    return trials.compute_importance(sampler, lookup.find_study(session, caller, study))


@router.post("/{study}/targets", status_code=201)
def start_targets(
    body: TargetRequest,
    caller: Writer,
    session: DbSession,
    settings: TheSettings,
    study: str,
    key: Key = None,
) -> TargetList:
    """Start targets by hand, from a trial, a checkpoint or an imported model."""
    found = lookup.find_study(session, caller, study)
    # An imported model is a path that the user names: check first that the caller may read it.
    if body.base is not None:
        imported_base.check_base_uri(session, caller, settings, body.base.uri)
    started = targets.start_targets(session, found, body, key)
    return TargetList(items=tuple(runs.view_run(run, found.name) for run in started))


@router.get(
    "/{study}/events",
    response_class=event_stream.EventSourceResponse,
    responses=event_stream.ANSWER,
)
async def stream_events(
    request: Request, caller: Reader, study: str, after: event_stream.LastEventId = None
) -> event_stream.EventSourceResponse:
    """Stream the study's transitions as Server-Sent Events; `Last-Event-ID` resumes."""
    return await event_stream.stream_events(
        request, caller, lambda session: event_stream.study_topic(session, caller, study), after
    )
