"""How does it look? One picture for each measure, with a panel for each place and a bar for each contender, as PNG and SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from side_by_side.contenders import OURS
from side_by_side.places import TITLES

if TYPE_CHECKING:
    from pathlib import Path

    from side_by_side.results import Cell, Results

PICTURES = {
    "load_seconds": "Load alone, seconds",
    "whole_seconds": "Whole call from the start of the processes, seconds",
    "load_cpu_seconds": "CPU seconds of the load, all ranks",
    "added_bytes": "Peak memory added by the load, all ranks, MiB",
}
"""By measure; the picture's file has the measure's name."""

_OURS, _OTHERS, _RANGE = "#0b6e99", "#b9bfc4", "#333333"
_COLUMNS = 2


def draw(results: Results, folder: Path) -> None:
    """Writes all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # The same figures make the same files; letters stay letters.
    with matplotlib.rc_context({"svg.hashsalt": "side by side", "svg.fonttype": "none"}):
        for metric, title in PICTURES.items():
            figure = _picture(results, metric, title)
            figure.savefig(folder / f"{metric}.png", dpi=110)
            figure.savefig(folder / f"{metric}.svg", metadata={"Date": None})


def _picture(results: Results, metric: str, title: str) -> Figure:
    shown = {place: [cell for cell in results.of_place(place) if cell.runs] for place in results.places()}
    places = [place for place, cells in shown.items() if cells]
    rows = -(-len(places) // _COLUMNS)
    heights = [max(len(shown[place]) for place in places[row * _COLUMNS : (row + 1) * _COLUMNS]) for row in range(rows)]
    figure = Figure(figsize=(13, 1.2 + sum(0.31 * height + 0.9 for height in heights)), layout="constrained")
    figure.suptitle(f"{title} (medians of {results.num_rounds}, lines from least to most)", fontsize=13)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False, height_ratios=heights).ravel()
    for panel, place in zip(panels, places, strict=False):
        _panel(panel, shown[place], metric)
        panel.set_title(TITLES[place], fontsize=11, loc="left")
    for panel in panels[len(places) :]:
        panel.set_axis_off()
    return figure


def _panel(panel: Any, cells: list[Cell], metric: str) -> None:
    scale = 1 << 20 if metric == "added_bytes" else 1
    medians = [cell.median(metric) / scale for cell in cells]
    ranges = [(min(cell.values(metric)) / scale, max(cell.values(metric)) / scale) for cell in cells]
    positions = range(len(cells))
    panel.barh(
        positions, medians, color=[_OURS if cell.contender == OURS.name else _OTHERS for cell in cells], height=0.72
    )
    panel.hlines(positions, [low for low, _ in ranges], [high for _, high in ranges], color=_RANGE, linewidth=1.2)
    panel.set_yticks(positions, [f"{cell.contender}, tp={cell.tp}" for cell in cells], fontsize=9)
    panel.invert_yaxis()
    widest = max(high for _, high in ranges) or 1
    for position, median, (_, high) in zip(positions, medians, ranges, strict=True):
        panel.text(high + widest * 0.015, position, _figure(median, metric), va="center", fontsize=8.5)
    panel.set_xlim(0, widest * 1.12)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _figure(value: float, metric: str) -> str:
    return f"{value:.0f}" if metric == "added_bytes" else f"{value:.2f}"
