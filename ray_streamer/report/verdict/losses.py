"""How much of each read's time did requests take that failed? Incidents of the storage, laid beside the blocks that they held up.

A request that is refused costs its own answer and the wait for the next attempt. While a store asks to slow down, other requests are held
back as well. Both are part of the wait for a first byte in a block's spans; a body that breaks is part of the time in which bytes come.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.rank.recorder import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.rank.trace import RankTrace


class Losses(NamedTuple):
    """What some of a rank's reads lost.

    Attributes:
        before_seconds: Of the wait for each first byte.
        after_share: Of the time from each first byte to the last one.
    """

    before_seconds: NDArray[np.float64]
    after_share: NDArray[np.float64]


def losses_of(trace: RankTrace, rows: NDArray[np.int64]) -> Losses:
    """What the reads at these rows of a trace lost.

    Args:
        trace: Of a rank.
        rows: Of blocks that it read.
    """
    first, last = (trace.spans.times[step, rows] for step in (Step.FIRST_BYTE, Step.LAST_BYTE))
    before, after = np.zeros(len(rows)), np.zeros(len(rows))
    order = np.lexsort((trace.starts[rows], trace.file_ids[rows]))
    keys = list(zip(trace.file_ids[rows][order].tolist(), trace.starts[rows][order].tolist(), strict=True))
    files = {path: number for number, path in enumerate(trace.files)}
    for incident in trace.incidents:
        at = _find(keys, files.get(incident.path), incident.offset)
        if at is None or incident.offset >= trace.stops[rows[order[at]]]:
            continue
        place = order[at]
        lost = before if incident.seconds <= first[place] else after
        lost[place] += incident.lost_seconds
    waited, came = first - trace.spans.times[Step.ASKED, rows], last - first
    return Losses(np.minimum(before, waited), np.minimum(after / np.maximum(came, 1e-9), 1.0))


def _find(keys: list[tuple[int, int]], file: int | None, offset: int) -> int | None:
    """Position of the last block of a file that begins at `offset` or before."""
    if file is None:
        return None
    at = bisect_right(keys, (file, offset)) - 1
    return at if at >= 0 and keys[at][0] == file else None
