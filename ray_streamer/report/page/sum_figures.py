"""How is a load made up? Charts of its sums: phases of the whole, costs, and bytes by kind of tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.report.page.figure import COLOURS, PHASE_COLOURS, Figure, as_text, axis_from_zero, bar, labelled_axis
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.report.tensor_kinds import KindReads
    from ray_streamer.report.verdict.judge import Verdict

_MOST_KINDS = 20
"""In the chart; the table has all of them."""

_NAME_PARTS = 3
"""Last components of a kind's name that stand beside its bar."""


def phases_figure(seconds: Mapping[str, float]) -> Figure:
    """The phases of the whole load, one after the other."""
    phases = {name: spent for name, spent in seconds.items() if name != "total"}
    traces = [
        bar(as_text(name), PHASE_COLOURS.get(name, COLOURS["other"]), [spent], [0], [f"{as_text(name)}: {spent:.3f} s"])
        for name, spent in phases.items()
    ]
    yaxis = {"visible": False, "fixedrange": True}
    return Figure(
        key="phases",
        title="From the call to the last byte",
        says="check: the driver's look at the checkpoint. ray: start or connection. start: the ranks' processes. plan: ranks meet and "
        "plan. import: torch and the device, as far as ranks waited for them. load: until the last rank was done.",
        traces=traces,
        layout={"barmode": "stack", "xaxis": axis_from_zero(), "yaxis": yaxis},
        height=190,
        columns=("phase", "seconds"),
        rows=list(seconds.items()),
    )


def costs_figure(verdict: Verdict) -> Figure:
    """What the load would have been shorter by without each cost."""
    labels = [cost.kind if cost.rank is None else f"{cost.kind}, rank {cost.rank}" for cost in verdict.costs]
    saved = [cost.seconds for cost in verdict.costs]
    texts = [f"without it {spent:.3f} s less" for spent in saved]
    return Figure(
        key="costs",
        title="What it would be shorter by",
        says=f"Reading and copying took {verdict.measured_seconds:.2f} s on {verdict.node}. Without each of these costs it would have been "
        "so much shorter. They overlap, so they do not add up.",
        traces=[bar("seconds less", COLOURS["first byte"], saved, list(range(len(labels))), texts)],
        layout={"showlegend": False, "xaxis": axis_from_zero("seconds less"), "yaxis": labelled_axis(labels)},
        height=120 + 34 * len(labels),
        columns=("cost", "seconds less"),
        rows=list(zip(labels, saved, strict=True)),
    )


def kinds_figure(kinds: Sequence[KindReads]) -> Figure:
    """Bytes by kind of tensor: what ranks want, and what is read beyond that."""
    drawn = kinds[:_MOST_KINDS]
    places = list(range(len(drawn)))
    needed = [min(kind.needed_bytes, kind.read_bytes) / 2**20 for kind in drawn]
    beyond = [kind.beyond_need_bytes / 2**20 for kind in drawn]
    texts = [
        f"{as_text(kind.name)}<br>{counted(kind.num_tensors, 'tensor')}, {human_bytes(kind.needed_bytes)} needed, "
        f"{human_bytes(kind.read_bytes)} to read"
        for kind in drawn
    ]
    labels = [".".join(kind.name.split(".")[-_NAME_PARTS:]) for kind in drawn]
    more = f" The {len(drawn)} largest of {len(kinds)} kinds are drawn." if len(kinds) > len(drawn) else ""
    all_beyond = sum(kind.beyond_need_bytes for kind in kinds)
    return Figure(
        key="kinds",
        title="Bytes by kind of tensor",
        says=f"Tensors whose names differ in numbers only. Beyond need the plan reads {human_bytes(all_beyond)}.{more}",
        traces=[
            bar("needed", COLOURS["receive"], needed, places, texts),
            bar("read beyond need", COLOURS["beyond"], beyond, places, texts),
        ],
        layout={"barmode": "stack", "xaxis": axis_from_zero("MiB"), "yaxis": labelled_axis(labels)},
        height=130 + 26 * len(drawn),
        columns=(
            "kind",
            "tensors",
            "bytes in the checkpoint",
            "bytes needed",
            "bytes to read",
            "bytes in tensors of ranks",
        ),
        rows=[
            (
                kind.name,
                kind.num_tensors,
                kind.checkpoint_bytes,
                kind.needed_bytes,
                kind.read_bytes,
                kind.result_bytes,
            )
            for kind in kinds
        ],
    )
