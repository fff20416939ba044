"""What does one load say to the other ranks of its node? The session's verbs, in the words of blocks, slots and files.

The blocks that neighbours offer are lent here, too: their arenas are mapped.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.errors import ClusterError
from ray_streamer.rank.block_source import Loan, Way
from ray_streamer.rank.recorder import Step
from ray_streamer.staging.arena import slot_view
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.exchange.session import LentMemory, NodeSession
    from ray_streamer.planning.rank_plan import Block, RankPlan
    from ray_streamer.rank.inbox import Inbox
    from ray_streamer.rank.recorder import Recorder
    from ray_streamer.staging.arena import Arena
    from ray_streamer.staging.stop import StopSignal


class _Arena(NamedTuple):
    """A neighbour's arena, mapped here, and how it is cut."""

    memory: memoryview
    slot_bytes: int


class _Offer(NamedTuple):
    """Where a neighbour's block lies."""

    owner: int
    slot: int


class Neighbourhood:
    """The other ranks of this rank's node during one load; a `BlockSource` of what they offer.

    Args:
        mine: What this rank does, and who the others are.
        session: Of these ranks, which have met, and go on together after the load; the failure of one ends the other.
        inbox: Told which blocks neighbours offer.
        recorder: Takes down when offers come.
        arena: This rank's; told what neighbours let go of.
        stop: Of the load.
    """

    def __init__(
        self,
        mine: RankPlan,
        session: NodeSession,
        *,
        inbox: Inbox,
        recorder: Recorder,
        arena: Arena,
        stop: StopSignal,
    ) -> None:
        self._mine, self._session = mine, session
        self._inbox, self._recorder, self._arena, self._stop = inbox, recorder, arena, stop
        self._arenas: dict[int, _Arena] = {}
        self._offers: dict[int, _Offer] = {}

    def exchange_arenas(self) -> None:
        """Lends this rank's arena to the other ranks, and maps theirs; blocks may be offered from then on.

        Raises:
            ClusterError: A neighbour holds another plan, or its arena did not arrive.
            RankFailedError: A rank failed, died or hangs.
        """
        session = self._session
        session.stop.on_set(self._end_load)
        self._stop.on_set(self._end_session)
        session.begin_load(self)
        plan_hash = self._mine.node_plan.plan_hash
        about = {"plan": plan_hash, "num_slots": self._arena.num_slots, "slot_bytes": self._arena.slot_bytes}
        num_bytes = self._arena.num_slots * self._arena.slot_bytes
        lent = session.lend(json.dumps(about).encode(), self._arena.fd, num_bytes)
        for local_rank, theirs in enumerate(lent):
            if local_rank != session.place.local_rank:
                self._arenas[local_rank] = self._checked(session.place.ranks[local_rank], theirs, plan_hash)

    @property
    def memories(self) -> list[memoryview]:
        """The neighbours' arenas, mapped here."""
        return [arena.memory for arena in self._arenas.values()]

    def announce(self, block: int, slot: int, consumers: tuple[int, ...]) -> None:
        """Offers a block in a slot of this rank's arena to `consumers`, which each release it once."""
        if consumers:
            self._session.announce(block, slot, consumers)

    def borrow(self, block: Block) -> Loan | None:
        """See `BlockSource.borrow`: a block that a neighbour offers, in its arena."""
        offer = self._offers.pop(block.number, None)
        if offer is None:
            return None
        arena = self._arenas[offer.owner]
        view = slot_view(arena.memory, offer.slot, arena.slot_bytes, block.extent)
        give_back = partial(self._session.release, offer.owner, offer.slot)
        return Loan(Way.OFFERED, np.frombuffer(view, dtype=np.uint8), give_back)

    def verify(self) -> None:
        """See `BlockSource.verify`; the neighbours compare what they read."""

    def share_numbers(self, make: Callable[[], list[int]]) -> list[int]:
        """The numbers that `make` gives on the node's first rank, on every rank."""
        shared = self._session.share(lambda: np.array(make(), dtype="<u4").tobytes())
        return np.frombuffer(shared, dtype="<u4").tolist()

    def finish(self) -> None:
        """Waits until every neighbour has all its bytes."""
        self._session.finish_load()

    def close(self) -> None:
        """Ends the conversation; on failure the neighbours are told why."""
        self._session.stop.forget(self._end_load)
        self._stop.forget(self._end_session)
        self._arenas.clear()
        self._offers.clear()

    def on_announce(self, owner: int, block: int, slot: int) -> None:
        """See `LoadListener`."""
        self._recorder.mark(Step.ANNOUNCED, block)
        self._offers[block] = _Offer(owner, slot)
        self._inbox.put(block)

    def on_release(self, slot: int) -> None:
        """See `LoadListener`."""
        self._arena.release(slot)

    def _end_load(self) -> None:
        if self._session.stop.error is not None:
            self._stop.set(self._session.stop.error)

    def _end_session(self) -> None:
        if self._stop.error is not None:
            self._session.fail(self._stop.error)

    def _checked(self, rank: int, theirs: LentMemory, plan_hash: str) -> _Arena:
        about = json.loads(bytes(theirs.about))
        if about["plan"] != plan_hash:
            raise ClusterError(
                f"rank {rank} holds plan {about['plan']}, rank {self._mine.rank} holds {plan_hash}: give every rank the same "
                "uri, rules and limits"
            )
        if about["num_slots"] * about["slot_bytes"] != len(theirs.memory):
            raise ClusterError(f"rank {rank} lent {human_bytes(len(theirs.memory))} of memory and says {about}")
        return _Arena(theirs.memory, about["slot_bytes"])
