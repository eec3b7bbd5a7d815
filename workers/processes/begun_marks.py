"""Marks of tasks that have begun, in Ray's key-value store.

Two fleets of a shared Ray may both get a run for the same free CPU. The second run then waits in
Ray's queue, where no process renews the lease. Before the lease expires, the fleet gives the run
back. For that the fleet must distinguish a waiting task from a running task, and Ray answers that
question only with a dashboard.
"""

import contextlib
from collections.abc import Generator
from typing import Any

from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

_NAMESPACE = b"warmscale"


@contextlib.contextmanager
def mark_begun(mark: str | None) -> Generator[None]:
    """Set `mark` in Ray's store until the context ends; without a mark, do nothing."""
    if mark is None:
        yield
        return
    store = _connect_kv()
    # Without the mark the fleet gives the run back, with a checkpoint. That must not fail the run.
    with contextlib.suppress(RayError):
        store.internal_kv_put(mark.encode(), b"begun", True, _NAMESPACE)
    try:
        yield
    finally:
        with contextlib.suppress(RayError):
            store.internal_kv_del(mark.encode(), False, _NAMESPACE)


def has_begun(mark: str) -> bool:
    """Return whether the task of this mark has begun and not ended."""
    return bool(_connect_kv().internal_kv_exists(mark.encode(), _NAMESPACE))


def _connect_kv() -> Any:
    return internal_kv_get_gcs_client()
