"""Which tasks have begun, by what they say themselves in Ray's key-value store.

Two fleets of one Ray may both be given work for the same free CPU; the second run then waits in
Ray's queue, where nobody renews its lease. Its fleet gives it back in time, for which it must tell
a run that waits from one that trains: without its dashboard Ray does not.
"""

import contextlib
from collections.abc import Generator
from typing import Any

from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

_NAMESPACE = b"warmscale"


@contextlib.contextmanager
def mark_begun(mark: str | None) -> Generator[None]:
    """Say that the task of this mark has begun, for as long as it lasts."""
    if mark is None:
        yield
        return
    store = _connect_kv()
    # Unsaid, the run is given back with a checkpoint: no reason for it to fail.
    with contextlib.suppress(RayError):
        store.internal_kv_put(mark.encode(), b"begun", True, _NAMESPACE)
    try:
        yield
    finally:
        with contextlib.suppress(RayError):
            store.internal_kv_del(mark.encode(), False, _NAMESPACE)


def has_begun(mark: str) -> bool:
    """Whether the task of this mark has begun and not ended."""
    return bool(_connect_kv().internal_kv_exists(mark.encode(), _NAMESPACE))


def _connect_kv() -> Any:
    return internal_kv_get_gcs_client()
