"""Log lines as key=value or JSON, for people and machines. Standard library only.

The service, the fleet and the processes of runs use this. A line has the fields of its request or
process, then those of `extra=`. Each line of a traceback is a log line with the same fields: a
search for a run's id finds the whole traceback.
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

# The attributes that every log record has; all others came from `extra=`.
_OWN = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
)
_BARE = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Our own lines hold no secret. Errors of other libraries may quote a key, a webhook's secret or the
# password of a URL: `postgresql://user:secret@host` becomes `postgresql://[redacted]@host`.
_SECRET = re.compile(r"\b(?:ws|whsec)_[A-Za-z0-9+/=_-]{20,}|(?<=://)[^\s/@]+(?=@)")
_process: dict[str, Any] = {}


def read_format(environment: Mapping[str, str]) -> LogFormat:
    """Return the format that `WARMSCALE_LOG_FORMAT` names, `text` if it is unset.

    Raises:
        ValueError: the variable names another format.
    """
    given = environment.get(FORMAT_VARIABLE, "text")
    if given not in get_args(LogFormat):
        raise ValueError(
            f"{FORMAT_VARIABLE} is one of {', '.join(get_args(LogFormat))}, not {given!r}"
        )
    return cast("LogFormat", given)


def configure_logging(form: LogFormat, stream: TextIO | None = None) -> None:
    """Make every logger of this process write lines of this form to `stream` (standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs every call


@contextmanager
def add_fields(**fields: Any) -> Generator[None]:
    """Add these fields to the lines of all threads of this process while the block runs."""
    # A copy, because blocks can be nested.
    before = dict(_process)
    _process.update(fields)
    try:
        yield
    finally:
        _process.clear()
        _process.update(before)


class LineFormatter(logging.Formatter):
    """A formatter that writes a line for a record, and another for each line of its traceback."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self._format_line = _format_json if form == "json" else _format_text

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of the record."""
        facts = request_context.current_facts()
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": at.replace("+00:00", "Z"), "level": record.levelname, "logger": record.name}
        given = {name: value for name, value in vars(record).items() if name not in _OWN}
        fields = _process | (facts.fields() if facts else {}) | given
        lines = [head | {"message": record.getMessage()} | fields]
        lines += [head | {"trace": line} | fields for line in self._list_traceback(record)]
        return "\n".join(_SECRET.sub("[redacted]", self._format_line(line)) for line in lines)

    def _list_traceback(self, record: logging.LogRecord) -> list[str]:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        stack = self.formatStack(record.stack_info) if record.stack_info else ""
        return [line for text in (trace, stack) for line in text.splitlines() if line.strip()]


def _format_json(fields: Mapping[str, Any]) -> str:
    given = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(given, default=str)


def _format_text(fields: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={_quote_if_needed(value)}" for name, value in fields.items() if value is not None
    )


def _quote_if_needed(value: object) -> str:
    """Return the text of a plain value, and any other as a JSON string.

    Without quotes, a worker named "a level=ERROR" or one with a line break could forge log fields.
    """
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)
