"""Middleware that gives every request an id, measures its time and writes its log line.

Pure ASGI: Starlette's BaseHTTPMiddleware puts a task and a queue between a response and its client,
which is slow, and hides client disconnects from streaming responses.
"""

import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability import metrics, request_context, tracing
from service.protocol import REQUEST_ID_HEADER, TRACE_HEADER

_log = logging.getLogger("service.access")
_NO_ANSWER = 499  # nginx's code for a client that disconnected before the answer


class RequestLogMiddleware:
    """The id, the time and the log line of each request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = request_context.begin_request(scope, Headers(scope=scope).get(REQUEST_ID_HEADER))
        header = (REQUEST_ID_HEADER.lower().encode(), facts.request_id.encode())
        start, status = time.perf_counter(), _NO_ANSWER

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
                seconds = time.perf_counter() - start
                metrics.observe_request(scope["method"], find_route(scope), status, seconds)
            await send(message)

        try:
            within = Headers(scope=scope).get(TRACE_HEADER)
            with tracing.span(scope["method"], within=within, request=facts.request_id) as span:
                await self._app(scope, receive, send_with_id)
                if span is not None:
                    span.update_name(f"{scope['method']} {find_route(scope)}")
                    span.set_attribute("http.response.status_code", status)
        except Exception:
            # Starlette's outermost handler answers this with a 500, out of sight of `send_with_id`.
            if status == _NO_ANSWER:
                status = 500
                metrics.observe_request(
                    scope["method"], find_route(scope), status, time.perf_counter() - start
                )
            raise
        finally:
            _write_line(scope, status, time.perf_counter() - start)


def find_route(scope: Scope) -> str:
    """Return the path's template, `/v1/runs/{run_id}` for example, or `other` without a route."""
    # A route of an included router knows only its path below that router; FastAPI has it whole.
    included: Any = scope.get("fastapi", {}).get("effective_route_context")
    return getattr(included or scope.get("route"), "path", None) or "other"


def _write_line(scope: Scope, status: int, seconds: float) -> None:
    if _log.isEnabledFor(logging.INFO):
        fields = {
            "method": scope["method"],
            "route": find_route(scope),
            "status": status,
            "milliseconds": round(1000 * seconds, 2),
        }
        _log.info("request", extra=fields)
