"""`/docs`: the OpenAPI document as one page that loads nothing and runs nothing."""

import base64
import hashlib
import json
from collections.abc import Iterator
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse

from service.web.protection import NO_FRAMES

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "h2{font-size:1.05rem;margin:2rem 0 .2rem}code,pre{font-size:.9em}pre{overflow:auto}"
    "table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0;vertical-align:top}"
    ":root{color-scheme:light dark}"
)
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; {NO_FRAMES}"


async def serve_docs(request: Request) -> HTMLResponse:
    """The page."""
    content = render_document(request.app.openapi())
    return HTMLResponse(content, headers={"Content-Security-Policy": _POLICY})


def render_document(document: dict[str, Any]) -> str:
    """All calls, then all messages."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    calls = "".join(_calls(document))
    messages = "".join(_message(name, schema) for name, schema in _schemas(document))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(info['summary'])}</p>"
        '<p>For programs: <a href="/openapi.json">openapi.json</a></p>'
        f"{calls}<h1>Messages</h1>{messages}</body></html>"
    )


def _calls(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            rows = [*_parameters(call), *_body(call), *_answers(call)]
            yield (
                f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
                f"<p>{escape(call.get('description', ''))}</p><table>{''.join(rows)}</table>"
            )


def _parameters(call: dict[str, Any]) -> Iterator[str]:
    for parameter in call.get("parameters", []):
        need = "required" if parameter.get("required") else "optional"
        said = parameter.get("description") or parameter["schema"].get("description", "")
        yield _row(f"{parameter['name']}", f"{parameter['in']}, {need}", said)


def _body(call: dict[str, Any]) -> Iterator[str]:
    for content in call.get("requestBody", {}).get("content", {}).values():
        yield _row("body", _name(content["schema"]), "")


def _answers(call: dict[str, Any]) -> Iterator[str]:
    for status, answer in sorted(call["responses"].items()):
        schemas = [content.get("schema", {}) for content in answer.get("content", {}).values()]
        yield _row(status, ", ".join(map(_name, schemas)), answer.get("description", ""))


def _name(schema: dict[str, Any]) -> str:
    return schema.get("$ref", "").rpartition("/")[2]


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _schemas(document: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(document["components"]["schemas"].items())


def _message(name: str, schema: dict[str, Any]) -> str:
    text = json.dumps(schema, indent=1)
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
