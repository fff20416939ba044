"""How long may a call take that has no timeout of its own: a look-up of a name, a search for credentials?"""

from __future__ import annotations

import errno
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from ray_streamer.errors import AccessError

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")


def call_within(seconds: float, call: Callable[[], _Result], *, what: str) -> _Result:
    """What `call` returns, or raises, if it does within so long.

    It runs in a thread of its own. When time is up that thread is left behind, since nothing could end it; it does not keep
    the process from ending.

    Raises:
        TimeoutError: It did not; says that there is no `what` yet.
    """
    outcomes: SimpleQueue[tuple[_Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((call(), None))
        except BaseException as error:
            outcomes.put((None, error))

    threading.Thread(target=run, name="bounded-call", daemon=True).start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no {what} in {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


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
        AccessError: It found none, or none in time.
    """
    try:
        return call_within(seconds, find, what="credentials")
    except TimeoutError:
        raise AccessError(
            f"{library} found no credentials in {seconds:g} s (credentials_timeout_seconds); {advice}"
        ) from None
    except (*refusals, OSError, ValueError, KeyError, TypeError) as error:
        # Not from the error, which may quote answers with tokens in them.
        raise AccessError(f"{library} has no credentials ({type(error).__name__}): {advice}") from None
