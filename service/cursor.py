"""Opaque cursors for lists that are read newest first: the key of a page's last row."""

import base64
from datetime import datetime

from service.errors import bad_field


def encode_cursor(created_at: datetime, row_id: str) -> str:
    """A cursor to the rows after this one."""
    return base64.urlsafe_b64encode(f"{created_at.isoformat()}\n{row_id}".encode()).decode()


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """The key of a cursor of ours.

    Raises:
        Problem: 422 for anything else.
    """
    try:
        created_at, row_id = base64.urlsafe_b64decode(cursor).decode().split("\n")
        return datetime.fromisoformat(created_at), row_id
    except ValueError:
        raise bad_field("cursor", cursor, "not a cursor of this list; leave it out") from None
