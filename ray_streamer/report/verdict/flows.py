"""How fast does each stream receive while streams share links? As fast as its own rate and its fair part of every link allow.

Streams of one lane come the same way and at the same rate, so what one of them has received is a difference of one clock of bytes that
runs for the whole lane. The rates are max-min fair: all grow together, until a stream has its own rate or a link on its way is full;
those stop, and the others go on. That is what many TCP streams of equal round-trip time tend to.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

What = TypeVar("What")

_ROUNDING = 1 + 1e-12


class Lane(NamedTuple):
    """A way that streams take.

    Attributes:
        stream_rate: Bytes per second of one stream that has all links to itself.
        links: Links on the way, each with how many streams on it one stream of this lane stands for.
    """

    stream_rate: float
    links: tuple[tuple[int, float], ...]


def fair_rates(lanes: Sequence[Lane], capacities: Sequence[float], num_streams: Sequence[int]) -> tuple[float, ...]:
    """Bytes per second of each stream of each lane; 0 for lanes without streams.

    Args:
        lanes: Ways of the streams.
        capacities: Bytes per second of each link.
        num_streams: How many streams receive on each lane.

    >>> both, one = Lane(10.0, ((0, 1.0),)), Lane(2.0, ((0, 1.0),))
    >>> fair_rates((both, one), (12.0,), (2, 1))
    (5.0, 2.0)
    """
    rates = [0.0] * len(lanes)
    left = list(capacities)
    growing = [lane for lane, number in enumerate(num_streams) if number]
    level = 0.0
    while growing:
        loads = [0.0] * len(left)
        for lane in growing:
            for link, weight in lanes[lane].links:
                loads[link] += weight * num_streams[lane]
        room = [have / load if load else math.inf for have, load in zip(left, loads, strict=True)]
        more = {
            lane: min(lanes[lane].stream_rate - level, *(room[link] for link, _ in lanes[lane].links))
            for lane in growing
        }
        grows = min(more.values())
        level += grows
        left = [
            have - grows * load if load and math.isfinite(have) else have
            for have, load in zip(left, loads, strict=True)
        ]
        for lane in growing:
            rates[lane] = level
        growing = [lane for lane in growing if more[lane] > grows * _ROUNDING]
    return tuple(rates)


class Flows(Generic[What]):
    """Streams that receive, each with what it brings.

    Args:
        lanes: Ways of the streams.
        capacities: Bytes per second of each link.

    Attributes:
        ends_at: When the next stream ends if none begins before; infinite while none receives.
    """

    def __init__(self, lanes: Sequence[Lane], capacities: Sequence[float]) -> None:
        self._lanes, self._capacities = tuple(lanes), tuple(capacities)
        self._receiving: list[list[tuple[float, int, What]]] = [[] for _ in lanes]
        self._served = [0.0] * len(lanes)
        self._served_at = 0.0
        self._num_begun = 0
        self._known: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        self._rates: list[tuple[int, float]] = []
        self._next_lane = -1
        self.ends_at = math.inf

    def begin(self, lane: int, num_bytes: float, what: What, *, now: float) -> None:
        """One more stream, which ends when it has received so many bytes; `now` is no later than `ends_at`."""
        self._pass_time(now)
        self._num_begun += 1
        heapq.heappush(self._receiving[lane], (self._served[lane] + num_bytes, self._num_begun, what))
        self._share()

    def end(self) -> What:
        """What the stream brings that ends next, at `ends_at`."""
        self._pass_time(self.ends_at)
        self._served[self._next_lane], _, what = heapq.heappop(self._receiving[self._next_lane])
        self._share()
        return what

    def _pass_time(self, now: float) -> None:
        seconds, self._served_at = now - self._served_at, now
        if seconds > 0:
            # What comes at an infinite rate has come before any time passes.
            for lane, rate in self._rates:
                self._served[lane] += seconds * rate

    def _share(self) -> None:
        """Finds the rates anew: they change with the number of streams only."""
        counts = tuple(map(len, self._receiving))
        if counts not in self._known:
            rates = fair_rates(self._lanes, self._capacities, counts)
            self._known[counts] = [(lane, rates[lane]) for lane, number in enumerate(counts) if number]
        self._rates = self._known[counts]
        self.ends_at, self._next_lane = math.inf, -1
        for lane, rate in self._rates:
            # What rounding left of a stream takes no time.
            seconds = max(0.0, self._receiving[lane][0][0] - self._served[lane]) / rate
            if self._served_at + seconds < self.ends_at:
                self.ends_at, self._next_lane = self._served_at + seconds, lane
