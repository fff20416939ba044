"""Which values does the load of a rank need that are not in the plan?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from ray_streamer.exchange.liveness import Timeouts
    from ray_streamer.exchange.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How one rank loads.

    Attributes:
        session: Secret shared by the ranks of this load on this node, and by no others.
        node: Name of the node, for errors.
        concurrency: Reads in flight.
        memory_limit: Staging bytes; -1 for as much as the plan can use.
        timeouts: How long the ranks of the node wait for each other.
    """

    session: str
    node: str
    concurrency: int
    memory_limit: int
    timeouts: Timeouts

    @classmethod
    def at(cls, place: Place, *, concurrency: int, memory_limit: int) -> Self:
        """Those of a rank that has met the others of its node already."""
        return cls(
            session=place.session,
            node=place.node,
            concurrency=concurrency,
            memory_limit=memory_limit,
            timeouts=place.timeouts,
        )
