"""Where did the time of a load go? Phases that follow each other without a gap, from the call to the last tensor."""

from __future__ import annotations

import time
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Phases:
    """Seconds of each phase; the clock starts when this is made."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._tell: Callable[[str], None] = lambda _: None

    def watch(self, tell: Callable[[str], None]) -> None:
        """Lets `tell` know of each phase that begins."""
        self._tell = tell

    def begin(self, phase: str) -> None:
        """Says which phase comes now, to whoever watches; the clock runs on."""
        self._tell(phase)

    def end(self, phase: str, *, of_which: Mapping[str, float] | None = None) -> None:
        """What passed since the last phase ended, or since the start, belongs to `phase`, less what belongs to others.

        Args:
            phase: Its name.
            of_which: Seconds of phases that passed within it, before the rest.
        """
        now = time.perf_counter()
        rest = now - self._last
        for name, seconds in (of_which or {}).items():
            part = min(seconds, rest)
            self._seconds[name] = self._seconds.get(name, 0.0) + part
            rest -= part
        self._seconds[phase] = self._seconds.get(phase, 0.0) + rest
        self._last = now

    def spans(self) -> tuple[tuple[str, float, float], ...]:
        """Each phase so far with the readings of the clock (`time.perf_counter`) between which it lasted."""
        readings = pairwise(accumulate(self._seconds.values(), initial=self._started))
        return tuple((name, start, stop) for name, (start, stop) in zip(self._seconds, readings, strict=True))

    def seconds(self) -> dict[str, float]:
        """Each phase so far, in order, and their sum as `total`."""
        return self._seconds | {"total": self._last - self._started}
