"""Log lines about runs, and the way from worker processes to the fleet's log."""

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
_OURS = ("time=", '{"time":')  # the beginnings of lines by `service.observability.logs`


def run_fields(lease: Lease) -> dict[str, Any]:
    """Return the fields of every log line about a run."""
    return {"study": lease.study_id, "run": lease.run_id, "attempt": lease.attempt}


@contextmanager
def log_run(lease: Lease) -> Generator[None]:
    """Add the fields of a run to every log line of this worker process, from every thread."""
    _configure_logs()
    with logs.add_fields(**run_fields(lease), pid=os.getpid()):
        yield


@functools.cache
def _configure_logs() -> None:
    logs.configure_logging(logs.read_format(os.environ))


def forward_lines(batch: Mapping[str, Any]) -> None:
    """Write lines that Ray collected from a worker process's standard error to the fleet's log.

    Our own lines already have their fields and are copied. Lines of libraries get the process id.
    """
    if not batch.get("is_err"):
        return
    for line in batch["lines"]:
        if line.startswith(_OURS):
            sys.stderr.write(f"{line}\n")
        elif line.strip():
            _log.info(line, extra={"pid": batch.get("pid"), "node": batch.get("ip")})
