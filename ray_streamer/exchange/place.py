"""Which rank of which node is this, under what name do its ranks meet, and how long do they wait for each other?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.errors import ClusterError

if TYPE_CHECKING:
    from ray_streamer.exchange.liveness import Timeouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank's place in a node session.

    Attributes:
        session: A name, secret where it can be, that the ranks of this session share and no other ranks use.
        rank: Global rank.
        ranks: Global ranks of the node in local order, this one included.
        node: Name of the node, for errors.
        timeouts: How long ranks wait for each other.
        assumption: What was assumed about the other ranks, for the error when they do not come; empty when they are known.
    """

    session: str
    rank: int
    ranks: tuple[int, ...]
    node: str
    timeouts: Timeouts
    assumption: str = ""

    def __post_init__(self) -> None:
        if self.rank not in self.ranks:
            raise ClusterError(f"rank {self.rank} is not one of the ranks {list(self.ranks)} of node {self.node}")

    @property
    def local_rank(self) -> int:
        """Position among the node's ranks."""
        return self.ranks.index(self.rank)
