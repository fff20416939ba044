"""How fast may bytes come? Receivers pay for what has landed by waiting; the network then slows the sender down."""

from __future__ import annotations

import threading
import time


class Bandwidth:
    """A common rate of all threads of one storage.

    Args:
        bytes_per_second: The rate; None for no limit.
        closing: Ends every wait when it is set.
    """

    def __init__(self, bytes_per_second: float | None, closing: threading.Event) -> None:
        self._bytes_per_second = bytes_per_second
        self._closing = closing
        self._lock = threading.Lock()
        self._paid_until = 0.0

    def pay(self, num_bytes: int) -> None:
        """Wait for as long as these bytes should have taken, after everybody else's."""
        if self._bytes_per_second is None:
            return
        now = time.monotonic()
        with self._lock:
            self._paid_until = max(self._paid_until, now) + num_bytes / self._bytes_per_second
            delay_seconds = self._paid_until - now
        self._closing.wait(delay_seconds)
