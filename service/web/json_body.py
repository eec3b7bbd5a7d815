"""JSON bodies: a key that is given twice is refused.

Python's parser silently takes the last, and other parsers the first: two readers of one spec would
train two things. What it costs is in docs/log.md.
"""

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

_LONG = 2**16  # bytes, about 5 ms: everybody else would wait for it


class KeyTwiceError(HTTPException):
    """An object with one key twice: FastAPI lets this through, as it would not a Problem."""

    def __init__(self, key: str, values: list[Any]) -> None:
        super().__init__(HTTPStatus.UNPROCESSABLE_ENTITY)
        self.key, self.values = key, values


class JsonRoute(APIRoute):
    """FastAPI's route, but for how its body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        answer = super().get_route_handler()

        async def answer_plain(request: Request) -> Response:
            return await answer(_PlainRequest(request.scope, request.receive))

        return answer_plain


class _PlainRequest(Request):
    async def json(self) -> Any:
        """The body. FastAPI asks once, before it looks at the key."""
        body = await self.body()
        return _parsed(body) if len(body) < _LONG else await run_in_threadpool(_parsed, body)


def _parsed(body: bytes) -> Any:
    return json.loads(body, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise KeyTwiceError(twice, [value for key, value in pairs if key == twice])
    return found
