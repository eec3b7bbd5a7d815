"""The HTML document around a page's parts: style, scripts and figures are inside, no network."""

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import chain
from string import Template

from service.results.report.plotting import Figure

_PIECE_BYTES = 2**18


def render_document(title: str, body: Sequence[str], figures: dict[str, Figure]) -> Iterator[bytes]:
    """Return a document with these parts, and with each figure in the element of its id.

    The document comes in pieces: Plotly's 5 MB go from disk to socket and are never held in memory.
    """
    before, after = _read_asset("page.html").split("$plotly")
    head = Template(before).substitute(
        title=f"{escape(title)} · warmscale",
        scripts=_hash_scripts(),
        style=_read_asset("page.css"),
        body="\n".join(body),
        figures=_embed_figures(figures),
    )
    tail = Template(after).substitute(script=_read_asset("page.js"))
    return chain([head.encode()], _read_plotly(), [tail.encode()])


@functools.cache
def _hash_scripts() -> str:
    """Return the hashes of the page's two scripts for its Content-Security-Policy."""
    # The browser runs a script only if its hash is listed. A study named "<script>..." runs nothing
    # even if a part of the page forgot to escape the name.
    plotly = hashlib.sha256()
    for piece in _read_plotly():
        plotly.update(piece)
    digests = (plotly.digest(), hashlib.sha256(_read_asset("page.js").encode()).digest())
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _read_plotly() -> Iterator[bytes]:
    with files("plotly").joinpath("package_data", "plotly.min.js").open("rb") as script:
        while piece := script.read(_PIECE_BYTES):
            yield piece


def _read_asset(name: str) -> str:
    return files("service.results.report").joinpath("assets", name).read_text(encoding="utf-8")


def _embed_figures(figures: dict[str, Figure]) -> str:
    """Return the figures as JSON that cannot end the script element around it."""
    # HTML ends a script at the first "</script>", also inside a JSON string.
    return json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
