"""What does the page show beside its charts? Key figures, verdict, plan and ranks, as HTML; each number carries its exact value."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from ray_streamer.units import counted, human_bytes, human_rate
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.report.load_report import LoadReport
    from ray_streamer.report.page.figure import Figure

_OF_RANKS = (
    ("seconds", "seconds", "s"),
    ("bytes_read", "read", "bytes"),
    ("page_cache_bytes", "page cache", "bytes"),
    ("bytes_delivered", "into tensors", "bytes"),
    ("num_requests", "requests", ""),
    ("peak_staging_bytes", "peak staging", "bytes"),
    ("memory_limit", "staging limit", "bytes"),
    ("wait_seconds", "waiting for a slot", "s"),
    ("first_byte_seconds", "waiting for the first byte", "s"),
    ("read_seconds", "request to last byte", "s"),
    ("copy_seconds", "copying", "s"),
    ("first_touch_seconds", "page faults", "s"),
    ("cpu_seconds", "CPU", "s"),
    ("num_retries", "retries", ""),
    ("num_hedges", "hedges", ""),
)
"""Field, head and unit of each column of the ranks' table."""


def text(said: str) -> str:
    """A text from outside, as HTML that shows it."""
    return escape(printable(said))


def section(key: str, title: str, *content: str) -> str:
    """A part of the page, to which a link leads."""
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{text(title)}</h2>{"".join(content)}</section>\n'


def figure_section(figure: Figure) -> str:
    """A chart, and its numbers for those who do not see it."""
    heads = "".join(f'<th scope="col">{text(column)}</th>' for column in figure.columns)
    rows = "".join("<tr>" + "".join(map(_plain_cell, row)) + "</tr>" for row in figure.rows)
    drawn = f'<div class="chart" id="chart-{figure.key}" role="img" aria-label="{text(figure.title)}: {text(figure.says)}"></div>'
    table = _scrolled(f"{figure.title}, as a table", heads, rows)
    says = f'<p class="quiet">{text(figure.says)}</p>'
    return section(figure.key, figure.title, says, drawn, f"<details><summary>As a table</summary>{table}</details>")


def key_figures(report: LoadReport) -> str:
    """What most readers came for."""
    staged = max((rank.peak_staging_bytes for rank in report.ranks), default=0)
    shown = (
        ("needed_bytes", "needed on all nodes", report.needed_bytes, human_bytes(report.needed_bytes)),
        ("reading_seconds", "reading and copying", report.reading_seconds, f"{report.reading_seconds:.2f} s"),
        ("total", "in all", report.seconds.get("total", 0.0), f"{report.seconds.get('total', 0.0):.2f} s"),
        (
            "gigabytes_per_second",
            "throughput",
            report.gigabytes_per_second,
            human_rate(1e9 * report.gigabytes_per_second),
        ),
        ("bytes_read", "read from storage", report.bytes_read, human_bytes(report.bytes_read)),
        (
            "page_cache_bytes",
            "out of the page cache",
            report.page_cache_bytes,
            human_bytes(report.page_cache_bytes),
        ),
        ("amplification", "read / needed", report.amplification, f"{report.amplification:.3f}x"),
        ("peak_staging_bytes", "peak staging of a rank", staged, human_bytes(staged)),
        ("num_retries", "retries", report.storage.num_retries, str(report.storage.num_retries)),
        ("num_hedges", "hedged requests", report.storage.num_hedges, str(report.storage.num_hedges)),
    )
    return "<dl>{}</dl>\n".format(
        "".join(
            f'<div><dt>{text(name)}</dt><dd data-key="{key}" data-value="{value!r}">{text(said)}</dd></div>'
            for key, name, value, said in shown
        )
    )


def verdict_section(report: LoadReport) -> str:
    """Why the load took that long, and what cannot be told."""
    verdict, untold = report.verdict, report.findings.untold
    said = [f'<p id="verdict-text">{text(verdict.text)}</p>'] if verdict is not None else []
    if verdict is None and not untold:
        said = ["<p>Nothing was read or copied.</p>"]
    said += [f'<p class="quiet">{text(sentence)}</p>' for sentence in untold]
    return section("verdict", "Verdict", f'<div class="verdict">{"".join(said)}</div>')


def plan_section(report: LoadReport) -> str:
    """What was to be read, by whom."""
    axes = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one rank"
    num_nodes, timeline = len(set(report.nodes)), report.findings.timeline
    requests = sum(rank.num_requests for rank in report.ranks)
    sentences = [
        f"Mesh: {axes}; {counted(len(report.ranks), 'rank')} on {counted(num_nodes, 'node')}.",
        f"The checkpoint has {human_bytes(report.checkpoint_bytes)}; the ranks of each node read what they need of it once: "
        f"{human_bytes(report.needed_bytes)} needed, {human_bytes(report.bytes_read)} read in {counted(requests, 'request')}.",
    ]
    if timeline is not None and timeline.ranks:
        rank = timeline.ranks[0]
        sentences.append(
            f"Requests of at most {human_bytes(timeline.block_bytes)}, {rank.num_readers} in flight and "
            f"{counted(rank.num_slots, 'slot')} on each rank of {timeline.node}."
        )
    sentences.append(f"Plan {report.plan_hash[:12]}." if report.plan_hash else "")
    return section("plan", "Plan", *(f"<p>{text(sentence)}</p>" for sentence in sentences if sentence), _ranks(report))


def _ranks(report: LoadReport) -> str:
    heads = "".join(
        f'<th scope="col">{text(head)}</th>' for head in ("rank", "node", *(head for _, head, _ in _OF_RANKS))
    )
    rows = [
        f'<tr data-rank="{rank.rank}"><td>{rank.rank}</td><td>{text(node)}</td>{"".join(_cells(rank))}</tr>'
        for node, rank in zip(report.nodes, report.ranks, strict=True)
    ]
    note = '<p class="quiet">Seconds of blocks are summed over blocks, many of which are under way at one time.</p>'
    return _scrolled("Ranks", heads, "".join(rows)) + note


def _cells(rank: RankStatistics) -> Iterator[str]:
    values = rank.as_dict()
    values = values | values["storage"] | {"seconds": sum(rank.seconds.values())}
    for name, _, unit in _OF_RANKS:
        value = values[name]
        yield f'<td data-key="{name}" data-value="{value!r}">{text(_said(value, unit))}</td>'


def _said(value: Any, unit: str) -> str:
    if unit == "bytes":
        return human_bytes(value) if value >= 0 else "none"
    return f"{value:.2f}" if unit == "s" else str(value)


def _plain_cell(value: str | float) -> str:
    if isinstance(value, str):
        return f"<td>{text(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return f'<td data-value="{value!r}">{shown}</td>'


def _scrolled(name: str, heads: str, rows: str) -> str:
    """A table that scrolls by itself, also with the keyboard."""
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name)}">{table}</div>'


def links(titles: Sequence[tuple[str, str]]) -> str:
    """Where to go on the page."""
    return f'<nav aria-label="On this page">{"".join(_links(titles))}</nav>\n'


def _links(titles: Iterable[tuple[str, str]]) -> Iterator[str]:
    for key, title in titles:
        yield f'<a href="#{key}">{text(title)}</a>'
