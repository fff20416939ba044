"""How is one rank called through Ray? By an actor around an ordinary object, which also answers while it works.

`call` runs on the actor's only main thread, one call at a time, for as long as it takes. `facts` and `control` run in a concurrency group
of their own, and so answer while a call is running: this is how a load is watched and aborted. `pulse` has another one, in which nothing
else is ever waited for. The worker is built by a call, not by the actor's constructor: an error in a call keeps its type, where one in a
constructor becomes the text of a dead actor.
"""

from __future__ import annotations

import inspect
import os
import socket
from typing import TYPE_CHECKING, Any

import ray
import ray.util
from ray import cloudpickle

from ray_streamer.cluster.facts import RankFacts
from ray_streamer.errors import ClusterError
from ray_streamer.exchange.peer import PeerProcess
from ray_streamer.machine import measure_available_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.exchange.messages import Pulse

# One for the driver's progress polls, one so that an abort never queues behind them.
_CONTROL_THREADS = 2


class RankActor:
    """Holds one rank's worker object.

    Args:
        name: How Ray's logs and dashboard show it.
        rank: Of the worker.
    """

    def __init__(self, name: str, rank: int) -> None:
        self._name = name
        self._rank = rank
        self._worker: Any = None

    def __repr__(self) -> str:
        return self._name

    def build(self, worker_class: type[Any], args: tuple[Any, ...]) -> None:
        """Make the worker, as `worker_class(rank, *args)`."""
        self._worker = worker_class(self._rank, *args)

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the worker on the main thread.

        Raises:
            ClusterError: In place of an exception that pickle could not bring to the driver; says its type and text. Or the result
                is a generator, of which Ray would bring the first value alone.
        """
        try:
            result = getattr(self._worker, method)(*args)
        except Exception as error:
            if _can_travel(error):
                raise
            raise ClusterError(f"{type(error).__name__}: {error}") from error
        if inspect.isgenerator(result):
            raise ClusterError(
                f"the result is the generator {result.__name__!r}, which cannot leave its process; return a list"
            )
        return result

    @ray.method(concurrency_group="control")
    def control(self, method: str, *args: Any) -> Any:
        """Run a method of the worker beside whatever the main thread does; it must be thread-safe and short."""
        return getattr(self._worker, method)(*args)

    @ray.method(concurrency_group="pulse", enable_task_events=False)
    def pulse(self) -> Pulse | None:
        """What the worker does, where it says so; answers as long as this process runs and something else than one call gets Python's lock."""
        pulse: Callable[[], Pulse | None] | None = getattr(self._worker, "pulse", None)
        return None if pulse is None else pulse()

    @ray.method(concurrency_group="control")
    def facts(self) -> RankFacts:
        """Where this actor runs."""
        return RankFacts(
            node_id=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            hostname=socket.gethostname(),
            pid=os.getpid(),
            process_start=PeerProcess(os.getpid()).start,
            available_memory_bytes=measure_available_memory(),
        )


def _can_travel(error: Exception) -> bool:
    """Whether an exception comes out of pickle as it goes in: one whose class takes other arguments than its text may not."""
    try:
        # By name: a class that was pickled by value may come back as another object.
        came = cloudpickle.loads(cloudpickle.dumps(error))  # pyright: ignore[reportPrivateImportUsage]  # as Ray itself does
        return type(came).__qualname__ == type(error).__qualname__
    except Exception:  # whatever a stranger's class does
        return False


_as_actor: Any = ray.remote  # its type hints leave out concurrency_groups
RemoteRank = _as_actor(concurrency_groups={"control": _CONTROL_THREADS, "pulse": 1})(RankActor)
