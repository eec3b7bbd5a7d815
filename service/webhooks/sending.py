"""One message to one URL."""

import asyncio
import json
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from service import __version__
from service.webhooks import signing
from service.webhooks.addresses import ForbiddenURLError, parse_url, resolve_address

TIMEOUT_SECONDS = 10.0


def encode_body(body: Mapping[str, Any]) -> bytes:
    """The bytes that are signed and sent."""
    return json.dumps(body, separators=(",", ":")).encode()


async def send_message(
    http: httpx.AsyncClient,
    url: str,
    *,
    secret: str,
    message_id: str,
    body: bytes,
    allow_private: bool,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> str | None:
    """Send it once; None when it was taken (2xx), else why not, in words that quote nobody.

    Redirects are not followed and the answer is not read: what answers may be hostile.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            status = await _post(http, url, secret, message_id, body, allow_private=allow_private)
    except ForbiddenURLError as error:
        return f"refused: {error}"
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except Exception as error:  # noqa: BLE001 - one URL of a user's must not end all deliveries
        return f"not reached: {type(error).__name__}"
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return None
    return f"answered {status}"


async def _post(
    http: httpx.AsyncClient,
    url: str,
    secret: str,
    message_id: str,
    body: bytes,
    *,
    allow_private: bool,
) -> int:
    parts = parse_url(url)
    address, port = await resolve_address(parts, allow_private=allow_private)
    host = address if ":" not in address else f"[{address}]"
    target = parts._replace(netloc=f"{host}:{port}", fragment="").geturl()
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": f"warmscale/{__version__}",
        **signing.sign_message(secret, message_id, int(time.time()), body),
    }
    # The address was checked, the certificate is the name's.
    named = {"sni_hostname": parts.hostname}
    async with http.stream(
        "POST", target, content=body, headers=headers, extensions=named
    ) as response:
        return response.status_code


def make_client() -> httpx.AsyncClient:
    """The client that messages are sent with: no proxy, redirect or cookie of the environment's."""
    limits = httpx.Limits(max_keepalive_connections=0)  # a connection is to an address, not a name
    return httpx.AsyncClient(
        follow_redirects=False, trust_env=False, timeout=TIMEOUT_SECONDS, limits=limits
    )
