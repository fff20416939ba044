"""What happened in each part of a load's time? The traces of one node's ranks, as sums and means over equal parts of it.

A trace has a row for each block. This has the same few hundred numbers for each rank however large the checkpoint is, so it
goes with the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.rank.block_source import Way
from ray_streamer.rank.recorder import Step
from ray_streamer.report.slots import slots_held
from ray_streamer.report.verdict.observe import tells_first_byte

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.rank.trace import RankTrace

NUM_PARTS = 150
"""Into which the time of a load is divided."""

_LEAST_SECONDS = 1e-4
"""Bytes that came in a shorter time are drawn as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimeline:
    """One rank. Each tuple of numbers has one for each part of the time.

    Attributes:
        rank: Global rank.
        phases: Name, start and stop of each phase of the rank, in seconds of the timeline.
        num_readers: Reads that it may have in flight.
        num_slots: Slots of its staging memory.
        received_bytes: Bytes that came from storage.
        landed_bytes: Bytes that came into its tensors, from whatever place.
        slots_in_use: Slots that held a block, in the mean.
        waiting_for_slot: Reads that waited for a slot, in the mean.
        waiting_for_first_byte: Reads that waited for the storage's answer, in the mean.
        receiving: Reads whose bytes came, in the mean.
        copying: Blocks that were copied into tensors, in the mean.
        incidents: Kind of each retry, throttled answer, hedged request or cut body, and its second of the timeline.
    """

    rank: int
    phases: tuple[tuple[str, float, float], ...]
    num_readers: int
    num_slots: int
    received_bytes: tuple[int, ...]
    landed_bytes: tuple[int, ...]
    slots_in_use: tuple[float, ...]
    waiting_for_slot: tuple[float, ...]
    waiting_for_first_byte: tuple[float, ...]
    receiving: tuple[float, ...]
    copying: tuple[float, ...]
    incidents: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The ranks of one node, from the first moment of any of them to the last.

    Attributes:
        node: Name of the node.
        seconds: Of all of it.
        block_bytes: Largest request, and the size of a slot.
        ranks: In rank order.
    """

    node: str
    seconds: float
    block_bytes: int
    ranks: tuple[RankTimeline, ...]

    @property
    def part_seconds(self) -> float:
        """Length of one of the equal parts."""
        num_parts = len(self.ranks[0].received_bytes) if self.ranks else 0
        return self.seconds / num_parts if num_parts else 0.0


def make_timeline(traces: Sequence[RankTrace], *, num_parts: int = NUM_PARTS) -> Timeline | None:
    """The timeline of one node; None when its ranks did nothing.

    Args:
        traces: Of all its ranks, whose clocks are one.
        num_parts: Into which its time is divided.
    """
    phases = [phase for trace in traces for phase in trace.spans.phases if phase.stop]
    if not phases:
        return None
    origin = min(phase.start for phase in phases)
    seconds = max(phase.stop for phase in phases) - origin
    if seconds <= 0:
        return None
    edges = np.linspace(origin, origin + seconds, num_parts + 1)
    axis = _Axis(origin, edges, Step.FIRST_BYTE if tells_first_byte(traces) else Step.ASKED)
    return Timeline(
        node=traces[0].node,
        seconds=round(seconds, 6),
        block_bytes=traces[0].conditions.block_bytes,
        ranks=tuple(axis.rank(trace, traces) for trace in traces),
    )


@dataclass(frozen=True, slots=True)
class _Axis:
    """Where time begins, the edges of its parts, and the step after which bytes come; readings of the clock."""

    origin: float
    edges: NDArray[np.float64]
    receives_after: Step

    def rank(self, trace: RankTrace, of_node: Sequence[RankTrace]) -> RankTimeline:
        times, ways = trace.spans.times, trace.spans.ways
        sizes = (trace.stops - trace.starts).astype(np.float64)
        is_read = times[Step.LAST_BYTE] > 0
        is_staged = is_read & (ways == Way.STAGED)
        landed = trace.spans.landed_bytes.astype(np.float64)
        first_byte = times[self.receives_after]
        # What is read straight into its tensor lands as it comes.
        copied_from = np.where(times[Step.TAKEN] > 0, times[Step.TAKEN], first_byte)
        held = slots_held(trace, of_node)
        return RankTimeline(
            rank=trace.rank,
            phases=tuple(
                (phase.name, self._second(phase.start), self._second(phase.stop))
                for phase in trace.spans.phases
                if phase.stop
            ),
            num_readers=trace.conditions.concurrency,
            num_slots=trace.conditions.num_slots,
            received_bytes=self._bytes(first_byte, times[Step.LAST_BYTE], sizes * is_read),
            landed_bytes=self._bytes(copied_from, times[Step.LANDED], landed),
            slots_in_use=self._mean(*held),
            waiting_for_slot=self._mean(times[Step.QUEUED][is_staged], times[Step.ASKED][is_staged]),
            waiting_for_first_byte=self._mean(times[Step.ASKED][is_read], first_byte[is_read]),
            receiving=self._mean(first_byte[is_read], times[Step.LAST_BYTE][is_read]),
            copying=self._mean(times[Step.TAKEN], times[Step.LANDED]),
            incidents=tuple((incident.kind, self._second(incident.seconds)) for incident in trace.incidents),
        )

    def _second(self, reading: float) -> float:
        return round(reading - self.origin, 6)

    def _mean(self, starts: NDArray[np.float64], stops: NDArray[np.float64]) -> tuple[float, ...]:
        """How many spans there were in each part, in the mean."""
        happened = (starts > 0) & (stops > starts)
        shared = _weighted_seconds(starts[happened], stops[happened], np.ones(int(happened.sum())), self.edges)
        return tuple(np.abs(np.round(shared / np.diff(self.edges), 3)).tolist())

    def _bytes(
        self, starts: NDArray[np.float64], stops: NDArray[np.float64], amounts: NDArray[np.float64]
    ) -> tuple[int, ...]:
        """The bytes of each span, evenly over its length; the sum over all parts is exact."""
        happened = (starts > 0) & (stops > 0) & (amounts > 0)
        starts, amounts = starts[happened], amounts[happened]
        stops = np.maximum(stops[happened], starts + _LEAST_SECONDS)
        before = np.cumsum(_weighted_seconds(starts, stops, amounts / (stops - starts), self.edges))
        before[-1] = amounts.sum()
        whole = np.rint(np.minimum(np.maximum.accumulate(before), before[-1]))
        return tuple(np.diff(whole, prepend=0).astype(np.int64).tolist())


def _weighted_seconds(
    starts: NDArray[np.float64], stops: NDArray[np.float64], weights: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The seconds of all spans in each part between two edges, each span with its weight."""
    return np.diff(_since(starts, weights, edges) - _since(stops, weights, edges))


def _since(
    moments: NDArray[np.float64], weights: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """For each edge the weighted seconds that have passed since those of the moments that came before it."""
    order = np.argsort(moments)
    origin = edges[0]
    moments, weights = moments[order] - origin, weights[order]
    before = np.searchsorted(moments, edges - origin)
    weight = np.concatenate([[0.0], np.cumsum(weights)])[before]
    weighted = np.concatenate([[0.0], np.cumsum(weights * moments)])[before]
    return (edges - origin) * weight - weighted
