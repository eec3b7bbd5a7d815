"""What the fleet and its worker processes say in the log, and how theirs reaches the fleet's."""

import functools
import logging
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from service.observability import logs
from service.protocol import Lease

_log = logging.getLogger("workers.ray")
_OURS = ("time=", '{"time":')  # how `service.observability.logs` begins a line


def subject(lease: Lease) -> dict[str, Any]:
    """The fields that every line about a run has."""
    return {"study": lease.study_id, "run": lease.run_id, "attempt": lease.attempt}


@contextmanager
def about(lease: Lease) -> Generator[None]:
    """In a worker process, which has one run at a time: its lines say which, in every thread."""
    _configure()
    with logs.add_fields(**subject(lease), pid=os.getpid()):
        yield


@functools.cache
def _configure() -> None:
    logs.configure_logging(logs.read_format(os.environ))


def forward(batch: Mapping[str, Any]) -> None:
    """Put lines that Ray brought from a worker process's error stream into the fleet's log.

    Ours come as they are, with their run; of others' at least the process is known.
    """
    if not batch.get("is_err"):
        return
    for line in batch["lines"]:
        if line.startswith(_OURS):
            sys.stderr.write(f"{line}\n")
        elif line.strip():
            _log.info(line, extra={"pid": batch.get("pid"), "node": batch.get("ip")})
