"""What did it take to get the bytes? Counts of one storage that many threads add to, and when things went wrong."""

from __future__ import annotations

import threading
import time
from collections import Counter

from ray_streamer.storage.base import Incident, StorageStatistics
from ray_streamer.storage.slow_address import Body, bodies_from_slow_addresses

_INCIDENTS = {"num_retries": "retry", "num_throttled": "throttled", "num_hedges": "hedge", "num_cuts": "cut"}
"""Counters of which each step is an incident, and its kind."""

_MOST_INCIDENTS = 4000
"""Later ones are counted only."""

_MOST_BODIES = 20_000
"""Bodies whose addresses are remembered."""


class Counters:
    """Counters by the names of `StorageStatistics`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._incidents: list[Incident] = []
        self._bodies: list[Body] = []
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to each named counter."""
        with self._lock:
            self._counts.update(amounts)
            for name in amounts.keys() & _INCIDENTS.keys():
                self._keep(Incident(_INCIDENTS[name], time.perf_counter()))

    def retried(self, path: str, offset: int, lost_seconds: float) -> None:
        """A read goes on with its next attempt now."""
        with self._lock:
            self._counts["num_retries"] += 1
            self._keep(Incident("retry", time.perf_counter(), path, offset, lost_seconds))

    def held(self, path: str, offset: int, lost_seconds: float) -> None:
        """A request is sent now that waited, since the store had asked to slow down."""
        with self._lock:
            self._keep(Incident("held", time.perf_counter(), path, offset, lost_seconds))

    def received(self, body: Body) -> None:
        """A body came, or a part of it."""
        with self._lock:
            if len(self._bodies) < _MOST_BODIES:
                self._bodies.append(body)

    def _keep(self, incident: Incident) -> None:
        if len(self._incidents) < _MOST_INCIDENTS:
            self._incidents.append(incident)

    def statistics(self) -> StorageStatistics:
        """The counts as they are now."""
        with self._lock:
            return StorageStatistics(**self._counts)

    def incidents(self) -> tuple[Incident, ...]:
        """What went wrong so far, in order, and when; then what came from slow addresses."""
        with self._lock:
            incidents, bodies = tuple(self._incidents), tuple(self._bodies)
        return (*incidents, *bodies_from_slow_addresses(bodies))
