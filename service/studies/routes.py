"""`/v1/studies`: submit, read, steer."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request

from service import event_stream
from service.access import lookup, paths
from service.access.authentication import Reader, Writer
from service.optuna_bridge.sampler import Sampler
from service.problems import bad_field
from service.protocol import IDEMPOTENCY_HEADER
from service.runs import store as runs
from service.specs.study import StudySpec
from service.studies import imported_base, store, targets, trials
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
from warmcore.corpus.inspection import inspect
from warmcore.specs.fields import FieldError


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
    """Create a study; everything that can be wrong with it is found here and not an hour later."""
    paths.check_data(body.data, settings.readable)
    study = store.create(session, caller, pin_to_corpus(body), key)
    sampler.create(study.optuna_name)
    return store.view(session, study)


def pin_to_corpus(spec: StudySpec) -> StudySpec:
    """Look at the corpus: it is there, long enough, and the one that the spec names if it does.

    Its hash goes into every run of the study, so that all are of the same text, and so does the
    tokenizer.json's; no hash for a corpus too large to read while a request waits.
    """
    data = spec.data
    try:
        found = inspect(data)
    except FieldError as error:
        raise bad_field(f"data.{error.path}", error.value, str(error)) from None
    except ValueError as error:
        raise bad_field("data.source", data.source, str(error)) from None
    if found.data_hash is not None and data.hash not in (None, found.data_hash):
        raise bad_field("data.hash", data.hash, f"the corpus has hash {found.data_hash}")
    try:
        return spec.with_data(found.pinned(data))
    except FieldError as error:
        raise bad_field(error.path, error.value, str(error)) from None


@router.get("")
def list_studies(
    caller: Reader,
    session: DbSession,
    cursor: str | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> StudyPage:
    """Studies, newest first."""
    return store.page(session, caller, cursor, limit)


@router.get("/{study}")
def read_study(caller: Reader, session: DbSession, study: str) -> StudyView:
    """One study: state, counts by run state, best trial, progress, cost so far."""
    return store.view(session, lookup.find_study(session, caller, study))


@router.post("/{study}/pause")
def pause_study(caller: Writer, session: DbSession, study: str) -> StudyView:
    """Lease nothing more; what runs goes on to its end."""
    return store.view(
        session, store.change_state(session, lookup.find_study(session, caller, study), "paused")
    )


@router.post("/{study}/resume")
def resume_study(caller: Writer, session: DbSession, study: str) -> StudyView:
    """Lease again."""
    return store.view(
        session, store.change_state(session, lookup.find_study(session, caller, study), "active")
    )


@router.post("/{study}/cancel")
def cancel_study(caller: Writer, session: DbSession, study: str) -> StudyView:
    """End the study; a running worker hears it at its next report."""
    return store.view(
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
    """Trials by number with parameters, value and state, enqueued ones included."""
    return trials.page(session, sampler, lookup.find_study(session, caller, study), cursor, limit)


@router.post("/{study}/trials", status_code=201)
def enqueue_trial(
    body: EnqueueRequest,
    caller: Writer,
    session: DbSession,
    sampler: TheSampler,
    study: str,
    key: Key = None,
) -> TrialView:
    """Try given parameters next."""
    return trials.enqueue(
        session, sampler, lookup.find_study(session, caller, study), body.params, key
    )


@router.get(
    "/{study}/importance",
    responses=may_answer(409, "Too few trials have finished."),
)
def read_importance(
    caller: Reader, session: DbSession, sampler: TheSampler, study: str
) -> Importance:
    """How much each parameter decides the loss."""
    return trials.importance(sampler, lookup.find_study(session, caller, study))


@router.post("/{study}/targets", status_code=201)
def start_targets(
    body: TargetRequest,
    caller: Writer,
    session: DbSession,
    settings: TheSettings,
    study: str,
    key: Key = None,
) -> TargetList:
    """Start a warmstart by hand, from a trial or a checkpoint."""
    found = lookup.find_study(session, caller, study)
    if body.base is not None:
        imported_base.check_base(session, caller, settings, body.base.uri)
    started = targets.start(session, found, body, key)
    return TargetList(items=tuple(runs.view(run, found.name) for run in started))


@router.get(
    "/{study}/events",
    response_class=event_stream.EventSourceResponse,
    responses=event_stream.ANSWER,
)
async def stream_events(
    request: Request, caller: Reader, study: str, after: event_stream.LastEventId = None
) -> event_stream.EventSourceResponse:
    """The study's transitions as Server-Sent Events; `Last-Event-ID` resumes."""
    return await event_stream.stream_events(
        request, caller, lambda session: event_stream.study_topic(session, caller, study), after
    )
