"""Where on the time axis is each block of a rank? In lanes of reads and lanes of copies, none of which holds two blocks at a time.

A lane is no thread: a block takes the first lane that is free, so there are as many lanes as there were blocks at one time.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from ray_streamer.rank.recorder import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.rank.trace import RankTrace


class Placed(NamedTuple):
    """Blocks that take part in something, each with its lane and its time.

    Attributes:
        rows: Of the rank's trace.
        lanes: From 0 on, one for each row.
        starts: Seconds of the rank's clock.
        stops: Seconds of the rank's clock.
    """

    rows: list[int]
    lanes: list[int]
    starts: list[float]
    stops: list[float]

    @property
    def num_lanes(self) -> int:
        """Blocks at one time."""
        return max(self.lanes, default=-1) + 1

    @classmethod
    def of(cls, rows: NDArray[np.int64], starts: NDArray[np.float64], stops: NDArray[np.float64]) -> Self:
        """Places rows of a trace, each from `starts` to `stops` of all rows."""
        times = starts[rows].tolist(), stops[rows].tolist()
        return cls(rows.tolist(), assign_lanes(*times), *times)


def place_reads(trace: RankTrace) -> Placed:
    """From the moment that a reader takes a block up until the block is there, and offered where others want it."""
    times = trace.spans.times
    starts = np.where(times[Step.QUEUED] > 0, times[Step.QUEUED], times[Step.ASKED])
    stops = np.maximum(times[Step.LAST_BYTE], times[Step.ANNOUNCED])
    return Placed.of(np.flatnonzero(times[Step.LAST_BYTE]), starts, stops)


def place_copies(trace: RankTrace) -> Placed:
    """From the moment that a block is taken until it is in its tensors; blocks that storage brings there are not copied."""
    times = trace.spans.times
    rows = np.flatnonzero((times[Step.TAKEN] > 0) & (times[Step.LANDED] > 0))
    return Placed.of(rows, times[Step.TAKEN], times[Step.LANDED])


def assign_lanes(starts: Sequence[float], stops: Sequence[float]) -> list[int]:
    """For each span the first lane that is free from its start to its stop.

    >>> assign_lanes([0.0, 1.0, 2.0, 2.5], [2.0, 4.0, 3.0, 5.0])
    [0, 1, 0, 2]
    """
    lanes = [0] * len(starts)
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for row in sorted(range(len(starts)), key=lambda row: starts[row]):
        while busy and busy[0][0] <= starts[row]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lanes[row] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (stops[row], lanes[row]))
    return lanes
