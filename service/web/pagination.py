"""Opaque cursors for lists in pages: a cursor encodes the sort key of a page's last row."""

import base64
from datetime import datetime

from service.problems import Problem, bad_field

_GREATEST = 2**53  # as `Count` in protocol.py: JSON numbers are exact up to here


# Base64 of "2026-01-05T10:00:00+00:00\nst_1f0c" or of "after 17". Clients must not depend on the
# text: the service may change it.


def encode_cursor(created_at: datetime, row_id: str) -> str:
    """Return the cursor to the rows after this row."""
    return base64.urlsafe_b64encode(f"{created_at.isoformat()}\n{row_id}".encode()).decode()


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """Return the sort key that `encode_cursor` encoded.

    Raises:
        Problem: 422 for any other text.
    """
    try:
        created_at, row_id = base64.urlsafe_b64decode(cursor).decode().split("\n")
        return datetime.fromisoformat(created_at), row_id
    except ValueError:
        raise _bad_cursor(cursor) from None


def encode_number(number: int) -> str:
    """Return the cursor to the rows with a greater number."""
    return base64.urlsafe_b64encode(f"after {number}".encode()).decode()


def decode_number(cursor: str) -> int:
    """Return the number that `encode_number` encoded.

    Raises:
        Problem: 422 for any other text.
    """
    try:
        word, number = base64.urlsafe_b64decode(cursor).decode().split(" ")
        after = int(number)
    except ValueError:
        raise _bad_cursor(cursor) from None
    if word != "after" or not 0 <= after <= _GREATEST:
        raise _bad_cursor(cursor)
    return after


def _bad_cursor(cursor: str) -> Problem:
    return bad_field("cursor", cursor, "not a cursor of this list; leave it out")
