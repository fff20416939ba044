"""How are figures shown? Plain columns; a GPU machine may have no package for tables."""

from __future__ import annotations

from typing import Any

WIDTH = 100


def show(title: str, figures: Any) -> None:
    """Prints one check's figures."""
    print(f"\n== {title} {'=' * (WIDTH - len(title) - 4)}", flush=True)
    if isinstance(figures, list):
        _columns(figures)
        return
    for name, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{name}:")
            _columns(value)
        elif isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                print(f"    {key:32} {_text(entry)}")
        else:
            print(f"{name:36} {_text(value)}")


def _columns(rows: list[dict[str, Any]]) -> None:
    texts = [[_text(value) for value in row.values()] for row in rows]
    headings = list(rows[0])
    widths = [max(len(column[0]), *map(len, column[1:])) for column in zip(headings, *texts, strict=True)]
    for cells in (headings, *texts):
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
