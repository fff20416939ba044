"""What are the ranks of a group asked, and what happens when one fails? One actor per rank, from start to teardown.

    seats ──> actors ──> facts ──> workers                     start: everything within one deadline
      │          │                                   │
      │          │              call(method) on the main lane, progress and abort on the control lane
      │          │                                   │
      │          │          first failure ──> abort the others ──> settle ──> choose the cause
      │          │                                   │
    removed <─ killed <──────────────────────────────┘         teardown: in reverse, also of a half-started group

A seat is a reservation (`seats`), an actor is a `RankActor` around an ordinary worker object (`rank_actor`), and `started_ranks`
starts them. Ranks are ordered by node, the driver's first. Nothing here knows what the workers do. Weights never pass through here;
arguments and results are plans and reports.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import RayError

from ray_streamer.arguments import whole_number
from ray_streamer.cluster.calls import Calls, ProgressPoll, send
from ray_streamer.cluster.failures import ray_errors_translated
from ray_streamer.cluster.functions import CallersFunctions, WaitForFunctions
from ray_streamer.cluster.names import GroupName
from ray_streamer.cluster.placement import PlacementOptions, group_by_node
from ray_streamer.cluster.pulses import PulseWatch
from ray_streamer.cluster.started_ranks import StartedRanks
from ray_streamer.cluster.waiting import Deadline
from ray_streamer.errors import ClusterError, SettingsError
from ray_streamer.units import counted
from ray_streamer.wording import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ray_streamer.cluster.facts import RankFacts
    from ray_streamer.exchange.liveness import Timeouts

# How often progress is asked for.
_POLL_SECONDS = 0.25
# How long aborted ranks may take to return, and a neighbour's "rank 3 went away" waits for Ray's word on rank 3.
_SETTLE_SECONDS = 3.0


class WorkerGroup:
    """One actor per rank, each holding `worker_class(rank, *args)`; use it as a context manager.

    A worker's methods run one at a time. `abort(reason)`, sent to the others when one rank's call fails, and
    `progress()` run beside them, on another thread. Actors and an own placement group go when the group is shut down,
    is garbage, or its process ends.
    """

    def __init__(
        self,
        worker_class: type[Any],
        num_ranks: int,
        *,
        args: Sequence[Any] = (),
        placement: PlacementOptions | None = None,
        holding: str = "workers",
        is_called_off: Callable[[], bool] = bool,
        timeouts: Timeouts,
    ) -> None:
        """Start the actors and their workers, or leave nothing behind.

        Args:
            worker_class: Importable, or picklable by value, on every node.
            num_ranks: How many.
            args: Of every worker's constructor, after its rank.
            placement: What each rank reserves, and where.
            holding: What the ranks hold, in a word: part of the names of actors and placement group.
            is_called_off: Asked while the start lasts; when it says so, everything is torn down.
            timeouts: How long reservation, actors and constructors may take together, and ranks that are called may be silent.

        Raises:
            ClusterError: There is no room, Ray cannot start the actors, or the start was called off.
            StartupTimeoutError: Room or answers did not come in time; names the silent seats.
            RankFailedError: A worker's constructor raised.
        """
        self._timeouts = timeouts
        self._functions = CallersFunctions()
        self._ranks = StartedRanks(
            worker_class,
            tuple(args),
            name=GroupName(holding, num_ranks),
            placement=placement or PlacementOptions(),
            why_silent=self._functions.why_silent,
        )
        self._sending = threading.RLock()
        resources = ExitStack()
        # The finalizer also runs when the process ends, before Ray's own exit hook.
        self._process = os.getpid()
        self._release = weakref.finalize(self, _close_in, self._process, resources)
        try:
            with ray_errors_translated(f"starting {counted(num_ranks, 'rank')}"):
                self._ranks.start(resources, Deadline(timeouts.startup_seconds, is_called_off=is_called_off))
        except BaseException:
            self.shutdown()
            raise

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self._ranks.handles)

    @property
    def actors(self) -> tuple[Any, ...]:
        """The actor handle of each rank."""
        return tuple(self._ranks.handles)

    @property
    def facts(self) -> tuple[RankFacts, ...]:
        """Where each rank runs, and what it saw there when it started."""
        return tuple(self._ranks.facts)

    @property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node; contiguous unless `bundle_indices` gave another order."""
        return group_by_node([facts.node_id for facts in self._ranks.facts])

    def call(
        self,
        method: str,
        *args: Any,
        ranks: Sequence[int] | None = None,
        per_rank_args: Sequence[Sequence[Any]] | None = None,
        on_progress: Callable[[list[Any]], None] | None = None,
        keep_on_failure: bool = False,
        is_callers: bool = False,
    ) -> list[Any]:
        """Run a method of the workers, on all ranks at once, and wait for all; the first failure wins.

        Calls of several threads run one after the other, in the same order on every rank.

        When one rank fails, the others' workers are told to `abort(reason)`, given three seconds to return, and the
        group is shut down. When this process is interrupted, the group is shut down at once.

        Args:
            method: Name of the worker's method.
            args: Given to every rank; an `ObjectRef` arrives as its value.
            ranks: Which ranks; all of them when unset.
            per_rank_args: For each of `ranks`, what follows `args`.
            on_progress: Called about four times a second with what `progress()` of each of `ranks` said last, or None.
            keep_on_failure: Do not shut down: live ranks keep what they hold, and the failed one may be restarted.
            is_callers: The method runs the caller's own function, which may keep Python's lock for as long as it likes, and whose
                errors, whatever they say of ranks, are its own.

        Returns:
            The result of each of `ranks`, in that order.

        Raises:
            RankFailedError: A rank raised, died or was stopped; its cause is chained, with its type.
            ClusterError: The group is shut down, belongs to the process that this one was forked from, or Ray itself failed.
        """
        self._check_usable(method)
        chosen = tuple(range(self.num_ranks)) if ranks is None else tuple(ranks)
        extra = per_rank_args if per_rank_args is not None else [()] * len(chosen)
        calls = Calls({}, is_callers=is_callers)
        try:
            with ray_errors_translated(f"calling {method} on {counted(len(chosen), 'rank')}"):
                self._send(calls, method, {rank: (*args, *more) for rank, more in zip(chosen, extra, strict=True)})
                self._watch(calls, chosen, on_progress, method)
        except BaseException as error:
            if keep_on_failure:
                # An interrupt may come after a call was sent, and before that is known here.
                self._abort(calls.pending if isinstance(error, Exception) else calls.unanswered(chosen), error)
            else:
                self.shutdown()
            raise
        return [calls.results[rank] for rank in chosen]

    def control(self, method: str, *args: Any, ranks: Sequence[int] | None = None, timeout_seconds: float) -> list[Any]:
        """Run a short, thread-safe method of the workers of `ranks`, or of all, also while a `call` is running.

        Raises:
            ClusterError: A rank did not answer in time, raised, or is dead.
        """
        asked = self._ranks.handles if ranks is None else [self._ranks.handles[rank] for rank in ranks]
        with ray_errors_translated(f"asking {counted(len(asked), 'rank')} for {method}"):
            return ray.get([actor.control.remote(method, *args) for actor in asked], timeout=timeout_seconds)

    def ask(self, method: str, *args: Any, rank: int = 0) -> Any:
        """Run a method of one rank's worker that the others' start depends on: within the startup timeout, with news meanwhile.

        Raises:
            RankFailedError: It raised, or the rank died.
            StartupTimeoutError: It did not answer in time.
        """
        with ray_errors_translated(f"asking rank {rank} to {method}"):
            calls = Calls({rank: self._ranks.handles[rank].call.remote(method, *args)})
            self._ranks.await_start(calls, Deadline(self._timeouts.startup_seconds), doing=method)
        if calls.failures:
            raise self._ranks.failure_of(calls)
        return calls.results[rank]

    def checked_rank(self, rank: int) -> int:
        """The number of a rank, as a caller gives it.

        Raises:
            SettingsError: There is no such rank.
        """
        number = whole_number("a rank", rank)
        if not 0 <= number < self.num_ranks:
            raise SettingsError(f"there is no rank {number}: the ranks are 0 to {self.num_ranks - 1}")
        return number

    def restart(self, *ranks: int) -> None:
        """Replace the actors and workers of `ranks` by new ones in the same seats; the other ranks go on untouched.

        Raises:
            ClusterError: Ray cannot start an actor.
            StartupTimeoutError: One did not answer within the group's startup timeout.
            RankFailedError: A worker's constructor raised.
        """
        deadline = Deadline(self._timeouts.startup_seconds)
        with ray_errors_translated(f"restarting rank {listed([*map(str, ranks)])}"):
            self._ranks.restart(ranks, deadline)

    def shutdown(self) -> None:
        """Kill the actors and remove an own placement group; may be called again."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _check_usable(self, method: str) -> None:
        if os.getpid() != self._process:
            raise ClusterError(
                f"cannot call {method}: process {self._process} started these workers, and Ray does not work in a process "
                "forked from it; load there, or start the process with spawn"
            )
        if not self._release.alive:
            raise ClusterError(f"cannot call {method}: this group of workers was shut down")
        if not ray.is_initialized():
            raise ClusterError(f"cannot call {method}: Ray was shut down, and these workers with it")

    def _send(self, calls: Calls, method: str, args: Mapping[int, Sequence[Any]]) -> None:
        # All ranks get the calls of several threads in one order: a function may wait for itself on the other ranks.
        with self._sending:
            for rank, given in args.items():
                calls.add(rank, send(self._ranks.handles[rank].call, method, *given))
                if calls.is_callers:
                    self._functions.add(rank, calls.refs[-1])

    def _watch(
        self, calls: Calls, ranks: Sequence[int], on_progress: Callable[[list[Any]], None] | None, method: str
    ) -> None:
        poll = ProgressPoll({rank: self._ranks.handles[rank] for rank in ranks})
        next_poll = 0.0
        watch = PulseWatch(
            self._ranks.handles,
            self._ranks.facts,
            self._timeouts,
            self._ranks.placement.runtime_env,
            waits_for_busy=calls.is_callers,
        )
        waiting = WaitForFunctions(self._functions, method, self._ranks.name.label)
        while calls.pending and not calls.failures:
            calls.collect(_POLL_SECONDS)
            waiting.tell(calls.pending, calls.refs)
            given_up = watch.check(calls.pending)
            if given_up is not None:
                calls.fail(given_up)
            if on_progress is not None and time.monotonic() >= next_poll:
                on_progress(poll.latest())
                next_poll = time.monotonic() + _POLL_SECONDS
        self._functions.forget_ended()
        if not calls.failures:
            return
        self._abort(calls.pending, self._ranks.failure_of(calls))
        deadline = Deadline(_SETTLE_SECONDS)
        while calls.pending and deadline.remaining_seconds:
            calls.collect(deadline.remaining_seconds)
        raise self._ranks.failure_of(calls)

    def _abort(self, ranks: Sequence[int], error: BaseException) -> None:
        for rank in ranks:
            with suppress(RayError):
                self._ranks.handles[rank].control.remote("abort", f"{type(error).__name__}: {error}")


def _close_in(process: int, resources: ExitStack) -> None:
    """What a fork copied is not the child's to end, nor could it: Ray's threads are the parent's."""
    if os.getpid() == process:
        resources.close()
