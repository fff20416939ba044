"""What did it take to get the bytes? Counts of one storage that many threads add to."""

from __future__ import annotations

import threading
from collections import Counter

from ray_streamer.storage.base import StorageStatistics


class Tally:
    """Counters by the names of `StorageStatistics`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Add to each named counter."""
        with self._lock:
            self._counts.update(amounts)

    def statistics(self) -> StorageStatistics:
        """The counts as they are now."""
        with self._lock:
            return StorageStatistics(**self._counts)
