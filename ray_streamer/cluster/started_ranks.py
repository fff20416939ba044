"""Who are the ranks of a group? Actors in reserved seats, which are started together within one deadline and replaced one by one."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ray.exceptions import OutOfMemoryError

from ray_streamer.cluster.address import why_ended_at_once
from ray_streamer.cluster.calls import Calls, kill, send
from ray_streamer.cluster.failures import choose_cause, tell_failure
from ray_streamer.cluster.lost_nodes import wait_for_other_nodes, why_lost
from ray_streamer.cluster.rank_actor import RemoteRank
from ray_streamer.cluster.seats import Seat, take_seats
from ray_streamer.cluster.waiting import wait_for_start
from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import ExitStack

    from ray_streamer.cluster.facts import RankFacts
    from ray_streamer.cluster.names import GroupName
    from ray_streamer.cluster.placement import PlacementOptions
    from ray_streamer.cluster.waiting import Deadline
    from ray_streamer.errors import RankFailedError

logger = logging.getLogger(__name__)


class StartedRanks:
    """One actor per rank, each holding `worker_class(rank, *args)`.

    Args:
        worker_class: Importable, or picklable by value, on every node.
        args: Of every worker's constructor, after its rank.
        name: What the group is called, and how many ranks it has.
        placement: What each rank reserves, and where.
        why_silent: For ranks that have not answered, why and what to do, where that is known.

    Attributes:
        name: See above.
        placement: See above.
        handles: Of the actors, by rank.
        facts: Where each rank runs, and what it saw there when it started.
    """

    def __init__(
        self,
        worker_class: type[Any],
        args: tuple[Any, ...],
        *,
        name: GroupName,
        placement: PlacementOptions,
        why_silent: Callable[[Sequence[int]], str | None],
    ) -> None:
        self.name, self.placement = name, placement
        self.handles: list[Any] = []
        self.facts: list[RankFacts] = []
        self._worker_class, self._args = worker_class, args
        self._why_silent = why_silent
        self._seats: list[Seat] = []
        self._num_restarts = 0

    def start(self, resources: ExitStack, deadline: Deadline) -> None:
        """Reserves the seats, and starts actors and workers in them.

        Args:
            resources: Owns what was started: closing it kills the actors, and removes an own placement group.
            deadline: For all of it together.

        Raises:
            ClusterError: There is no room, or Ray cannot start the actors.
            StartupTimeoutError: Room or answers did not come in time; names the silent seats.
            RankFailedError: A worker's constructor raised.
        """
        ranks = range(self.name.num_ranks)
        self._seats += take_seats(self.name, self.placement, deadline=deadline, resources=resources)
        resources.callback(kill, self.handles)
        for rank in ranks:
            self.handles.append(self._start_actor(rank))
        building = self._begin_workers(ranks)
        self.facts += self._ask_facts(ranks, deadline)
        self._await_workers(building, deadline)
        seconds = time.monotonic() - deadline.started
        num_nodes = len({facts.node_id for facts in self.facts})
        logger.info("started %s on %d nodes in %.1f s", self.name.label, num_nodes, seconds)

    def restart(self, ranks: Sequence[int], deadline: Deadline) -> None:
        """Replaces the actors and workers of `ranks` by new ones in the same seats; raises as `start` does."""
        kill([self.handles[rank] for rank in ranks])
        wait_for_other_nodes({rank: self._seats[rank] for rank in ranks}, self.name, self.placement, deadline)
        self._num_restarts += 1
        for rank in ranks:
            self.handles[rank] = self._start_actor(rank)
        building = self._begin_workers(ranks)
        for rank, facts in zip(ranks, self._ask_facts(ranks, deadline), strict=True):
            self.facts[rank] = facts
        self._await_workers(building, deadline)

    def await_start(self, calls: Calls, deadline: Deadline, doing: str = "start") -> None:
        """Waits until all calls have answered or one has failed, and says who is silent meanwhile; see `wait_for_start`."""
        places = [f"rank {rank} in {seat.name}" for rank, seat in enumerate(self._seats)]
        wait_for_start(calls, places, self.name.label, deadline, doing=doing, why_silent=self._why_silent)

    def failure_of(self, calls: Calls) -> RankFailedError:
        """What the failed ones of `calls` came of."""
        alive = {failure.rank for failure in calls.failures} | calls.results.keys()
        return tell_failure(choose_cause(calls.failures), [facts.node for facts in self.facts], alive=alive)

    def _start_actor(self, rank: int) -> Any:
        name = self.name.rank(rank, self._num_restarts)
        try:
            return RemoteRank.options(
                name=name,
                num_cpus=self.placement.num_cpus_per_rank,
                num_gpus=self.placement.num_gpus_per_rank or 0,
                resources=dict(self.placement.resources),
                runtime_env=self.placement.runtime_env,
                scheduling_strategy=self._seats[rank].scheduling_strategy,
            ).remote(name, rank)
        except (TypeError, ValueError) as error:
            raise ClusterError(f"Ray refuses these options of an actor: {error}") from error

    def _ask_facts(self, numbers: Sequence[int], deadline: Deadline) -> list[RankFacts]:
        calls = Calls({number: self.handles[number].facts.remote() for number in numbers})
        self.await_start(calls, deadline)
        if calls.failures:
            failure = calls.failures[0]
            seat = self._seats[failure.rank]
            hint = why_ended_at_once(failure.cause) or why_lost(seat, failure.cause)
            if hint is None and not isinstance(failure.origin, OutOfMemoryError):
                hint = "Is ray_streamer installed on every node, or in the runtime_env?"
            said = f"{str(failure.cause).rstrip('.')}. {hint}" if hint else failure.cause
            raise ClusterError(f"rank {failure.rank} in {seat.name} did not start: {said}") from failure.origin
        return [calls.results[number] for number in numbers]

    def _begin_workers(self, ranks: Sequence[int]) -> Calls:
        return Calls({rank: send(self.handles[rank].build, self._worker_class, self._args) for rank in ranks})

    def _await_workers(self, building: Calls, deadline: Deadline) -> None:
        self.await_start(building, deadline)
        if building.failures:
            raise self.failure_of(building)
