"""The few HTML elements of the report. Every text that a caller passes is escaped here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Generic, Literal, TypeVar

from service.results.report.plotting import STATE_COLOURS
from service.results.schemas import ReportTrial, TargetRun

T = TypeVar("T")
ColumnKind = Literal["number", "text", "long", "code", "state"]


@dataclass(frozen=True, kw_only=True)
class Column(Generic[T]):
    """A column of a table: `text` makes a row's text, `kind` chooses the style of the cells."""

    title: str
    text: Callable[[T], str]
    kind: ColumnKind = "number"


def error_columns(runs: Sequence[TargetRun] | Sequence[ReportTrial]) -> list[Column[Any]]:
    """Return a column for errors if any run has an error."""
    errors = any(run.error for run in runs)
    return [Column(title="error", text=lambda run: run.error or "", kind="long")] if errors else []


def render_table(columns: Sequence[Column[T]], rows: Iterable[T]) -> str:
    """Return a table that scrolls sideways by itself on a narrow screen."""
    head = "".join(f"<th{_class_attribute(c.kind)}>{escape(c.title)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(_render_cell(c, row) for c in columns)}</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def _render_cell(column: Column[T], row: T) -> str:
    text = column.text(row)
    inner = escape(text)
    if column.kind == "code" and text:
        inner = f"<code>{inner}</code>"
    if column.kind == "state":
        inner = f'<span class="dot" style="background:{STATE_COLOURS[text]}"></span>{inner}'
    return f"<td{_class_attribute(column.kind)}>{inner}</td>"


def _class_attribute(kind: ColumnKind) -> str:
    match kind:
        case "number":
            return ""
        case "long":
            return ' class="text long"'
        case _:
            return ' class="text"'


def render_cards(entries: Iterable[tuple[str, str]]) -> str:
    """Return large figures in boxes; an entry is a value and a label."""
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in entries
    )
    return f'<div class="cards">{inner}</div>'


def render_plot(place: str, title: str, *, shape: Literal["plain", "tall", "low"] = "plain") -> str:
    """Return the empty element in which the page's script draws the figure of this id."""
    return (
        f'<figure class="{shape}"><figcaption>{escape(title)}</figcaption>'
        f'<div class="plot" id="{escape(place)}"></div></figure>'
    )


def render_section(title: str, note: str, *parts: str) -> str:
    """Return a part of the page with a heading; nothing if all parts are empty."""
    if not any(parts):
        return ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{''.join(parts)}</section>"
