"""Around the application: bodies that are too large or too slow, headers that browsers heed.

Pure ASGI; a body is counted as it streams through and never gathered here.
"""

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import Settings

# What has a policy of its own (the dashboard, the report, /docs) keeps it; all else is data.
NO_FRAMES = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"default-src 'none'; {NO_FRAMES}",
}


class BodyError(HTTPException):
    """A body that is not taken: FastAPI lets this through, as it would not a Problem."""


class ProtectionMiddleware:
    """Limits every body, and adds the headers to every answer."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        body = _Body(receive, self._settings.max_body_bytes, self._settings.body_seconds)
        try:
            body.check_announced(Headers(scope=scope).get("Content-Length"))
            await self._app(scope, body.receive, sending)
        except BodyError as error:  # nothing further in has answered it
            if has_begun:
                raise
            await PlainTextResponse(error.detail, error.status_code)(scope, receive, sending)


class _Body:
    """One request's body on its way in."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive, self._max_bytes, self._seconds = receive, max_bytes, seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._num_bytes, self._is_whole, self._announced = 0, False, 0

    def check_announced(self, length: str | None) -> None:
        """Note what the client says it will send; `receive` refuses it before a byte is read."""
        self._announced = int(length) if length and length.isdecimal() else 0

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            BodyError: 413 or 408.
        """
        if self._is_whole:
            return await self._receive()
        self._check(self._announced)
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not arrive within {self._seconds:g} s"
            raise BodyError(HTTPStatus.REQUEST_TIMEOUT, detail, {"Connection": "close"}) from None
        self._num_bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        self._check(self._num_bytes)
        return message

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            detail = f"a body has at most {self._max_bytes} bytes (WARMSCALE_MAX_BODY_BYTES)"
            raise BodyError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, {"Connection": "close"})
