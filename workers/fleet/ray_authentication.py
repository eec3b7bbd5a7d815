"""The refusal of a Ray cluster that asks for a token, explained. Imports no Ray."""

import os

_REFUSED = ("AuthenticationError", "InvalidAuthToken")


class ClusterRefusedError(Exception):
    """A Ray cluster that takes no driver without its token."""


def is_refusal(error: BaseException) -> bool:
    """Return whether `ray.init` failed because of the token.

    Ray 2.60 raises a ConnectionError then; its cause has the real error only in its text.
    """
    found: BaseException | None = error
    while found is not None:
        if any(word in f"{type(found).__name__}: {found}" for word in _REFUSED):
            return True
        found = found.__cause__ or found.__context__
    return False


def explain_refusal(address: str) -> str:
    """Name the variables that a driver of this cluster needs, and the wrong one among them."""
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
