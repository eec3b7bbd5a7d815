"""Signatures as Standard Webhooks has them (https://www.standardwebhooks.com); pure.

v1,base64(HMAC-SHA256(secret, "{id}.{timestamp}.{body}")), the secret being what stands in base64
after `whsec_`. The receiver checks the signature, that the timestamp is a few minutes old at most,
and drops an id that it has seen.
"""

import base64
import hashlib
import hmac
import secrets

PREFIX = "whsec_"


def create_secret() -> str:
    """A secret of 32 random bytes."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def sign_message(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a message that is sent at this time."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
