"""The HTTP request that carries a message to a webhook's URL."""

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
    """Encode a message as JSON: the bytes that are signed and sent."""
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
    """Send a message once; return None if the receiver answered 2xx, and the failure if not.

    The receiver may be hostile: redirects are not followed, its body is not read, and the text of
    the failure quotes nothing that it sent.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            status = await _post_body(
                http, url, secret, message_id, body, allow_private=allow_private
            )
    except ForbiddenURLError as error:
        return f"refused: {error}"
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except Exception as error:  # noqa: BLE001 - a user's URL must not end all deliveries
        return f"not reached: {type(error).__name__}"
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return None
    return f"answered {status}"


async def _post_body(
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
    # `Host` has the name of the URL: a server at that address may serve several names.
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": f"warmscale/{__version__}",
        **signing.sign_message(secret, message_id, int(time.time()), body),
    }
    # The request goes to the address that was checked; TLS verifies the name in the certificate.
    extensions = {"sni_hostname": parts.hostname}
    async with http.stream(
        "POST", target, content=body, headers=headers, extensions=extensions
    ) as response:
        return response.status_code


def make_client() -> httpx.AsyncClient:
    """Make the client for messages, without redirects, and without proxies of the environment."""
    # Connections are not reused: httpx pools them by address, and the next message may go to
    # another name at the same address.
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(
        follow_redirects=False, trust_env=False, timeout=TIMEOUT_SECONDS, limits=limits
    )
