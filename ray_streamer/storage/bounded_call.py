"""How long may a call take that has no timeout of its own: a look-up of a name, a search for credentials?"""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from ray_streamer.errors import CredentialsError, RayStreamerError
from ray_streamer.process_limits import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Result = TypeVar("_Result")
# What libraries raise over files and answers that have not the form, or the numbers, that they expect.
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def call_within(seconds: float, call: Callable[[], _Result], *, what: str) -> _Result:
    """What `call` returns, or raises, if it does within so long.

    It runs in a thread of its own. When time is up that thread is left behind, since nothing could end it; it does not keep
    the process from ending.

    Raises:
        TimeoutError: It did not; says that there is no `what` yet.
        BudgetError: The system refuses a thread.
    """
    outcomes: SimpleQueue[tuple[_Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((call(), None))
        except BaseException as error:
            outcomes.put((None, error))

    start_thread(threading.Thread(target=run, name="bounded-call", daemon=True))
    try:
        result, error = outcomes.get(timeout=seconds)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no {what} in {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class OneAtATime:
    """Lets one thread look for credentials; the others wait, and hear of its failure instead of repeating it one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_failures = 0
        self._failure: RayStreamerError | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The block of one thread at a time.

        Raises:
            RayStreamerError: That of another thread's block, which ended while this thread waited.
        """
        num_failures = self._num_failures
        with self._lock:
            if self._failure is not None and num_failures != self._num_failures:
                # Another one for each thread: where it was raised is written into it.
                raise type(self._failure)(str(self._failure))
            try:
                yield
            except RayStreamerError as error:
                self._num_failures += 1
                self._failure = error
                raise


def find_credentials(
    library: str, find: Callable[[], _Result], *, seconds: float, refusals: tuple[type[Exception], ...], advice: str
) -> _Result:
    """The credentials that `library` finds, or renews, by calling `find`.

    Args:
        library: Its name.
        find: Asks it.
        seconds: How long that may take: `credentials_timeout_seconds`.
        refusals: Its own errors.
        advice: How to tell it who asks.

    Raises:
        CredentialsError: It found none, or none in time.
    """
    try:
        return call_within(seconds, find, what="credentials")
    except RayStreamerError:
        raise
    except TimeoutError:
        raise CredentialsError(
            f"{library} found no credentials in {seconds:g} s (credentials_timeout_seconds); {advice}"
        ) from None
    except (*refusals, OSError, *_MALFORMED) as error:
        # Not from the error, which may quote answers with tokens in them.
        raise CredentialsError(f"{library} has no credentials ({type(error).__name__}): {advice}") from None
