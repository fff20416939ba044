"""When did what happen to each block? The clock readings of one rank's load, in columns; all its figures are sums of them.

    QUEUED      a reader thread takes the block up, and waits for a slot
    ASKED       storage is asked for it
    FIRST_BYTE  the storage says that its bytes begin to come
    LAST_BYTE   all of it is there
    ANNOUNCED   it is offered to neighbours; on the ranks that they are: the offer has come
    TAKEN       this rank begins to copy its part
    LANDED      this rank's part is in its tensors

A column has one number for each block of the node's plan, 0 where the step was not taken, or not yet. So the memory is known
before the first read, and a step costs one reading of the clock and one store. Threads write to different blocks, so nothing is
locked. The clock is the monotonic one, which all processes of a machine share.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ray_streamer.rank.block_source import Way


class Step(IntEnum):
    """What happens to a block; the row of its times in `Spans.times`."""

    QUEUED = 0
    ASKED = 1
    FIRST_BYTE = 2
    LAST_BYTE = 3
    ANNOUNCED = 4
    TAKEN = 5
    LANDED = 6


class Phase(NamedTuple):
    """A part of a load, by the monotonic clock; `stop` is 0 while it lasts."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """What happened to the blocks of one rank; what a running load shows goes on growing.

    Attributes:
        times: Seconds of the monotonic clock by step and block, shape (number of steps, number of blocks); 0 = not taken.
        ways: `Way` by which each block came; 0 = it did not.
        landed_bytes: Bytes of this rank's tensors that each block brought.
        taken_bytes: Bytes of the block that these were made of; others where a dtype changes.
        touch_seconds: Seconds in which fresh memory of the tensors was brought in for each block; 0 on a GPU.
        phases: Parts of the load, in order.
    """

    times: NDArray[np.float64]
    ways: NDArray[np.uint8]
    landed_bytes: NDArray[np.int64]
    taken_bytes: NDArray[np.int64]
    touch_seconds: NDArray[np.float32]
    phases: tuple[Phase, ...]

    def reached(self, step: Step) -> NDArray[np.bool_]:
        """Which blocks have come as far as `step`."""
        return self.times[step] > 0

    def seconds_between(self, first: Step, last: Step) -> float:
        """Seconds from one step to another, over all blocks that took both; to the microsecond."""
        times = self.times
        took_both = (times[first] > 0) & (times[last] > 0)
        return round(float((times[last] - times[first])[took_both].sum()), 6)

    def seconds_in(self, phase: str) -> float:
        """Seconds of a phase; 0 before its end."""
        return round(sum(each.stop - each.start for each in self.phases if each.name == phase and each.stop), 6)


class Recorder:
    """Takes down what one rank's load does; safe to use from many threads.

    Args:
        num_blocks: Of the node's plan.

    Attributes:
        cpu_seconds: User and system seconds of the process during the load; 0 before its end.
    """

    def __init__(self, num_blocks: int) -> None:
        self._times = np.zeros((len(Step), num_blocks), dtype=np.float64)
        self._columns = tuple(self._times)
        self._ways = np.zeros(num_blocks, dtype=np.uint8)
        self._landed_bytes = np.zeros(num_blocks, dtype=np.int64)
        self._taken_bytes = np.zeros(num_blocks, dtype=np.int64)
        self._touch_seconds = np.zeros(num_blocks, dtype=np.float32)
        self._phases: list[Phase] = []
        self.cpu_seconds = 0.0

    def mark(self, step: Step, block: int) -> None:
        """A step of a block is taken now."""
        self._columns[step][block] = time.perf_counter()

    def came(self, way: Way, block: int) -> None:
        """A block came by `way`."""
        self._ways[block] = way

    def landed(self, block: int, num_bytes: int, *, taken_bytes: int, touch_seconds: float = 0.0) -> None:
        """A block has brought so many bytes to this rank's tensors, now; the first touch of their memory took so long."""
        self._landed_bytes[block] = num_bytes
        self._taken_bytes[block] = taken_bytes
        self._touch_seconds[block] = touch_seconds
        self.mark(Step.LANDED, block)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """For the length of the block the load is in a phase."""
        position, start = len(self._phases), time.perf_counter()
        self._phases.append(Phase(name, start, 0.0))
        try:
            yield
        finally:
            self._phases[position] = Phase(name, start, time.perf_counter())

    @contextmanager
    def cpu_counted(self) -> Iterator[None]:
        """For the length of the block the load uses the CPU."""
        before = time.process_time()
        try:
            yield
        finally:
            self.cpu_seconds = round(time.process_time() - before, 6)

    def spans(self) -> Spans:
        """What happened so far."""
        columns = (self._times, self._ways, self._landed_bytes, self._taken_bytes, self._touch_seconds)
        return Spans(*columns, tuple(self._phases))
