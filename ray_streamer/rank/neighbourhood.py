"""Who else is on this node, and what do we agree on? Nobody, or a hub and its links behind the same few verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.exchange.hub import Hub
from ray_streamer.exchange.messages import Hello
from ray_streamer.exchange.rendezvous import Link, meet_neighbours
from ray_streamer.stream.arena import slot_view

if TYPE_CHECKING:
    from ray_streamer.extent import Extent
    from ray_streamer.planning.rank_plan import RankPlan
    from ray_streamer.rank.inbox import Inbox
    from ray_streamer.rank.options import RankOptions
    from ray_streamer.stream.arena import Arena
    from ray_streamer.stream.stop import StopSignal


class Neighbourhood:
    """The other ranks of this rank's node; made by `meet`, closed by its owner.

    Attributes:
        memories: The neighbours' arenas, mapped here.
    """

    def __init__(self, links: list[Link], hub: Hub | None) -> None:
        self._links = {link.local_rank: link for link in links}
        self._hub = hub
        self.memories = [link.memory for link in links]

    @classmethod
    def meet(
        cls, mine: RankPlan, plan_hash: str, arena: Arena, inbox: Inbox, options: RankOptions, stop: StopSignal
    ) -> Neighbourhood:
        """Connects to all neighbours; see `meet_neighbours` for what can go wrong."""
        if len(mine.neighbours) == 1:
            return cls([], None)
        hello = Hello(
            local_rank=mine.local_rank,
            plan_hash=plan_hash,
            num_slots=arena.num_slots,
            slot_bytes=arena.slot_bytes,
        )
        links = meet_neighbours(
            options.session,
            hello,
            arena.fd,
            ranks=mine.neighbours,
            node=options.node,
            timeout_seconds=options.startup_timeout_seconds,
            stop=stop,
        )
        try:
            hub = Hub(
                links,
                rank=mine.rank,
                ranks=mine.neighbours,
                node=options.node,
                on_announce=inbox.announce,
                on_release=arena.release,
                stop=stop,
            )
        except BaseException:
            for link in links:
                link.close()
            raise
        return cls(links, hub)

    def announce(self, block: int, slot: int, takers: tuple[int, ...]) -> None:
        """Offers a block in a slot of this rank's arena to `takers`, which each release it once."""
        if takers:
            assert self._hub is not None
            self._hub.announce(block, slot, takers)

    def view(self, owner: int, slot: int, extent: Extent) -> memoryview:
        """A block in a slot of a neighbour's arena; valid until it is released."""
        link = self._links[owner]
        return slot_view(link.memory, slot, link.slot_bytes, extent)

    def release(self, owner: int, slot: int) -> None:
        """Lets go of a neighbour's slot."""
        assert self._hub is not None
        self._hub.release(owner, slot)

    def tell_viewed(self, files: list[int]) -> None:
        """As the node's first rank: tells the others which files all ranks copy from a mapping."""
        if self._hub is not None:
            self._hub.tell_viewed(files)

    def wait_viewed(self) -> list[int]:
        """As any other rank: the files that the first one named."""
        assert self._hub is not None
        return self._hub.wait_viewed()

    def finish(self) -> None:
        """Waits until every neighbour has all its bytes."""
        if self._hub is not None:
            self._hub.finish()

    def close(self) -> None:
        """Ends the conversation; on failure the neighbours are told why."""
        if self._hub is not None:
            self._hub.close()
        self.memories.clear()
        self._links.clear()
