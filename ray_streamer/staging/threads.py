"""Who does the work? A few threads over one list of tasks; the first error ends the load."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from ray_streamer.process_limits import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray_streamer.staging.stop import StopSignal

Task = TypeVar("Task")


class TaskThreads(Generic[Task]):
    """Threads that take tasks in order until there are none, or until the load is over.

    They run for the length of a `with` block, whose end waits for them; an exception that leaves the block ends the load first.
    A thread that cannot be started is a `BudgetError`, and ends those that were.

    Args:
        name: Prefix of the threads' names.
        num_threads: Threads to start.
        tasks: Taken one at a time under a lock; its iterator may wait for tasks to appear.
        work: Called with each task; an exception ends the load.
        stop: Looked at before each task.
    """

    def __init__(
        self, name: str, num_threads: int, tasks: Iterable[Task], work: Callable[[Task], None], stop: StopSignal
    ) -> None:
        self._tasks = iter(tasks)
        self._work = work
        self._stop = stop
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]

    def __enter__(self) -> Self:
        try:
            for thread in self._threads:
                start_thread(thread)
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._end(error)

    def _run(self) -> None:
        try:
            while not self._stop.is_set:
                with self._lock:
                    task = next(self._tasks, None)
                if task is None:
                    return
                self._work(task)
        except BaseException as error:
            self._stop.set(error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._stop.set(error)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
