"""How does a load look over its time? Charts of a timeline: what ranks and blocks did, what came, which slots were in use."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ray_streamer.report.page.figure import COLOURS, PHASE_COLOURS, Figure, as_text, axis_from_zero, bar, labelled_axis
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.report.timeline import Timeline
    from ray_streamer.report.verdict.judge import Verdict

_STATES = (
    ("waiting for a slot", "waiting_for_slot", COLOURS["slot"]),
    ("waiting for the first byte", "waiting_for_first_byte", COLOURS["first byte"]),
    ("receiving", "receiving", COLOURS["receive"]),
    ("copying", "copying", COLOURS["copy"]),
)
"""What a block does, the field of `RankTimeline` that counts it, and its colour."""

_INCIDENTS = {
    "retry": ("retries", "x"),
    "throttled": ("answers to slow down", "triangle-down"),
    "held": ("requests held back after these", "line-ew-open"),
    "hedge": ("hedged requests", "diamond"),
    "cut": ("late bodies cut", "square"),
    "slow address": ("bodies from a slow address", "hourglass"),
}
"""What each kind of incident is called, and how it is marked."""


def time_figures(timeline: Timeline, verdict: Verdict | None) -> Iterator[Figure]:
    """The charts of a timeline that has ranks."""
    yield _ranks(timeline)
    yield _throughput(timeline, verdict)
    yield _states(timeline)
    yield _slots(timeline)


def _ranks(timeline: Timeline) -> Figure:
    """A row for each rank, with its phases."""
    labels = [f"rank {rank.rank}" for rank in timeline.ranks]
    rows = [
        (label, name, start, stop, round(stop - start, 6))
        for label, rank in zip(labels, timeline.ranks, strict=True)
        for name, start, stop in rank.phases
    ]
    names = list(dict.fromkeys(row[1] for row in rows))
    traces: list[dict[str, Any]] = []
    for name in names:
        own = [row for row in rows if row[1] == name]
        texts = [
            f"{label}, {as_text(name)}: {seconds:.3f} s, from {start:.3f} s" for label, _, start, _, seconds in own
        ]
        places, lengths = [labels.index(row[0]) for row in own], [row[4] for row in own]
        colour = PHASE_COLOURS.get(name, COLOURS["other"])
        traces.append(bar(as_text(name), colour, lengths, places, texts, base=[row[2] for row in own]))
    layout = {"barmode": "overlay", "xaxis": _axis_of(timeline), "yaxis": labelled_axis(labels), "bargap": 0.35}
    return Figure(
        key="ranks",
        title="Ranks over time",
        says="connect: meeting the ranks of the node. device: torch's import and the device. stream: reads and copies. finish: waiting "
        "for the other ranks of the node.",
        traces=traces,
        layout=layout,
        height=130 + 34 * len(labels),
        columns=("rank", "phase", "from, s", "to, s", "seconds"),
        rows=list(rows),
    )


def _throughput(timeline: Timeline, verdict: Verdict | None) -> Figure:
    """What came and what landed, with the ceiling, and what went wrong on the way."""
    seconds = timeline.part_seconds
    middles = _middles(timeline)
    received = [total / seconds / 1e9 for total in _sums([rank.received_bytes for rank in timeline.ranks])]
    landed = [total / seconds / 1e9 for total in _sums([rank.landed_bytes for rank in timeline.ranks])]
    traces = [
        _line("from storage", COLOURS["receive"], middles, received, fill="tozeroy", unit="GB/s"),
        _line("into tensors", COLOURS["copy"], middles, landed, unit="GB/s"),
    ]
    says = "Bytes of all ranks of the node; into tensors, what two ranks hold counts twice."
    ceiling = None if verdict is None else verdict.node_bytes_per_second
    if ceiling is not None:
        traces.append(_limit("ceiling", ceiling / 1e9, timeline))
        says += f" All streams together get about {ceiling / 1e9:.2f} GB/s: that is the ceiling of this load."
    else:
        says += " The ceiling does not show: more streams would have brought more."
    traces += _incident_marks(timeline)
    if counts := Counter(kind for rank in timeline.ranks for kind, _ in rank.incidents):
        says += f" On the way: {', '.join(f'{count} {_incident(kind)[0]}' for kind, count in sorted(counts.items()))}."
    return Figure(
        key="throughput",
        title="Throughput against the ceiling",
        says=says,
        traces=traces,
        layout={"xaxis": _axis_of(timeline), "yaxis": axis_from_zero("GB/s")},
        height=340,
        columns=("from, s", "from storage, GB/s", "into tensors, GB/s"),
        rows=[(f"{at:.3f}", came, went) for at, came, went in zip(_edges(timeline), received, landed, strict=True)],
    )


def _incident(kind: str) -> tuple[str, str]:
    return _INCIDENTS.get(kind, (as_text(kind), "circle"))


def _incident_marks(timeline: Timeline) -> Iterator[dict[str, Any]]:
    kinds = sorted({kind for rank in timeline.ranks for kind, _ in rank.incidents})
    for kind in kinds:
        name, symbol = _incident(kind)
        found = [(second, rank.rank) for rank in timeline.ranks for each, second in rank.incidents if each == kind]
        yield {
            "x": [second for second, _ in found],
            "y": [0] * len(found),
            "name": name,
            "mode": "markers",
            "marker": {"symbol": symbol, "size": 10, "color": COLOURS["beyond"]},
            "hovertext": [f"{name}: rank {rank}, {second:.3f} s" for second, rank in found],
            "hoverinfo": "text",
            "cliponaxis": False,
        }


def _states(timeline: Timeline) -> Figure:
    """What blocks did."""
    middles = _middles(timeline)
    sums = {name: _sums([getattr(rank, counted) for rank in timeline.ranks]) for name, counted, _ in _STATES}
    traces = [
        _line(name, colour, middles, sums[name], stackgroup="states", unit="blocks") for name, _, colour in _STATES
    ]
    rows = [
        (f"{at:.3f}", *(round(sums[name][part], 3) for name, _, _ in _STATES))
        for part, at in enumerate(_edges(timeline))
    ]
    readers = sum(rank.num_readers for rank in timeline.ranks)
    return Figure(
        key="states",
        title="Where each second went",
        says=f"What blocks did in each moment, over all ranks of the node, which may have {readers} reads in flight together.",
        traces=traces,
        layout={"xaxis": _axis_of(timeline), "yaxis": axis_from_zero("blocks at one time")},
        height=340,
        columns=("from, s", *(name for name, _, _ in _STATES)),
        rows=rows,
    )


def _slots(timeline: Timeline) -> Figure:
    """Staging memory in use."""
    middles = _middles(timeline)
    traces = [_line(f"rank {rank.rank}", None, middles, rank.slots_in_use, unit="slots") for rank in timeline.ranks]
    limits = sorted({rank.num_slots for rank in timeline.ranks})
    traces.append(_limit("all slots", limits[0], timeline))
    slots = " to ".join(map(str, (limits[0], limits[-1]) if limits[0] != limits[-1] else limits[:1]))
    rows = [
        (f"{at:.3f}", *(rank.slots_in_use[part] for rank in timeline.ranks)) for part, at in enumerate(_edges(timeline))
    ]
    return Figure(
        key="slots",
        title="Slots in use",
        says=f"Each rank stages blocks in {slots} slots of {human_bytes(timeline.block_bytes)}. At the dashed line reads wait for a slot.",
        traces=traces,
        layout={"xaxis": _axis_of(timeline), "yaxis": axis_from_zero("slots")},
        height=320,
        columns=("from, s", *(f"rank {rank.rank}" for rank in timeline.ranks)),
        rows=rows,
    )


def _line(
    name: str, colour: str | None, xs: Sequence[float], ys: Sequence[float], *, unit: str, **more: Any
) -> dict[str, Any]:
    line = {"shape": "hvh", "width": 1.5} | ({} if colour is None else {"color": colour})
    texts = [f"{name}: {value:.2f} {unit}, {at:.2f} s" for at, value in zip(xs, ys, strict=True)]
    shown: dict[str, Any] = {"x": list(xs), "y": list(ys), "name": name, "mode": "lines", "line": line}
    return shown | {"hovertext": texts, "hoverinfo": "text"} | more


def _limit(name: str, height: float, timeline: Timeline) -> dict[str, Any]:
    """A dashed line over all of the time."""
    line = {"dash": "dash", "color": COLOURS["beyond"]}
    ends = {"x": [0, timeline.seconds], "y": [height] * 2}
    return ends | {"name": name, "mode": "lines", "line": line, "hoverinfo": "name+y"}


def _axis_of(timeline: Timeline) -> dict[str, Any]:
    """The x axis, which is the same in all charts."""
    return axis_from_zero() | {"range": [0, timeline.seconds]}


def _edges(timeline: Timeline) -> list[float]:
    """Where each part of the time begins."""
    return [part * timeline.part_seconds for part in range(len(timeline.ranks[0].received_bytes))]


def _middles(timeline: Timeline) -> list[float]:
    return [round(edge + timeline.part_seconds / 2, 6) for edge in _edges(timeline)]


def _sums(columns: Sequence[Sequence[float]]) -> list[float]:
    """Over all ranks, for each part of the time."""
    return [sum(column) for column in zip(*columns, strict=True)]
