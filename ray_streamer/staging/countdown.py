"""How does a thread wait until others have done their work? For a number that falls to zero, or an error that ends the load."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_streamer.staging.stop import StopSignal


class Countdown:
    """Counts finished pieces of work down to zero.

    Args:
        stop: Ends the waiting when the load fails.
    """

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._num_left = 0
        self._changed = stop.condition()

    def start(self, num_left: int) -> None:
        """Sets the number, before anybody counts."""
        self._num_left = num_left

    def count(self) -> None:
        """One less."""
        with self._changed:
            self._num_left -= 1
            if not self._num_left:
                self._changed.notify_all()

    def wait(self) -> None:
        """Waits for zero.

        Raises:
            BaseException: The error that ended the load instead.
        """
        with self._changed:
            while self._num_left:
                self._stop.check()
                self._changed.wait()
