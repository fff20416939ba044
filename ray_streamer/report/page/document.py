"""How does a report become one file that a browser shows? Sections, charts, style, script and plotly.js, all of it inside."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError
from ray_streamer.report.output_file import open_output
from ray_streamer.report.page.looks import SCRIPT, STYLE
from ray_streamer.report.page.sections import figure_section, key_figures, links, plan_section, text, verdict_section
from ray_streamer.report.page.sum_figures import costs_figure, kinds_figure, phases_figure
from ray_streamer.report.page.time_figures import time_figures

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.report.load_report import LoadReport
    from ray_streamer.report.page.figure import Figure

_NOTHING_FROM_ELSEWHERE = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def find_plotly_js() -> str:
    """The source of plotly.js, of the installed plotly.

    Raises:
        SettingsError: There is none; says how to install it.
    """
    try:
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports]  # where it is installed
    except ImportError:
        raise SettingsError("a page needs plotly, to draw it: pip install 'ray_streamer[report]'") from None
    return str(get_plotlyjs())


def write_page(report: LoadReport, path: Path) -> None:
    """Writes the page of a load; see docs/measuring.md.

    Raises:
        SettingsError: plotly is not installed, or the file cannot be written.
    """
    page = render_page(report, plotly_js=find_plotly_js())
    with open_output(path) as stream:
        stream.write(page)


def figures_of(report: LoadReport) -> list[Figure]:
    """The charts for what is known of a load."""
    findings, figures = report.findings, [phases_figure(report.seconds)]
    if findings.verdict is not None and findings.verdict.costs:
        figures.append(costs_figure(findings.verdict))
    if findings.timeline is not None and findings.timeline.ranks:
        figures += time_figures(findings.timeline, findings.verdict)
    if findings.tensor_kinds:
        figures.append(kinds_figure(findings.tensor_kinds))
    return figures


def render_page(report: LoadReport, *, plotly_js: str) -> str:
    """The page as text.

    Args:
        report: Of the load.
        plotly_js: Source of plotly.js.
    """
    figures = figures_of(report)
    titles = [("verdict", "Verdict"), *((figure.key, figure.title) for figure in figures), ("plan", "Plan")]
    content = (
        f'<header><h1>{text(report.uri)}</h1><p class="quiet">A load by ray_streamer, {text(_headline(report))}</p></header>\n',
        links(titles),
        '<main id="content">',
        verdict_section(report),
        key_figures(report),
        *map(figure_section, figures),
        plan_section(report),
        "</main>\n",
        '<footer class="quiet">Made by ray_streamer; drawn by plotly.js. This file has the report as JSON, and asks no network.</footer>\n',
        _data("report", report.as_dict()),
        _data("figures", [asdict(figure) for figure in figures]),
        f"<script>{plotly_js}</script>\n<script>{SCRIPT}</script>\n",
    )
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_FROM_ELSEWHERE}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(report.uri)}: load report</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>\n'
    )
    return f'{head}<body><a class="skip" href="#content">To the content</a>\n{"".join(content)}</body></html>\n'


def _headline(report: LoadReport) -> str:
    return f"{report!r}".partition(", ")[2].rstrip(")") + "."


def _data(key: str, value: Any) -> str:
    """Values for the script, in which no text can end the element."""
    written = json.dumps(_finite(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{key}">{written}</script>\n'


def _finite(value: Any) -> Any:
    """The same, with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
