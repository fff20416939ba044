"""Whose turn is it? Calls that change what the ranks of a model hold run one after the other, whatever threads make them."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.cluster.waiting import SLOW_START_SECONDS, News
from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

# Between two looks whether anybody still wants what is waited for.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class _Call:
    """A call that has, or wants, the turn.

    Attributes:
        doing: Its name.
        thread: Who makes it.
    """

    doing: str
    thread: threading.Thread = field(default_factory=threading.current_thread)


class Turns:
    """Gives the turn to one call at a time."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._call: _Call | None = None

    @contextmanager
    def turn(self, doing: str, *, look: Callable[[], object]) -> Iterator[None]:
        """Waits until no other call has the turn; it is this one's for the length of the block.

        An interrupt of the wait or of the block gives the turn to the next.

        Args:
            doing: The name of the call.
            look: Called twice a second while this waits; what it raises ends the wait.

        Raises:
            ClusterError: A call of this thread has the turn, and so could never end.
        """
        call = _Call(doing)
        try:
            self._take(call, look)
            yield
        finally:
            with self._condition:
                if self._call is call:
                    self._call = None
                    self._condition.notify()

    def _take(self, call: _Call, look: Callable[[], object]) -> None:
        news = News(SLOW_START_SECONDS)
        with self._condition:
            while (other := self._call) is not None:
                if other.thread is call.thread:
                    raise ClusterError(
                        f"{call.doing} is called in the middle of {other.doing}, as from its on_progress; call it when that has ended"
                    )
                self._condition.wait(_LOOK_SECONDS)
                look()
                if news.is_due():
                    logger.warning(
                        "%s has waited for %.0f s: %s is under way in thread %s",
                        call.doing,
                        news.waited_seconds,
                        other.doing,
                        other.thread.name,
                    )
            self._call = call
