"""Which rank does a piece of work that only one of them should do? The one that locks its numbers in a memory file that all share.

The locks are the kernel's (open file description locks, fcntl(2)): no two ranks hold the same number, and those of a process that
ends are free again. A number is a position in the file and needs no memory there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading

from ray_streamer.process_limits import limits_explained

# From Linux's fcntl.h; Python names it only where it was built against new headers.
_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi0q")


class Claims:
    """This rank's claims; safe to use from many threads, which exclude each other as well.

    Args:
        fd: The file; stays the caller's. Descriptors of one file that were passed between ranks share their locks, so the file is
            opened once more here.

    Raises:
        BudgetError: The process may open no more files.
    """

    def __init__(self, fd: int) -> None:
        self._lock = threading.Lock()
        self._mine: set[int] = set()
        with limits_explained("lock memory that ranks share"):
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def take(self, first: int, stop: int) -> bool:
        """Claims the numbers from `first` to `stop`, all of them or none; False when one of them is somebody else's."""
        numbers = range(first, stop)
        with self._lock:
            if not self._mine.isdisjoint(numbers):
                return False
            try:
                self._set(fcntl.F_WRLCK, first, stop)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return False
                raise
            self._mine.update(numbers)
            return True

    def give_back(self, first: int, stop: int) -> None:
        """Lets go of numbers that were claimed."""
        with self._lock:
            self._mine.difference_update(range(first, stop))
            self._set(fcntl.F_UNLCK, first, stop)

    def close(self) -> None:
        """Lets go of everything."""
        os.close(self._fd)

    def _set(self, kind: int, first: int, stop: int) -> None:
        fcntl.fcntl(self._fd, _OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, stop - first, 0))
