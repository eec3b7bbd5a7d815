"""Log lines for machines that people can read: key=value, or JSON. Standard library only.

Used by the service, the fleet and the processes that runs are in. A line's fields are what the
request or the process is about, then what `extra=` gave. A trace is told line by line, each with
the fields, so that whoever greps for a run finds all of it.
"""

import json
import logging
import re
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, cast, get_args

from service.observability import request_context

LogFormat = Literal["text", "json"]
FORMAT_VARIABLE = "WARMSCALE_LOG_FORMAT"

_OWN = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
)
_BARE = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# No line of ours holds a secret; what other code says in an error is not ours to promise.
_SECRET = re.compile(r"\b(?:ws|whsec)_[A-Za-z0-9+/=_-]{20,}|(?<=://)[^\s/@]+(?=@)")
_process: dict[str, Any] = {}


def read_format(environment: Mapping[str, str]) -> LogFormat:
    """The format that the environment asks for.

    Raises:
        ValueError: there is no such format.
    """
    given = environment.get(FORMAT_VARIABLE, "text")
    if given not in get_args(LogFormat):
        raise ValueError(
            f"{FORMAT_VARIABLE} is one of {', '.join(get_args(LogFormat))}, not {given!r}"
        )
    return cast("LogFormat", given)


def configure_logging(form: LogFormat, stream: TextIO | None = None) -> None:
    """Have every logger of this process write lines of this form to `stream` (standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every call


@contextmanager
def add_fields(**fields: Any) -> Generator[None]:
    """Put these fields on every line of this process, whatever its thread, while inside."""
    before = dict(_process)
    _process.update(fields)
    try:
        yield
    finally:
        _process.clear()
        _process.update(before)


class LineFormatter(logging.Formatter):
    """One line for a record, and one for each line of its trace."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self._spell = _json if form == "json" else _text

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines."""
        facts = request_context.current_facts()
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": at.replace("+00:00", "Z"), "level": record.levelname, "logger": record.name}
        given = {name: value for name, value in vars(record).items() if name not in _OWN}
        fields = _process | (facts.fields() if facts else {}) | given
        lines = [head | {"message": record.getMessage()} | fields]
        lines += [head | {"trace": line} | fields for line in self._trace(record)]
        return "\n".join(_SECRET.sub("[redacted]", self._spell(line)) for line in lines)

    def _trace(self, record: logging.LogRecord) -> list[str]:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        stack = self.formatStack(record.stack_info) if record.stack_info else ""
        return [line for text in (trace, stack) for line in text.splitlines() if line.strip()]


def _json(fields: Mapping[str, Any]) -> str:
    given = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(given, default=str)


def _text(fields: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={_spelled(value)}" for name, value in fields.items() if value is not None
    )


def _spelled(value: object) -> str:
    """As it is if it can only be read one way, else as a JSON string: nobody may forge a line."""
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)
