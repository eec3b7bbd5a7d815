"""Opaque cursors for lists that are read in pages: the key of a page's last row."""

import base64
from datetime import datetime

from service.problems import Problem, bad_field

_GREATEST = 2**53  # as in the messages


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
        raise _foreign(cursor) from None


def encode_number(number: int) -> str:
    """A cursor to what has a greater number."""
    return base64.urlsafe_b64encode(f"after {number}".encode()).decode()


def decode_number(cursor: str) -> int:
    """The number of a cursor of ours.

    Raises:
        Problem: 422 for anything else.
    """
    try:
        word, number = base64.urlsafe_b64decode(cursor).decode().split(" ")
        after = int(number)
    except ValueError:
        raise _foreign(cursor) from None
    if word != "after" or not 0 <= after <= _GREATEST:
        raise _foreign(cursor)
    return after


def _foreign(cursor: str) -> Problem:
    return bad_field("cursor", cursor, "not a cursor of this list; leave it out")
