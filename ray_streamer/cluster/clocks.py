"""How far is another machine's clock from this one's? Asked a few times; the quickest answer says it best.

An answer was given between the question and its arrival, so the other clock is known to half of that time. Source: D. Mills, "Internet
Time Synchronization: the Network Time Protocol", IEEE Transactions on Communications 39(10), 1991 (the clock filter).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.report.trace import ClockOffset

if TYPE_CHECKING:
    from collections.abc import Callable

_NUM_TRIES = 8


class ClockReading(NamedTuple):
    """The monotonic clock of a machine.

    Attributes:
        boot: Which start of which machine the clock counts from; containers of a machine share it.
        seconds: What it shows.
    """

    boot: str
    seconds: float


def read_clock() -> ClockReading:
    """This machine's, now."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ClockReading(boot, time.perf_counter())


def measure_offset(ask: Callable[[], ClockReading]) -> ClockOffset:
    """Compares a clock with this machine's.

    Args:
        ask: Reads the other clock, over there.
    """
    boot = read_clock().boot
    offsets: list[ClockOffset] = []
    for _ in range(_NUM_TRIES):
        before = time.perf_counter()
        there = ask()
        after = time.perf_counter()
        if there.boot == boot:
            return ClockOffset(0.0, 0.0)
        offsets.append(ClockOffset(there.seconds - (before + after) / 2, (after - before) / 2))
    return min(offsets, key=lambda offset: offset.error_seconds)


def bound_offset(*, sent: float, began: float, ended: float, received: float) -> ClockOffset:
    """Compares another machine's time of day with this one's, after one question: it was there before `began`, and its answer here after `ended`.

    Args:
        sent: When the question left here, by this machine's clock.
        began: When it had come, by the other clock.
        ended: When the answer left there, by the other clock.
        received: When it was here, by this machine's clock.

    >>> bound_offset(sent=100.0, began=160.0, ended=161.0, received=101.5)
    ClockOffset(seconds=59.75, error_seconds=0.25)
    """
    least, most = ended - received, began - sent
    return ClockOffset((least + most) / 2, (most - least) / 2)
