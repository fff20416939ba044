"""When did blocks hold the slots of a rank's staging memory? From the request until the last rank of the node has its part."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.rank.block_source import Way
from ray_streamer.rank.recorder import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.rank.trace import RankTrace


class SlotsHeld(NamedTuple):
    """One row for each block that held a slot; readings of the node's clock.

    Attributes:
        taken: When storage was asked for it.
        free: When the last rank had its part; 0 where none has.
    """

    taken: NDArray[np.float64]
    free: NDArray[np.float64]


def slots_held(trace: RankTrace, of_node: Sequence[RankTrace]) -> SlotsHeld:
    """When the slots of one rank were held.

    Args:
        trace: Of the rank.
        of_node: Of all ranks of its node, which share its clock.
    """
    rows = np.flatnonzero(trace.spans.ways == Way.STAGED)
    numbers, free = trace.numbers[rows], np.zeros(len(rows))
    for each in of_node:
        if len(each.numbers):
            at = each.numbers.searchsorted(numbers)
            has_part = (at < len(each.numbers)) & (each.numbers.take(at, mode="clip") == numbers)
            landed = each.spans.times[Step.LANDED].take(at, mode="clip")
            free = np.where(has_part, np.maximum(free, landed), free)
    return SlotsHeld(trace.spans.times[Step.ASKED, rows], free)
