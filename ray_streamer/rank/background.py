"""How does a load run beside whoever takes its tensors, and end when nobody does any more?

    consumer ── take() ──────────────< completed <── load's own threads
      └── order: abandon ──> supervisor ── abort ──> load ── ... ──> everything closed ──> last item

The supervisor is a thread that does nothing but wait for the load's end or for the order to abandon it. So whoever gives the
order need not wait, and takes no lock: it may be the garbage collector, in any thread, in the middle of anything.
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import TYPE_CHECKING

from ray_streamer.errors import LoadAbortedError
from ray_streamer.process_limits import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

Items = list[tuple[str, "torch.Tensor"]]

THREAD_PREFIX = "ray_streamer"
"""Every thread of this package is named so."""

_DROPPED_SECONDS = 5.0
"""How long dropping a stream waits for its end. Only a courtesy: the end comes all the same, and the dropper may hold a lock."""


class BackgroundLoad:
    """A load in threads of its own.

    Args:
        rank: Whose load it is.
        run: Runs the load to its end; raises what ended it.
        abort: Ends it early with an error; may wait.
        close: Closes all that the load used, told of the error that ended it or None; called once, after the load's end.
        completed: Where the load puts tensors as they become complete.
    """

    def __init__(
        self,
        rank: int,
        *,
        run: Callable[[], object],
        abort: Callable[[BaseException], None],
        close: Callable[[BaseException | None], None],
        completed: queue.SimpleQueue[Items | BaseException | None],
    ) -> None:
        self._run, self._abort, self._close = run, abort, close
        self._completed = completed
        self._reason = LoadAbortedError(f"the caller of rank {rank} stopped taking tensors")
        self._orders: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._outcome: BaseException | None = None
        name = f"{THREAD_PREFIX}-{rank}"
        self._worker = threading.Thread(target=self._work, name=name, daemon=True)
        self._supervisor = threading.Thread(target=self._supervise, name=f"{name}-supervisor", daemon=True)
        start_thread(self._supervisor)

    def take(self) -> Items | None:
        """The next tensors, complete; None after the last ones, when everything is closed.

        Raises:
            BaseException: What ended the load.
        """
        items = self._completed.get()
        if items is not None and not isinstance(items, BaseException):
            return items
        self._supervisor.join()
        if items is not None:
            raise items
        return None

    def end(self) -> None:
        """Ends the load early, and waits until everything is closed."""
        self._orders.put(self._reason)
        self._supervisor.join()

    def drop(self) -> None:
        """Ends the load from a finalizer, which may run in one of the load's own threads; waits a little where it may."""
        self._orders.put(self._reason)
        is_own = threading.current_thread().name.startswith(THREAD_PREFIX)
        if not is_own and not sys.is_finalizing():
            self._supervisor.join(_DROPPED_SECONDS)

    def _supervise(self) -> None:
        try:
            start_thread(self._worker)
            order = self._orders.get()
            if order is not None:
                self._abort(order)
            self._worker.join()
        except BaseException as error:
            self._outcome = self._outcome or error
        try:
            self._close(self._outcome)
        except BaseException as error:  # the consumer must hear of the end, whatever becomes of it
            self._outcome = self._outcome or error
        outcome, self._outcome = self._outcome, None
        self._completed.put(outcome)

    def _work(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._outcome = error
        finally:
            self._orders.put(None)
