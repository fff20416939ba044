"""When is an answer so late that asking again, on another connection, is worth the extra request?

Some requests to an object store take many times as long as their like, and some are never answered, while a second request
is answered at once. So what recent requests took decides what is late: twice the time that nineteen in twenty were done
in. A late head is raced by a second request (see `http_client`); a late body is cut, and goes on elsewhere at the byte that
it had reached. Both spend from one small budget, so that a store that is slow for everybody is not asked twice for
everything. Source: J. Dean, L. A. Barroso, "The Tail at Scale", Communications of the ACM 56(2), 2013.
"""

from __future__ import annotations

import errno
import threading
import time
from bisect import bisect_left, insort
from collections import deque

SEGMENT_BYTES = 1 << 20

_NUM_REMEMBERED = 128
_NUM_ENOUGH = 16
_QUANTILE = 0.95
_TIMES_QUANTILE = 2.0
# Below these the noise of a busy machine looks like lateness; a cut costs more than a second request.
_HEAD_NOT_BEFORE_SECONDS = 0.1
_SEGMENT_NOT_BEFORE_SECONDS = 0.5
_UNTIL_KNOWN_SECONDS = 2.0
_FIRST_CREDIT = 4.0
_LARGEST_CREDIT = 16.0


class Latencies:
    """What one step took in recent requests; safe to call from many threads.

    Args:
        not_before_seconds: Nothing is late before that.
    """

    def __init__(self, *, not_before_seconds: float) -> None:
        self._not_before_seconds = not_before_seconds
        self._recent: deque[float] = deque()
        self._in_order: list[float] = []
        self._lock = threading.Lock()
        self._late_after_seconds = _UNTIL_KNOWN_SECONDS

    def observe(self, seconds: float) -> None:
        """One more request took so long, or longer."""
        with self._lock:
            if len(self._recent) == _NUM_REMEMBERED:
                del self._in_order[bisect_left(self._in_order, self._recent.popleft())]
            self._recent.append(seconds)
            insort(self._in_order, seconds)
            if len(self._in_order) >= _NUM_ENOUGH:
                usual = self._in_order[int(_QUANTILE * len(self._in_order))]
                self._late_after_seconds = max(self._not_before_seconds, _TIMES_QUANTILE * usual)

    @property
    def late_after_seconds(self) -> float:
        """What takes longer is late."""
        return self._late_after_seconds


class Hedging:
    """The budget of extra requests of one storage, and what it knows about lateness; safe to call from many threads.

    Attributes:
        heads: Seconds from a request to the head of its answer.
        segments: Seconds of the slowest `SEGMENT_BYTES` of each body.

    Args:
        max_fraction: Extra requests for each request, over some time; 0 turns hedging off.
    """

    def __init__(self, *, max_fraction: float) -> None:
        self.heads = Latencies(not_before_seconds=_HEAD_NOT_BEFORE_SECONDS)
        self.segments = Latencies(not_before_seconds=_SEGMENT_NOT_BEFORE_SECONDS)
        self._max_fraction = max_fraction
        self._credit = _FIRST_CREDIT if max_fraction else 0.0
        self._lock = threading.Lock()

    def earn(self) -> None:
        """An ordinary request is sent."""
        with self._lock:
            self._credit = min(_LARGEST_CREDIT, self._credit + self._max_fraction)

    def spend(self) -> bool:
        """Whether one extra request may be sent now."""
        with self._lock:
            if self._credit < 1:
                return False
            self._credit -= 1
            return True


class LateBodyError(TimeoutError):
    """A segment of a body is late, and asking for the rest elsewhere is within the budget."""


class SegmentClock:
    """How long the segments of one body may take; used by one thread.

    A segment may take `timeout_seconds`; one that is late ends the body if the budget allows.

    Attributes:
        due: When the segment is late, by the monotonic clock.
    """

    def __init__(self, *, timeout_seconds: float, hedging: Hedging) -> None:
        self._timeout_seconds = timeout_seconds
        self._hedging = hedging
        self._slowest_seconds = 0.0
        self._began = self.due = 0.0
        self._is_late = False

    def begin(self) -> float:
        """A segment begins; how long its receiver may wait."""
        limit_seconds = min(self._timeout_seconds, self._hedging.segments.late_after_seconds)
        self._began = time.monotonic()
        self.due = self._began + limit_seconds
        self._is_late = False
        return limit_seconds

    def extend(self) -> float:
        """The segment is late; how much longer its receiver may wait.

        Raises:
            LateBodyError: No longer: the rest may be asked for again.
            TimeoutError: It has been late for too long.
        """
        waited_seconds = time.monotonic() - self._began
        if not self._is_late and self._hedging.spend():
            raise LateBodyError(errno.ETIMEDOUT, f"a segment is late after {waited_seconds:.3g} s")
        self._is_late = True
        self.due = self._began + self._timeout_seconds
        if waited_seconds >= self._timeout_seconds:
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"less than {SEGMENT_BYTES >> 20} MiB of a body in {self._timeout_seconds:g} s (stall_timeout_seconds)",
            )
        return self._timeout_seconds - waited_seconds

    def end(self) -> None:
        """The segment has landed."""
        self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - self._began)

    def end_body(self) -> None:
        """The whole body has landed: what its slowest segment took is how long others may take."""
        self._hedging.segments.observe(self._slowest_seconds)
