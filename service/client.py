"""The typed HTTP client of workers, the CLI and users' own programs.

The client retries connection errors and 5xx answers with exponential backoff and full jitter until
`patience_seconds` have passed. It does that for reads, for writes under a lease, for writes with an
idempotency key, and where the caller allows a repetition. It sends any other write again only if
the first never reached the service, or was refused unread (408, 429). Before a retry it waits for
the time of `Retry-After`, at most 30 s. Leases in an answer that is lost expire.
"""

import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.protocol import (
    IDEMPOTENCY_HEADER,
    LEASE_TOKEN_HEADER,
    TRACE_HEADER,
    CheckpointReply,
    CheckpointReport,
    FinishReply,
    FinishRequest,
    Lease,
    LeaseReply,
    LeaseRequest,
    MeasurementBatch,
    ReportReply,
    traceparent,
)
from warmcore.storage import backoff

M = TypeVar("M", bound=BaseModel)

_BACKOFF = backoff.Backoff(first_seconds=0.1, max_seconds=5.0, jitter=True)
_RETRY_AFTER_MAX_SECONDS = 30.0
# With these answers the service has done nothing: even a write may be sent again.
UNREAD_STATUS = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
_RETRIED_STATUS = frozenset({500, 502, 503, 504})
# With these errors the request never reached the service.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class ServiceError(Exception):
    """The service answered with a problem (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.problem = problem
        super().__init__(self._format_message())

    @property
    def type(self) -> str:
        """The problem's stable type."""
        return str(self.problem.get("type", "about:blank"))

    def _format_message(self) -> str:
        lines = [f"{self.status} {self.problem.get('title', '')}: {self.problem.get('detail', '')}"]
        lines += [f"  {e.get('path')}: {e.get('message')}" for e in self.problem.get("errors", [])]
        return "\n".join(lines)


class BadAnswerError(Exception):
    """A success that this protocol does not have, of a proxy or another version for example."""


class StaleLeaseError(ServiceError):
    """Another attempt holds this run now: stop, and write nothing more."""


class _RetriedAnswerError(Exception):
    """An answer that leads to a retry, as an exception for `backoff.retry`."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        super().__init__(response.status_code)


class Client:
    """A connection to a service. Threads may share it."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        project: str | None = None,
        patience_seconds: float = 60.0,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.patience_seconds = patience_seconds
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"},
            params=_drop_missing({"project": project}),
            # Longer than a long-poll, which takes up to 60 s.
            timeout=httpx.Timeout(90.0, connect=5.0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        body: BaseModel | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        params: dict[str, Any] | None = None,
        retry: bool = True,
    ) -> httpx.Response:
        """Send a request; retry while the service is unreachable.

        Without `retry`, send it again only if it cannot have had an effect.

        Raises:
            StaleLeaseError: 409 for a write under a lease, because another attempt holds the run.
            ServiceError: any other answer that is not a success.
            httpx.TransportError: the service was unreachable for `patience_seconds`.
        """
        json = body.model_dump(mode="json") if isinstance(body, BaseModel) else body

        def send() -> httpx.Response:
            return self._http.request(method, path, json=json, headers=headers, params=params)

        response = self._send_patiently(send, retry=retry)
        if response.is_success:
            return response
        problem = _read_problem(response)
        stale = problem.get("type") == "urn:warmscale:stale-lease"
        raise (StaleLeaseError if stale else ServiceError)(response.status_code, problem)

    # Example: the service restarts for 3 s. The first attempt fails at 0 s, further attempts follow
    # after pauses of up to 0.1, 0.2, 0.4, 0.8, 1.6 and 3.2 s. The pauses are random, because the
    # clients that failed together must not come back together.
    def _send_patiently(self, send: Callable[[], httpx.Response], *, retry: bool) -> httpx.Response:
        deadline = time.monotonic() + self.patience_seconds

        def send_once() -> httpx.Response:
            response = send()
            if _is_refused_unread(response) or (retry and response.status_code in _RETRIED_STATUS):
                raise _RetriedAnswerError(response)
            return response

        def adjust_pause(error: Exception, pause: float) -> float:
            # The pause is added to the time of `Retry-After`. All clients were given the same time:
            # without the pause they would return together.
            seconds = _asked_seconds(error) + pause
            return max(0.0, min(seconds, deadline - time.monotonic()))

        try:
            return backoff.retry(
                send_once,
                _BACKOFF,
                on=(_RetriedAnswerError, httpx.TransportError),
                deadline=deadline,
                is_worth_retrying=lambda error: (
                    retry or isinstance(error, (_RetriedAnswerError, *_NEVER_SENT))
                ),
                adjust_pause=adjust_pause,
            )
        except _RetriedAnswerError as error:
            return error.response

    def get(self, path: str, **params: Any) -> Any:
        """GET `path` and return its JSON."""
        return _read_json(self.request("GET", path, params=_drop_missing(params)))

    def list_items(self, path: str, *, first: int | None = None, **params: Any) -> list[Any]:
        """Return the items of all pages of a list, or only the `first` items."""
        items: list[Any] = []
        cursor: str | None = None
        while first is None or len(items) < first:
            page = self.get(path, **params, cursor=cursor)
            items += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        return items[:first]

    def post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        retry: bool = False,
    ) -> Any:
        """POST `body` to `path` and return its JSON.

        Set `retry` for a call that may be repeated; an idempotency key sets it.
        """
        headers = {} if idempotency_key is None else {IDEMPOTENCY_HEADER: idempotency_key}
        retry = retry or idempotency_key is not None
        return _read_json(self.request("POST", path, body=body or {}, headers=headers, retry=retry))

    def lease(self, request: LeaseRequest) -> tuple[Lease, ...]:
        """Lease runs that fit; return none if no run fits within `wait_seconds`."""
        response = self.request("POST", "/v1/leases", body=request)
        return _read_reply(LeaseReply, response).leases

    def report(self, lease: Lease, batch: MeasurementBatch) -> ReportReply:
        """Add measurements and renew the lease."""
        return self._post_under_lease(lease, "measurements", batch, ReportReply)

    def publish(self, lease: Lease, checkpoint: CheckpointReport) -> CheckpointReply:
        """Publish a checkpoint; its files must be complete and in place."""
        return self._post_under_lease(lease, "checkpoints", checkpoint, CheckpointReply)

    def finish(self, lease: Lease, finish: FinishRequest) -> FinishReply:
        """End this attempt. Sending the same end twice changes nothing."""
        return self._post_under_lease(lease, "finish", finish, FinishReply)

    def _post_under_lease(self, lease: Lease, call: str, body: BaseModel, reply: type[M]) -> M:
        headers = {
            LEASE_TOKEN_HEADER: lease.lease_token,
            TRACE_HEADER: traceparent(lease.run_id),
        }
        response = self.request(
            "POST", f"/v1/runs/{lease.run_id}/{call}", body=body, headers=headers
        )
        return _read_reply(reply, response)


def _is_refused_unread(response: httpx.Response) -> bool:
    """Return whether the service refused a request before acting on it."""
    return response.status_code in UNREAD_STATUS


def _asked_seconds(error: Exception) -> float:
    """Return the seconds that an answer asks the client to wait; 0 if no answer came."""
    return _retry_after_seconds(error.response) if isinstance(error, _RetriedAnswerError) else 0.0


def _retry_after_seconds(response: httpx.Response) -> float:
    """Return the seconds of `Retry-After`, at most 30; 0 without the header, or for a date."""
    given = response.headers.get("Retry-After", "")
    return min(float(given), _RETRY_AFTER_MAX_SECONDS) if given.isdecimal() else 0.0


def _read_reply(reply: type[M], response: httpx.Response) -> M:
    try:
        return reply.model_validate_json(response.content)
    except ValidationError as error:
        text = f"{_quote_start(response)} is not a {reply.__name__}: {error}"
        raise BadAnswerError(text) from error


def _read_json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise BadAnswerError(f"{_quote_start(response)} is not JSON: {error}") from error


def _quote_start(response: httpx.Response) -> str:
    return f"the answer {response.text[:100]!r} of {response.url}"


def _drop_missing(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _read_problem(response: httpx.Response) -> dict[str, Any]:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"title": response.reason_phrase, "detail": response.text[:500]}
