"""Through what memory does O_DIRECT read? Through a few huge pages of its own, from which every piece is copied to its place.

A disk is told each page of memory by itself, and a request holds a bounded number of them: 254 on virtio, the disk of most virtual
machines. In huge pages (2 MiB) a request is as long as the disk allows; in pages of 4 KiB it is 1 MiB at most, and the disk works
through hundreds of addresses for it. Staging memory that processes share, and the tensors themselves, are pages of 4 KiB.
See `docs/decisions/0038-direct-reads-through-huge-pages.md`.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BUFFER_BYTES = 2 << 20
"""One huge page."""

MAX_BUFFERS = 4
"""As many reads in flight keep a disk busy, each of 2 MiB."""


class DirectBuffers:
    """Buffers that reads borrow, made when first needed; safe to use from many threads.

    Args:
        num_readers: Threads that read.
    """

    def __init__(self, num_readers: int) -> None:
        self._most = min(MAX_BUFFERS, num_readers)
        self._num_made = 0
        self._free: list[memoryview] = []
        self._changed = threading.Condition()

    def limit(self, num_bytes: int) -> int:
        """Lets the buffers take so much memory at most; how much they will take. Called before they are used."""
        with self._changed:
            self._most = min(self._most, num_bytes // BUFFER_BYTES)
            return self._most * BUFFER_BYTES

    @property
    def made_bytes(self) -> int:
        """Memory that the buffers took."""
        return self._num_made * BUFFER_BYTES

    @contextmanager
    def borrow(self) -> Iterator[memoryview | None]:
        """A buffer for the length of the block; waits while others read into all of them.

        None where there are none: the limit or the system allows none, or they were closed.
        """
        buffer = self._take()
        try:
            yield buffer
        finally:
            if buffer is not None:
                with self._changed:
                    if self._most:
                        self._free.append(buffer)
                    self._changed.notify()

    def close(self) -> None:
        """Gives the memory back; what is borrowed, when it is let go of."""
        with self._changed:
            self._most = 0
            self._free = []
            self._changed.notify_all()

    def _take(self) -> memoryview | None:
        with self._changed:
            while self._most:
                if self._free:
                    return self._free.pop()
                if self._num_made < self._most:
                    try:
                        buffer = _huge_page()
                    except OSError:
                        # A limited address space: with fewer of them, or without.
                        self._most = self._num_made
                        continue
                    self._num_made += 1
                    return buffer
                self._changed.wait()
            return None


def _huge_page() -> memoryview:
    """Private memory that is one huge page, where the system has them.

    Raises:
        OSError: The system refuses it.
    """
    mapping = mmap.mmap(-1, 2 * BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    first = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % BUFFER_BYTES
    # What lies before and behind is never touched.
    return memoryview(mapping)[first : first + BUFFER_BYTES]
