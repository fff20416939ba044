"""Who does the work? A few threads over one list of tasks; the first error ends the load."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray_streamer.stream.stop import StopSignal

Task = TypeVar("Task")


class TaskThreads(Generic[Task]):
    """Threads that take tasks in order until there are none, or until the load is over.

    Args:
        name: Prefix of the threads' names.
        num_threads: Threads to start; none is started when there are none.
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
        for thread in self._threads:
            thread.start()

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

    def join(self) -> None:
        """Waits until every thread has ended."""
        for thread in self._threads:
            thread.join()
