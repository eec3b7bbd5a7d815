"""`/docs`: the OpenAPI document as a single HTML page without scripts or other files."""

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
# The browser refuses every script, and every style with another hash than this. Text that somebody
# forgot to escape could therefore not run.
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; {NO_FRAMES}"


async def serve_docs(request: Request) -> HTMLResponse:
    """Answer `GET /docs`."""
    content = render_document(request.app.openapi())
    return HTMLResponse(content, headers={"Content-Security-Policy": _POLICY})


def render_document(document: dict[str, Any]) -> str:
    """Render the document as HTML: all calls, then all messages."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    calls = "".join(_render_calls(document))
    messages = "".join(_render_message(name, schema) for name, schema in _sort_schemas(document))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(info['summary'])}</p>"
        '<p>For programs: <a href="/openapi.json">openapi.json</a></p>'
        f"{calls}<h1>Messages</h1>{messages}</body></html>"
    )


def _render_calls(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            rows = [*_parameter_rows(call), *_body_rows(call), *_answer_rows(call)]
            yield (
                f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
                f"<p>{escape(call.get('description', ''))}</p><table>{''.join(rows)}</table>"
            )


def _parameter_rows(call: dict[str, Any]) -> Iterator[str]:
    for parameter in call.get("parameters", []):
        need = "required" if parameter.get("required") else "optional"
        text = parameter.get("description") or parameter["schema"].get("description", "")
        yield _render_row(f"{parameter['name']}", f"{parameter['in']}, {need}", text)


def _body_rows(call: dict[str, Any]) -> Iterator[str]:
    for content in call.get("requestBody", {}).get("content", {}).values():
        yield _render_row("body", _schema_name(content["schema"]), "")


def _answer_rows(call: dict[str, Any]) -> Iterator[str]:
    for status, answer in sorted(call["responses"].items()):
        schemas = [content.get("schema", {}) for content in answer.get("content", {}).values()]
        names = ", ".join(map(_schema_name, schemas))
        yield _render_row(status, names, answer.get("description", ""))


def _schema_name(schema: dict[str, Any]) -> str:
    return schema.get("$ref", "").rpartition("/")[2]


def _render_row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _sort_schemas(document: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(document["components"]["schemas"].items())


def _render_message(name: str, schema: dict[str, Any]) -> str:
    text = json.dumps(schema, indent=1)
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
