"""Middleware that limits the size and the time of bodies and adds security headers to answers.

Pure ASGI: it counts the bytes of a body as they pass, and keeps none.
"""

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import Settings

# The dashboard, the report and /docs set policies of their own, and those stay. Every other answer
# is data: a browser must load and run nothing from it.
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
    """A body that is too large or too slow.

    An HTTPException, not a Problem: FastAPI turns other errors of reading a body into its own 400.
    """


class ProtectionMiddleware:
    """The limits of every body, and the security headers of every answer."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def send_with_headers(message: Message) -> None:
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
            await self._app(scope, body.receive, send_with_headers)
        except BodyError as error:
            # FastAPI answers this error if a route reads the body. In other cases it arrives here:
            # answer it, unless another answer has begun, for that cannot be replaced.
            if has_begun:
                raise
            answer = PlainTextResponse(error.detail, error.status_code)
            await answer(scope, receive, send_with_headers)


class _Body:
    """The body of a request while it arrives."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive, self._max_bytes, self._seconds = receive, max_bytes, seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._num_bytes, self._is_whole, self._announced = 0, False, 0

    def check_announced(self, length: str | None) -> None:
        """Keep the announced length; `receive` refuses a body that is too long before it reads."""
        self._announced = int(length) if length and length.isdecimal() else 0

    async def receive(self) -> Message:
        """Return the next message of the client.

        Raises:
            BodyError: 413 for a body that is too large, 408 for a body that is too slow.
        """
        if self._is_whole:
            return await self._receive()
        self._check_size(self._announced)
        # The deadline is for the whole body. With a limit for each piece, a client that sends a
        # byte a second could hold a connection for days.
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not arrive within {self._seconds:g} s"
            raise BodyError(HTTPStatus.REQUEST_TIMEOUT, detail, {"Connection": "close"}) from None
        self._num_bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        self._check_size(self._num_bytes)
        return message

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            detail = f"a body has at most {self._max_bytes} bytes (WARMSCALE_MAX_BODY_BYTES)"
            raise BodyError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, {"Connection": "close"})
