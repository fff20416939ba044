"""Is this file in the page cache already?

The kernel counts the pages where it is willing to (`cachestat`, Linux 6.5, for files that the caller owns or may write).
Where it is not, one byte is read at about 64 places with RWF_NOWAIT, which says no rather than wait for a disk. `mincore`
cannot be asked: since Linux 5.2 it calls every page of a file resident that one may not write.

Reading is not free of side effects: a refused read starts the disk on that page, and on as many behind it as the kernel
cares to read ahead. So it is done through a descriptor that is declared random, for which nothing is read ahead, at random
places, and ends as soon as the answer is certain. A disk that is faster than the call that asks it can still pass for memory.
"""

from __future__ import annotations

import ctypes
import os
import random
from contextlib import suppress

from ray_streamer.extent import PAGE_BYTES, Extent

_COUNTED_WHOLE_BYTES = 64 << 20
_WINDOW_BYTES = 1 << 20
_STEP_BYTES = 8 << 20
"""Of larger files one window in each step is counted: to count all their pages would take longer than to plan a load."""

_NUM_SAMPLES = 64
_ALLOWED_MISSES = _NUM_SAMPLES // 10

_SYS_CACHESTAT = 451  # of every architecture; the C library has no function for it yet
_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
_syscall.restype = ctypes.c_long


class _Range(ctypes.Structure):
    """`struct cachestat_range`."""

    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    """`struct cachestat`, in pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def is_page_cached(descriptor: int, size_bytes: int) -> bool:
    """Whether at least nine tenths of an open file are in memory; False where the system does not say."""
    num_cached = num_counted = 0
    for window in _counted_windows(size_bytes):
        num_in_memory = count_cached_pages(descriptor, window)
        if num_in_memory is None:
            return seems_page_cached(descriptor, size_bytes)
        num_cached += num_in_memory
        num_counted += _num_pages(window.num_bytes)
    return 10 * num_cached >= 9 * num_counted


def _counted_windows(size_bytes: int) -> list[Extent]:
    if size_bytes <= _COUNTED_WHOLE_BYTES:
        return [Extent(0, size_bytes)]
    return [Extent(start, min(start + _WINDOW_BYTES, size_bytes)) for start in range(0, size_bytes, _STEP_BYTES)]


def count_cached_pages(descriptor: int, window: Extent) -> int | None:
    """How many pages of a part of an open file are in memory; None where the kernel does not tell this process."""
    counts = _Counts()
    asked = _Range(window.start, window.num_bytes)
    refused = _syscall(_SYS_CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(counts), 0)
    return None if refused else counts.cached


def seems_page_cached(descriptor: int, size_bytes: int) -> bool:
    """The same by sampling; an answer that is likely, not certain."""
    with suppress(OSError):
        # By descriptor: the path may lead to another file by now.
        asking = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(asking, 0, 0, os.POSIX_FADV_RANDOM)
            return _few_refuse(asking, _num_pages(size_bytes))
        finally:
            os.close(asking)
    return False


def _few_refuse(descriptor: int, num_pages: int) -> bool:
    num_samples = min(_NUM_SAMPLES, num_pages)
    allowed_misses = _ALLOWED_MISSES * num_samples // _NUM_SAMPLES
    byte = bytearray(1)
    num_misses = 0
    for sample in range(num_samples):
        page = random.randrange(sample * num_pages // num_samples, (sample + 1) * num_pages // num_samples)
        try:
            os.preadv(descriptor, [byte], page * PAGE_BYTES, os.RWF_NOWAIT)
        except BlockingIOError:
            num_misses += 1
        if num_misses > allowed_misses:
            return False
    return True


def _num_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES)
