"""Where did the time of a load go? Phases that follow each other without a gap, from the call to the last tensor."""

from __future__ import annotations

import time


class Phases:
    """Seconds of each phase; the clock starts when this is made."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """What passed since the last phase ended, or since the start, belongs to `phase`."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Each phase so far, in order, and their sum as `total`."""
        return self._seconds | {"total": self._last - self._started}
