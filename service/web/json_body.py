"""JSON bodies, with a check that refuses an object with the same key twice.

Python's parser silently takes the last value, other parsers take the first. Two readers of the same
spec would train different models. docs/log.md records the time that the check takes.
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

_LONG_BYTES = 2**16  # about 5 ms to parse: on the event loop, all other requests would wait


class KeyTwiceError(HTTPException):
    """An object with the same key twice.

    An HTTPException, not a Problem: FastAPI turns other errors of reading a body into its own 400.
    """

    def __init__(self, key: str, values: list[Any]) -> None:
        super().__init__(HTTPStatus.UNPROCESSABLE_ENTITY)
        self.key, self.values = key, values


class JsonRoute(APIRoute):
    """FastAPI's route, but its body is parsed here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        answer = super().get_route_handler()

        async def answer_request(request: Request) -> Response:
            return await answer(_JsonRequest(request.scope, request.receive))

        return answer_request


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Return the parsed body. FastAPI calls this once, before it checks the API key."""
        body = await self.body()
        if len(body) < _LONG_BYTES:
            return _parse_body(body)
        return await run_in_threadpool(_parse_body, body)


def _parse_body(body: bytes) -> Any:
    return json.loads(body, object_pairs_hook=_make_object)


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # `dict` keeps the last value of a repeated key: fewer keys than pairs show a repetition.
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise KeyTwiceError(twice, [value for key, value in pairs if key == twice])
    return made
