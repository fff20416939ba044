"""Which blocks can this rank copy without a read of its own? Those that neighbours offer, and those of mapped files."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ray_streamer.staging.stop import StopSignal


class Inbox:
    """An iterator of numbers of blocks, offered ones first since they hold a neighbour's memory.

    Offers may come before `open` says what to expect; nothing is taken out before.

    Args:
        stop: Ends the waiting for offers.
    """

    def __init__(self, stop: StopSignal) -> None:
        self._mapped: Iterator[int] = iter(())
        self._num_awaited = 0
        self._offered: deque[int] = deque()
        self._changed = stop.condition()
        self._stop = stop

    def open(self, mapped: Iterable[int], num_offered: int) -> None:
        """Says what will be taken out: blocks of mapped files, and how many blocks neighbours will offer."""
        self._mapped = iter(mapped)
        self._num_awaited = num_offered

    def put(self, block: int) -> None:
        """A neighbour offers a block."""
        with self._changed:
            self._offered.append(block)
            self._changed.notify()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        with self._changed:
            while True:
                if self._offered:
                    self._num_awaited -= 1
                    if not self._num_awaited:
                        self._changed.notify_all()
                    return self._offered.popleft()
                mapped = next(self._mapped, None)
                if mapped is not None:
                    return mapped
                if not self._num_awaited or self._stop.is_set:
                    raise StopIteration
                self._changed.wait()
