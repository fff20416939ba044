"""How fast does the storage serve? The rate of one stream and of all together, from how bytes came at each number of streams.

While few streams receive, each gets the stream's rate; while many do, they share the node's. Where only one of the two shows, the
other is bounded by what was seen: a node's rate that was never met is believed to be twice the most that came, no more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST_SHARE = 0.02
"""Numbers of streams that were there for a smaller part of the time say nothing."""

_LEAST_SPREAD = 1.5
"""Most over fewest streams, from which on it shows whether more of them bring more."""

_FEW_STREAMS = 2

_AT_THE_LIMIT = 0.75
"""Of a bound that the user gave: a node that received so much of it was held by it."""

_GOOD_ENOUGH = 0.03
"""Squared error of logarithms that noise explains: about 17%."""


class Rates(NamedTuple):
    """What the storage serves.

    Attributes:
        stream: Bytes per second of one stream alone.
        node: Bytes per second of all streams together.
        is_shared: Whether streams were seen to share the node's rate.
    """

    stream: float
    node: float
    is_shared: bool


class Receipts:
    """When the bytes of each read came.

    Args:
        starts: Seconds of the first byte of each read.
        stops: Seconds of its last byte.
        sizes: Bytes of each read.
    """

    def __init__(self, starts: NDArray[np.float64], stops: NDArray[np.float64], sizes: NDArray[np.int64]) -> None:
        self._starts, self._stops = starts, np.maximum(stops, starts)
        lengths = self._stops - self._starts
        lasts = lengths > 0
        self._times = np.unique(np.concatenate([self._starts[lasts], self._stops[lasts]]))
        before = np.searchsorted(self._times, self._starts[lasts]), np.searchsorted(self._times, self._stops[lasts])
        self._num_streams = self._summed(before, np.ones(int(lasts.sum())))
        self._rate = self._summed(before, sizes[lasts] / lengths[lasts])

    def _summed(
        self, places: tuple[NDArray[np.int64], NDArray[np.int64]], amounts: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The sum of the amounts of all reads under way, in each interval between two of the times."""
        changes = np.zeros(max(1, len(self._times)))
        np.add.at(changes, places[0], amounts)
        np.add.at(changes, places[1], -amounts)
        return np.cumsum(changes)[:-1]

    def rates(self, *, max_bandwidth: float | None = None, is_shared: bool = False) -> Rates:
        """The rates that explain best what came.

        Args:
            max_bandwidth: Bytes per second that receivers themselves held the node to.
            is_shared: The streams are known to share what came, as reads of one disk do.
        """
        levels, seconds, came = self._by_level()
        if not len(levels):
            return Rates(math.inf, math.inf, is_shared=False)
        if max_bandwidth is not None and came.sum() >= _AT_THE_LIMIT * max_bandwidth * seconds.sum():
            return Rates(math.inf, max_bandwidth, is_shared=True)
        rate = came / seconds
        share = seconds / seconds.sum()
        most = float(rate.max())
        stream = float((rate / levels).max())

        if is_shared:
            # What one of them gets alone does not show.
            return Rates(most, most, is_shared=True)

        def error(stream_rate: float, node_rate: float) -> float:
            return float((share * np.log(np.minimum(stream_rate * levels, node_rate) / rate) ** 2).sum())

        alone = [(error(one, math.inf), one) for one in (rate / levels).tolist()]
        together = [(error(one, node), one, node) for one in (rate / levels).tolist() for node in rate.tolist()]
        best_alone, best = min(alone), min(together)
        if levels.max() >= _LEAST_SPREAD * levels.min() and best_alone[0] <= max(_GOOD_ENOUGH, 1.1 * best[0]):
            return Rates(best_alone[1], 2 * max(most, best_alone[1] * float(levels.max())), is_shared=False)
        if levels.max() < _LEAST_SPREAD * levels.min():
            # Of so few streams nobody knows; many that never differed in number are taken to share.
            is_shared = levels.max() > _FEW_STREAMS
            return Rates(stream, most if is_shared else 2 * most, is_shared=is_shared)
        return Rates(best[1], best[2], is_shared=True)

    def _by_level(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Numbers of streams that were receiving at one time, with the seconds and the bytes that came meanwhile."""
        lengths = np.diff(self._times)
        level = np.rint(self._num_streams).astype(np.int64)
        seconds = np.bincount(level, weights=lengths).astype(np.float64)
        came = np.bincount(level, weights=lengths * self._rate).astype(np.float64)
        counts = np.arange(len(seconds), dtype=np.float64)
        is_told = (counts > 0) & (seconds > _LEAST_SHARE * seconds[1:].sum()) & (came > 0)
        return counts[is_told], seconds[is_told], came[is_told]

    def work_bytes(self, rates: Rates) -> NDArray[np.float64]:
        """Bytes that a stream with a fair part of these rates would have received in the time of each read."""
        if not len(self._times) or (math.isinf(rates.stream) and math.isinf(rates.node)):
            return np.zeros(len(self._starts))
        served_rate = np.minimum(rates.stream, rates.node / np.maximum(1.0, np.rint(self._num_streams)))
        served = np.concatenate([[0.0], np.cumsum(np.diff(self._times) * served_rate)])
        return np.interp(self._stops, self._times, served) - np.interp(self._starts, self._times, served)
