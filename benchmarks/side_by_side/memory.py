"""How much memory do ranks take? Anonymous memory of their processes, and shared memory that they created, sampled."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

SAMPLE_SECONDS = 0.02
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system


class PeakMemory:
    """Samples the memory of processes while a block runs.

    Pages of the page cache do not count, mapped or not. Shared memory (memfd, /dev/shm) counts once, however many processes map it.

    Attributes:
        baseline_bytes: When it was made.
        peak_bytes: The largest sample.
    """

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.baseline_bytes = self.peak_bytes = self._now()

    @property
    def added_bytes(self) -> int:
        """What came on top of the baseline."""
        return self.peak_bytes - self.baseline_bytes

    def _now(self) -> int:
        return sum(map(_anonymous_bytes, self._pids)) + _shared_bytes(self._pids)

    def _sample(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._now())


def _anonymous_bytes(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def _shared_bytes(pids: list[int]) -> int:
    sizes: dict[tuple[int, int], int] = {}
    for pid in pids:
        # A process that has just ended has none.
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if os.readlink(entry.path).startswith(("/memfd:", "/dev/shm/")):
                        found = os.stat(entry.path)
                        sizes[found.st_dev, found.st_ino] = found.st_blocks * _BLOCK_BYTES
    return sum(sizes.values())
