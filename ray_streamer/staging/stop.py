"""How do all threads of a rank learn that the load is over? One flag, first failure wins."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ray_streamer.staging.error_frames import clear_frames

if TYPE_CHECKING:
    from collections.abc import Callable


class StopSignal:
    """Set once, with the error that ended the load; threads look at it between steps and waiters are woken by it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._wakers: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        """Whether the load failed or was aborted."""
        return self._error is not None

    @property
    def error(self) -> BaseException | None:
        """The first failure; None while all is well."""
        return self._error

    def set(self, error: BaseException) -> None:
        """Ends the load with `error`; later errors are consequences of the first and are dropped, and what they hold with them."""
        with self._lock:
            first, wakers = self._error, list(self._wakers)
            if first is None:
                self._error = error
        if first is not None:
            if first is not error:
                # Frames that refer to their own error would keep staging memory mapped until the garbage collector runs.
                clear_frames(error)
            return
        for wake in wakers:
            wake()

    def on_set(self, wake: Callable[[], None]) -> None:
        """Calls `wake` when the signal is set, at once if it is already; `wake` must not block."""
        with self._lock:
            if self._error is None:
                self._wakers.append(wake)
                return
        wake()

    def condition(self) -> threading.Condition:
        """A condition whose waiters wake when the signal is set, so that they look at it once more."""
        changed = threading.Condition()

        def wake() -> None:
            with changed:
                changed.notify_all()

        self.on_set(wake)
        return changed

    def forget(self, wake: Callable[[], None]) -> None:
        """Calls `wake` no more."""
        with self._lock:
            if wake in self._wakers:
                self._wakers.remove(wake)

    def check(self) -> None:
        """Raises the error that ended the load, if one did."""
        if self._error is not None:
            raise self._error
