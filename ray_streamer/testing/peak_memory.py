"""How much memory do processes take while a block runs? Anonymous memory, and shared memory that they made, sampled from outside.

Pages of the page cache do not count, mapped or not. Shared memory (memfd, /dev/shm) counts once, however many processes map it:
its whole size, touched or not (`mapped_bytes`), or its pages that exist (`allocated_bytes`).
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BLOCK_BYTES = 512
"""Of `st_blocks`, whatever the file system."""


def mapped_bytes(pids: Sequence[int]) -> int:
    """The size of every piece of shared memory that one of the processes maps."""
    sizes: dict[str, int] = {}
    for line in (line for pid in pids for line in _lines(f"/proc/{pid}/maps")):
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if path and path[0].startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV")):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            sizes[inode] = max(stop - start, sizes.get(inode, 0))
    return sum(sizes.values())


def allocated_bytes(pids: Sequence[int]) -> int:
    """The pages of every piece of shared memory that one of the processes has open."""
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


class PeakMemory:
    """Samples the memory of processes for the length of a `with` block.

    Attributes:
        baseline_bytes: When it was made.
        peak_bytes: The largest sample, the one at the end of the block among them.

    Args:
        pids: Of the processes.
        shared_bytes: What counts as their shared memory: `mapped_bytes` or `allocated_bytes`.
        sample_seconds: From one sample to the next.
    """

    def __init__(
        self, pids: Sequence[int], *, shared_bytes: Callable[[Sequence[int]], int], sample_seconds: float = 0.02
    ) -> None:
        self._pids = pids
        self._shared_bytes = shared_bytes
        self._sample_seconds = sample_seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.baseline_bytes = self.peak_bytes = self.now()

    @property
    def added_bytes(self) -> int:
        """What came on top of the baseline."""
        return self.peak_bytes - self.baseline_bytes

    def now(self) -> int:
        """Bytes of all the processes at this moment."""
        return sum(map(_anonymous_bytes, self._pids)) + self._shared_bytes(self._pids)

    def _sample(self) -> None:
        while not self._is_over.wait(self._sample_seconds):
            self.peak_bytes = max(self.peak_bytes, self.now())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self.now())


def _anonymous_bytes(pid: int) -> int:
    return sum(int(line.split()[1]) << 10 for line in _lines(f"/proc/{pid}/status") if line.startswith("RssAnon:"))


def _lines(path: str) -> list[str]:
    """Of a file in /proc; none of a process that has just ended."""
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
