"""Signatures by the Standard Webhooks specification (https://www.standardwebhooks.com); pure.

A signature is `v1,` + base64(HMAC-SHA256(secret, "{id}.{timestamp}.{body}")). The secret's text is
`whsec_` and the base64 of its bytes. The receiver checks the signature, refuses a timestamp older
than a few minutes, and drops an id that it has received before.
"""

import base64
import hashlib
import hmac
import secrets

PREFIX = "whsec_"


def create_secret() -> str:
    """Create a secret of 32 random bytes."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def sign_message(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers of a message that is sent at `timestamp`, in seconds since 1970."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
