"""Requests of the fleet to the service, each on a thread of its own, with a callback.

The threads are daemons: a service that never answers must not keep a fleet from exiting.
"""

import logging
import threading
from collections.abc import Callable
from http import HTTPStatus

from service.client import UNREAD_STATUS, Client, ServiceError, StaleLeaseError
from service.protocol import FinishRequest, Lease, LeaseRequest
from workers.run_logs import run_fields

log = logging.getLogger(__name__)

_FINISH_PATIENCE_SECONDS = 30.0


class FleetRefusedError(Exception):
    """The service does not accept the key, the study or the protocol of this fleet."""


class ServiceLink:
    """Requests for leases, and finishes of attempts whose own process could not send them."""

    def __init__(self, url: str, api_key: str) -> None:
        # Without patience: after a failure the dispatcher pauses and repeats the request itself.
        self._lease_client = Client(url, api_key, patience_seconds=0.0)
        self._finish_client = Client(url, api_key, patience_seconds=_FINISH_PATIENCE_SECONDS)
        self._finishing: list[threading.Thread] = []
        self._is_away = False

    def request_leases(
        self, request: LeaseRequest, answered: Callable[[tuple[Lease, ...] | Exception], None]
    ) -> None:
        """Call `answered` from another thread, once, with leases or with an exception."""
        threading.Thread(
            target=lambda: answered(self._lease_or_error(request)), daemon=True
        ).start()

    def _lease_or_error(self, request: LeaseRequest) -> tuple[Lease, ...] | Exception:
        try:
            leases = self._lease_client.lease(request)
        except Exception as error:  # noqa: BLE001 - without an answer the fleet would never ask again
            if isinstance(error, ServiceError) and _is_refusal(error.status):
                return FleetRefusedError(str(error))
            if not self._is_away:
                log.warning("service away", extra={"error": repr(error)})
            self._is_away = True
            return error
        if self._is_away:
            log.info("service back")
        self._is_away = False
        return leases

    def finish_attempt(self, lease: Lease, finish: FinishRequest) -> None:
        """Finish an attempt in the background."""
        thread = threading.Thread(target=self._finish_or_log, args=(lease, finish), daemon=True)
        self._finishing = [other for other in self._finishing if other.is_alive()] + [thread]
        thread.start()

    def _finish_or_log(self, lease: Lease, finish: FinishRequest) -> None:
        try:
            self._finish_client.finish(lease, finish)
        except StaleLeaseError:
            pass  # already reported, or another attempt holds the run by now
        except Exception as error:  # noqa: BLE001 - a thread's end
            log.warning(
                "finish not sent", extra=run_fields(lease) | {"error": repr(error)}
            )  # its lease will expire

    def close(self) -> None:
        """Wait until every finish was sent or given up, and close the connections."""
        for thread in self._finishing:
            thread.join()
        self._lease_client.close()
        self._finish_client.close()


def _is_refusal(status: int) -> bool:
    is_client_error = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    return is_client_error and status not in UNREAD_STATUS
