"""What is left to copy that this rank does not read? Blocks that neighbours announce, and blocks of mapped files."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ray_streamer.stream.stop import StopSignal


class Announced(NamedTuple):
    """A block that lies in a neighbour's arena."""

    owner: int
    block: int
    slot: int


class Inbox:
    """An iterator of copies to make, announced ones first since they hold a neighbour's memory.

    Announcements may come before `open` says what to expect; nothing is taken out before.

    Args:
        stop: Ends the waiting for announcements.
    """

    def __init__(self, stop: StopSignal) -> None:
        self._viewed: Iterator[int] = iter(())
        self._num_awaited = 0
        self._announced: deque[Announced] = deque()
        self._changed = threading.Condition()
        self._stop = stop
        stop.on_set(self._wake)

    def open(self, viewed: Iterable[int], num_announced: int) -> None:
        """Says what will be taken out: blocks of mapped files, and how many blocks neighbours will announce."""
        self._viewed = iter(viewed)
        self._num_awaited = num_announced

    def announce(self, owner: int, block: int, slot: int) -> None:
        """Takes note of a neighbour's block."""
        with self._changed:
            self._announced.append(Announced(owner, block, slot))
            self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Announced | int:
        with self._changed:
            while True:
                if self._announced:
                    self._num_awaited -= 1
                    if not self._num_awaited:
                        self._changed.notify_all()
                    return self._announced.popleft()
                viewed = next(self._viewed, None)
                if viewed is not None:
                    return viewed
                if not self._num_awaited or self._stop.is_set:
                    raise StopIteration
                self._changed.wait()
