"""Is this memory page-locked yet? Locked on a thread of its own while reads begin, unlocked at the end.

Locking takes a good part of a second for each GiB, so nobody waits for it but the first copy out of that memory. Memory that the system
refuses to lock is copied from all the same, through the driver's own buffer: slower, and said once.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.device.base import address_of
from ray_streamer.errors import DeviceError

if TYPE_CHECKING:
    from ray_streamer.device.cuda_runtime import CudaRuntime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Locking:
    """Memory that is being locked; `locked` tells whether it was."""

    start: int
    stop: int
    locked: Future[bool]


class PageLocks:
    """The page-locked memory of one load; safe to use from many threads.

    Args:
        runtime: Of the device that copies.
    """

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self._lockings: list[_Locking] = []
        self._thread = ThreadPoolExecutor(1, "ray_streamer-page-lock")

    def lock(self, memory: memoryview) -> None:
        """Begins to lock `memory`, which must stay mapped until `close`."""
        if not memory.nbytes:
            return
        start, num_bytes = address_of(np.frombuffer(memory, np.uint8)), memory.nbytes
        locked = self._thread.submit(self._lock, start, num_bytes, is_read_only=memory.readonly)
        self._lockings.append(_Locking(start, start + num_bytes, locked))

    def _lock(self, start: int, num_bytes: int, *, is_read_only: bool) -> bool:
        self._runtime.start()
        try:
            self._runtime.lock_pages(start, num_bytes, is_read_only=is_read_only)
        except DeviceError as error:
            logger.warning(
                "%d bytes of staging memory are not page-locked, copies out of them are slow: %s", num_bytes, error
            )
            return False
        return True

    def wait_for(self, address: int) -> None:
        """Waits until the memory around `address` is locked, or cannot be; returns at once where nobody asked for a lock.

        Raises:
            DeviceError: The device could not be started.
        """
        for locking in self._lockings:
            if locking.start <= address < locking.stop:
                locking.locked.result()
                return

    def close(self) -> None:
        """Unlocks everything; no copy may be under way.

        Raises:
            DeviceError: The first that could not be unlocked; the others are.
        """
        unlockings = [self._thread.submit(self._unlock, locking) for locking in self._lockings]
        self._thread.shutdown()
        self._lockings.clear()
        for unlocking in unlockings:
            unlocking.result()

    def _unlock(self, locking: _Locking) -> None:
        if locking.locked.exception() is None and locking.locked.result():
            self._runtime.unlock_pages(locking.start)
