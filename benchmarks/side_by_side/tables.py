"""How are results read? As tables in Markdown, one for each place, and what they say of this project in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from side_by_side.contenders import OUR_DCP, OURS
from side_by_side.places import KINDS, TITLES

if TYPE_CHECKING:
    from side_by_side.results import Cell, Results

MIB = 1 << 20

HEADINGS = (
    "contender",
    "tp",
    "load, s (min-max)",
    "ratio",
    "whole call, s (min-max)",
    "CPU s, load",
    "CPU s, whole call",
    "peak MiB",
    "bytes read / checkpoint",
)
SUMMARY_HEADINGS = (
    "place",
    "load, s",
    "fastest other",
    "its load, s",
    "ratio",
    "CPU s, load",
    "least CPU of others",
    "its CPU s",
)


def place_rows(results: Results, place: str) -> list[list[str]]:
    """A row for each contender; who has no figures has the reason in their place. The smallest of those with `results.tp` ranks are bold."""
    ours = results.ours(place)
    rows: list[list[str]] = []
    for cell in results.of_place(place):
        if not cell.runs:
            rows.append([cell.contender, str(cell.tp), cell.reason or "not measured", *[""] * (len(HEADINGS) - 3)])
            continue
        ratio = f"{cell.median('load_seconds') / ours.median('load_seconds'):.2f}x" if ours else ""
        rows.append(
            [
                cell.contender,
                str(cell.tp),
                _bold_if_least(results, cell, "load_seconds", _with_range(cell, "load_seconds")),
                ratio,
                _bold_if_least(results, cell, "whole_seconds", _with_range(cell, "whole_seconds")),
                _bold_if_least(results, cell, "load_cpu_seconds", f"{cell.median('load_cpu_seconds'):.2f}"),
                _bold_if_least(results, cell, "whole_cpu_seconds", f"{cell.median('whole_cpu_seconds'):.2f}"),
                _bold_if_least(results, cell, "added_bytes", f"{cell.median('added_bytes') / MIB:.0f}"),
                _bytes_read(cell, results.checkpoint_bytes),
            ]
        )
    return rows


def _bold_if_least(results: Results, cell: Cell, metric: str, text: str) -> str:
    """Among those with the number of ranks that everybody has."""
    peers = [other for other in results.of_place(cell.place) if other.runs and other.tp == results.tp]
    is_least = cell in peers and cell.median(metric) == min(other.median(metric) for other in peers)
    return f"**{text}**" if is_least else text


def _with_range(cell: Cell, metric: str) -> str:
    values = cell.values(metric)
    return f"{cell.median(metric):.2f} ({min(values):.2f}-{max(values):.2f})"


def _bytes_read(cell: Cell, checkpoint_bytes: int) -> str:
    if cell.place == "disk-warm":
        return ""
    return f"{cell.median('read_bytes') / checkpoint_bytes:.3f}x"


def summary_rows(results: Results) -> list[list[str]]:
    """A row for each place: this project, and the best of the others with as many ranks."""
    rows: list[list[str]] = []
    for place in results.places():
        ours, others = results.ours(place), _others(results, place)
        if ours is None or not others:
            reasons = {cell.reason for cell in results.of_place(place) if cell.reason}
            rows.append([TITLES[place], "; ".join(sorted(reasons)), *[""] * (len(SUMMARY_HEADINGS) - 2)])
            continue
        fastest = min(others, key=lambda cell: cell.median("load_seconds"))
        thriftiest = min(others, key=lambda cell: cell.median("load_cpu_seconds"))
        rows.append(
            [
                TITLES[place],
                f"{ours.median('load_seconds'):.2f}",
                fastest.contender,
                f"{fastest.median('load_seconds'):.2f}",
                f"{fastest.median('load_seconds') / ours.median('load_seconds'):.2f}x",
                f"{ours.median('load_cpu_seconds'):.2f}",
                thriftiest.contender,
                f"{thriftiest.median('load_cpu_seconds'):.2f}",
            ]
        )
    return rows


def defeats(results: Results) -> list[str]:
    """Where somebody else took less, a line for each place and measure, with everybody who did."""
    lines: list[str] = []
    for place in results.places():
        ours = results.ours(place)
        for metric, title, unit in MEASURES:
            better = [cell for cell in _others(results, place) if ours and cell.median(metric) < ours.median(metric)]
            if ours and better:
                said = ", ".join(
                    f"{cell.contender} {_amount(cell, metric)}"
                    for cell in sorted(better, key=lambda cell: cell.median(metric))
                )
                lines.append(f"{TITLES[place]}, {title}: {said}; ray_streamer {_amount(ours, metric)} {unit}")
    return lines


MEASURES = (
    ("load_seconds", "load", "s"),
    ("whole_seconds", "whole call", "s"),
    ("load_cpu_seconds", "CPU of the load", "s"),
    ("added_bytes", "peak memory", "MiB"),
)
"""What is compared, its title and unit."""


def _amount(cell: Cell, metric: str) -> str:
    return f"{cell.median(metric) / MIB:.0f}" if metric == "added_bytes" else f"{cell.median(metric):.2f}"


def _others(results: Results, place: str) -> list[Cell]:
    ours = (OURS.name, OUR_DCP.name)
    return [
        cell for cell in results.of_place(place) if cell.runs and cell.contender not in ours and cell.tp == results.tp
    ]


def markdown(headings: tuple[str, ...], rows: list[list[str]], *, words: tuple[int, ...] = (0,)) -> str:
    """A table; columns `words` are set to the left, figures to the right."""
    rules = ["---" if column in words else "---:" for column in range(len(headings))]
    lines = [headings, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def notes(place: str) -> str:
    """What a table's last column is."""
    if place == "disk-warm":
        return "Nobody asks the disk."
    return {
        "disk": "Bytes read are what the disk was asked for on behalf of the ranks, read-ahead included.",
        "s3": "Bytes read are what the server sent, by its own count.",
        "web": "Bytes read are what the server sent, by its own log.",
    }[KINDS[place]]
