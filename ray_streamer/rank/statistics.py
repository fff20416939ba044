"""What did one rank do? Counters while it loads, frozen snapshots for everybody else."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.storage.base import StorageStatistics

PHASES = ("connect", "stream", "finish")
COUNTED = ("bytes_read", "page_cache_bytes", "direct_bytes", "num_requests")
TIMED = ("wait_seconds", "read_seconds", "copy_seconds", "cpu_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatistics:
    """A snapshot of one rank's load.

    Attributes:
        rank: Global rank.
        seconds: Wall seconds by phase: `connect` (arena and neighbours), `stream` (reads and copies), `finish` (waiting for
            neighbours to take what they want).
        bytes_read: Bytes that this rank requested from storage.
        page_cache_bytes: Bytes copied out of mappings of files that were in the page cache; no part of `bytes_read`.
        bytes_delivered: Bytes written to this rank's tensors.
        bytes_to_deliver: What `bytes_delivered` will be at the end.
        direct_bytes: Of `bytes_read`, what landed in a tensor without staging.
        num_requests: Storage requests.
        peak_staging_bytes: Most staging memory in use at once.
        memory_limit: Staging memory that this rank was allowed.
        wait_seconds: Seconds that reader threads waited for a free slot, summed over threads.
        read_seconds: Seconds that reader threads spent in storage, summed over threads.
        copy_seconds: Seconds spent in copies, summed over threads; on a GPU, in queueing them.
        cpu_seconds: User and system seconds of the process during the load.
        storage: What it took to get the bytes: retries, second requests and the like.
    """

    rank: int
    seconds: dict[str, float]
    bytes_read: int
    page_cache_bytes: int
    bytes_delivered: int
    bytes_to_deliver: int
    direct_bytes: int
    num_requests: int
    peak_staging_bytes: int
    memory_limit: int
    wait_seconds: float
    read_seconds: float
    copy_seconds: float
    cpu_seconds: float
    storage: StorageStatistics

    @classmethod
    def of(cls, counters: Counters, storage: StorageStatistics, **known: int) -> RankStatistics:
        """A snapshot of `counters`, with the fields that are kept elsewhere."""
        return cls(
            seconds={phase: counters.seconds(phase) for phase in PHASES},
            **{name: counters.total(name) for name in COUNTED},
            **{name: counters.seconds(name) for name in TIMED},
            **known,
            storage=storage,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def process_cpu_seconds() -> float:
    """User and system seconds of this process so far."""
    times = os.times()
    return times.user + times.system


class Counters:
    """Named sums that many threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Adds to each named sum."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] = self._sums.get(name, 0) + amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the wall seconds of the block to sum `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - started})

    def total(self, name: str) -> int:
        """A sum of whole numbers."""
        return int(self._sums.get(name, 0))

    def seconds(self, name: str) -> float:
        """A sum of seconds, to the microsecond."""
        return round(self._sums.get(name, 0.0), 6)
