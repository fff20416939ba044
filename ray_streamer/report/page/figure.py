"""What is a chart of the page? What plotly.js draws, and the same numbers as a table for those who do not see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Cell = str | int | float

COLOURS = {
    "slot": "#a371f7",
    "first byte": "#d29922",
    "receive": "#388bfd",
    "copy": "#2ea043",
    "beyond": "#e5534b",
    "other": "#8b949e",
}
"""Told apart by those who are colour-blind, and readable on light and on dark."""

PHASE_COLOURS = {
    "check": "#8b949e",
    "headers": "#8b949e",
    "ray": "#a371f7",
    "start": "#d29922",
    "plan": "#e5534b",
    "import": "#39a0a4",
    "load": "#388bfd",
    "connect": "#8b949e",
    "device": "#39a0a4",
    "stream": "#388bfd",
    "finish": "#2ea043",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One chart.

    Attributes:
        key: Its name in the page.
        title: Its heading.
        says: What it shows, in one or two sentences.
        traces: As plotly.js takes them.
        layout: The same; colours of text and background are the page's.
        height: In pixels.
        columns: Heads of the table; the first column is text.
        rows: Of the table.
    """

    key: str
    title: str
    says: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def as_text(name: str) -> str:
    """A name from outside, of which plotly.js shows every character and obeys none.

    >>> as_text("<a href='x'>model</a>")
    "&lt;a href='x'&gt;model&lt;/a&gt;"
    """
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def bar(
    name: str, colour: str, values: list[float], labels: list[int], texts: list[str], **more: Any
) -> dict[str, Any]:
    """Horizontal bars of one colour; `labels` are places on the y axis."""
    shown: dict[str, Any] = {"type": "bar", "orientation": "h", "name": name, "x": values, "y": labels}
    return shown | {"marker": {"color": colour}, "hovertext": texts, "hoverinfo": "text", "textposition": "none"} | more


def labelled_axis(labels: list[str]) -> dict[str, Any]:
    """A y axis whose places 0, 1, ... are these names, from top to bottom."""
    places = list(range(len(labels)))
    shown = [as_text(label) for label in labels]
    return {"tickvals": places, "ticktext": shown, "autorange": "reversed", "automargin": True, "fixedrange": True}


def axis_from_zero(title: str = "seconds") -> dict[str, Any]:
    """An axis of numbers that begins at 0."""
    return {"title": {"text": title}, "rangemode": "tozero", "fixedrange": True}
