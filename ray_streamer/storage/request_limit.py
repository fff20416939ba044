"""How many requests may be under way at once? As many as the user allows, fewer while the store asks to slow down.

The limit falls by a fifth when an answer says so, at most once for the requests that were under way together, and climbs by
two for each limit's worth of answers that do not. Source of the shape: D.-M. Chiu, R. Jain, "Analysis of the Increase and
Decrease Algorithms for Congestion Avoidance in Computer Networks", Computer Networks and ISDN Systems 17(1), 1989.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_DECREASE = 0.8
_INCREASE = 2.0


class Turn(NamedTuple):
    """A request that may be sent.

    Attributes:
        number: For `RequestLimit.fall`.
        held_seconds: How long it waited because the store had asked to slow down.
    """

    number: int
    held_seconds: float


class RequestLimit:
    """Lets requests through; shared by all threads of one storage.

    Args:
        max_requests: Never more than so many at once.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._allowed = float(max_requests)
        self._num_under_way = 0
        self._num_begun = 0
        self._num_begun_at_fall = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def num_allowed(self) -> int:
        """Requests that may be under way now."""
        return int(self._allowed)

    @contextmanager
    def admit(self) -> Iterator[Turn]:
        """Wait for a turn, which lasts as long as the block."""
        held_seconds = 0.0
        with self._changed:
            if self.num_allowed <= self._num_under_way < self._max_requests:
                began = perf_counter()
                self._wait_for_room()
                held_seconds = perf_counter() - began
            else:
                self._wait_for_room()
            self._num_under_way += 1
            self._num_begun += 1
            number = self._num_begun
        try:
            yield Turn(number, held_seconds)
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify()

    def _wait_for_room(self) -> None:
        self._changed.wait_for(lambda: self._num_under_way < self.num_allowed or self._is_closed)

    def fall(self, number: int) -> None:
        """The store asked to slow down, in answer to this request."""
        with self._changed:
            # Answers to requests from before the last fall say nothing new.
            if number > self._num_begun_at_fall:
                self._num_begun_at_fall = self._num_begun
                self._allowed = max(1.0, self._allowed * _DECREASE)

    def climb(self) -> None:
        """The store answered."""
        with self._changed:
            if self._allowed < self._max_requests:
                self._allowed = min(self._max_requests, self._allowed + _INCREASE / self._allowed)
                self._changed.notify()

    def close(self) -> None:
        """Let everybody through: what they ask then fails by itself."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
