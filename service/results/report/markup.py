"""The few HTML elements that the report is made of. All text given to them is escaped here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Generic, Literal, TypeVar

from service.results.report.figures import STATE_COLOURS

T = TypeVar("T")
ColumnKind = Literal["number", "text", "long", "code", "state"]


@dataclass(frozen=True, kw_only=True)
class Column(Generic[T]):
    """A table's column: how a row's text is made, and how it is set."""

    title: str
    text: Callable[[T], str]
    kind: ColumnKind = "number"


def render_table(columns: Sequence[Column[T]], rows: Iterable[T]) -> str:
    """A table that scrolls sideways in itself where the screen is narrow."""
    head = "".join(f"<th{_class(c.kind)}>{escape(c.title)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(_cell(c, row) for c in columns)}</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><render_table>{inner}</render_table></div>'


def _cell(column: Column[T], row: T) -> str:
    text = column.text(row)
    inner = escape(text)
    if column.kind == "code" and text:
        inner = f"<code>{inner}</code>"
    if column.kind == "state":
        inner = f'<span class="dot" style="background:{STATE_COLOURS[text]}"></span>{inner}'
    return f"<td{_class(column.kind)}>{inner}</td>"


def _class(kind: ColumnKind) -> str:
    match kind:
        case "number":
            return ""
        case "long":
            return ' class="text long"'
        case _:
            return ' class="text"'


def render_cards(entries: Iterable[tuple[str, str]]) -> str:
    """Large figures, each with what it is."""
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what in entries
    )
    return f'<div class="cards">{inner}</div>'


def render_plot(place: str, title: str, *, shape: Literal["plain", "tall", "low"] = "plain") -> str:
    """The place that the figure of this id is drawn in."""
    return (
        f'<figure class="{shape}"><figcaption>{escape(title)}</figcaption>'
        f'<div class="plot" id="{escape(place)}"></div></figure>'
    )


def render_section(title: str, note: str, *parts: str) -> str:
    """A headed part of the page; nothing at all when it has no content."""
    if not any(parts):
        return ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{''.join(parts)}</section>"
