"""Explanations for a Ray cluster that refuses a driver without its token. Imports no Ray."""

import os

_REFUSED = ("AuthenticationError", "InvalidAuthToken")


class ClusterRefusedError(Exception):
    """A Ray cluster refused this driver, because the token is missing or wrong."""


def is_refusal(error: BaseException) -> bool:
    """Return whether `ray.init` failed because of the token.

    Ray 2.60 raises a ConnectionError, and names the real error only in the text of the cause.
    """
    cause: BaseException | None = error
    while cause is not None:
        if any(word in f"{type(cause).__name__}: {cause}" for word in _REFUSED):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def explain_refusal(address: str) -> str:
    """Return a message with the variables that a driver needs, and the wrong variable."""
    mode = os.environ.get("RAY_AUTH_MODE")
    has_token = bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys())
    if mode != "token":
        wrong = f"RAY_AUTH_MODE is {mode or 'not set'}"
    elif has_token:
        wrong = "the token that is set is not the cluster's"
    else:
        wrong = "no token is set"
    return (
        f"the Ray cluster at {address} asks for a token, and {wrong}. Set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file with it"
    )
