"""How often, and how long, is one request tried again?

Waits are random between nothing and a bound that doubles (full jitter), so that many ranks that were refused together
do not come back together. Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ray_streamer.errors import StorageError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

_Result = TypeVar("_Result")
_FIRST_BOUND_SECONDS = 0.1
_LAST_BOUND_SECONDS = 10.0


class PassingFault(Exception):
    """A fault that may be gone at the next attempt.

    Attributes:
        message: What happened, where.
        error_class: What it becomes when it does not go away.
        is_worth_one_retry: A second attempt helps at once, or none does.
        retry_after_seconds: The server's own wish: no attempt before that.
    """

    def __init__(
        self,
        message: str,
        *,
        error_class: type[StorageError] = StorageError,
        is_worth_one_retry: bool = False,
        retry_after_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_class = error_class
        self.is_worth_one_retry = is_worth_one_retry
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class RetryEnd:
    """When an operation is not tried again, however few attempts there were.

    Attributes:
        at: A time of `time.monotonic`.
        limit: The setting and its value, for messages.
    """

    at: float
    limit: str


class RetryPolicy:
    """How long one operation may be tried again; the clock starts at its first fault.

    Args:
        deadline_seconds: Attempts begin no later than that after the first fault.
        closing: Ends the waiting when it is set.
        on_retry: Called before each attempt but the first.
        end: Attempts begin no later than that either; None for no such end.
    """

    def __init__(
        self,
        *,
        deadline_seconds: float,
        closing: threading.Event,
        on_retry: Callable[[], None] = lambda: None,
        end: RetryEnd | None = None,
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._closing = closing
        self._on_retry = on_retry
        self._end = end
        self._num_attempts = 0
        self._had_its_one_retry = False
        self._first_fault: float | None = None

    def run(self, attempt: Callable[[], _Result]) -> _Result:
        """Call `attempt` until it returns, and give its result.

        Raises:
            StorageError: The last `PassingFault`, as its own class, when time is up; or the storage was closed; or what
                `attempt` raised. Says how many attempts there were.
        """
        while True:
            try:
                self._num_attempts += 1
                return attempt()
            except PassingFault as fault:
                self._wait_after(fault)
            except StorageError as error:
                raise type(error)(f"{error}; attempt {self._num_attempts}") from error.__cause__
            self._on_retry()

    def _wait_after(self, fault: PassingFault) -> None:
        now = time.monotonic()
        if self._first_fault is None:
            self._first_fault = now
        if self._closing.is_set():
            raise StorageError(f"the storage was closed during a read: {fault.message}") from fault
        self._refuse_after_end(fault, now)
        if fault.is_worth_one_retry:
            if self._had_its_one_retry:
                raise fault.error_class(f"{fault.message}; attempt {self._num_attempts}") from fault
            self._had_its_one_retry = True
            return
        bound_seconds = min(_FIRST_BOUND_SECONDS * 2 ** (self._num_attempts - 1), _LAST_BOUND_SECONDS)
        delay_seconds = max(random.uniform(0, bound_seconds), fault.retry_after_seconds)
        if now + delay_seconds - self._first_fault > self._deadline_seconds:
            raise fault.error_class(
                f"{fault.message}; attempt {self._num_attempts}, {now - self._first_fault:.1f} s after the first fault, "
                f"the next one would be {delay_seconds:.1f} s later, and retry_deadline_seconds is "
                f"{self._deadline_seconds:g}"
            ) from fault
        self._refuse_after_end(fault, now + delay_seconds)
        self._closing.wait(delay_seconds)

    def _refuse_after_end(self, fault: PassingFault, next_at: float) -> None:
        if self._end and next_at > self._end.at:
            raise fault.error_class(
                f"{fault.message}; attempt {self._num_attempts}, and the next one would be later than {self._end.limit} allows"
            ) from fault
