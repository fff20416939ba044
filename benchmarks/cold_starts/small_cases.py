"""Which small loads are made and simulated? One for each limit, and some with several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ray_streamer.rank.request import LoadRequest
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.testing.faults import Fault

MIB = 1 << 20
CHECKPOINT_MIB = 48
NUM_PLANNED = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """One small load of all its nodes.

    Attributes:
        name: What limits it.
        num_nodes: Nodes.
        num_ranks: Ranks of each, which read for each other.
        num_apart: Loads side by side on each node, of `num_ranks` ranks each, that share nothing but the link.
        concurrency: Requests in flight on each rank.
        num_slots: Blocks of staging memory of each rank.
        block_bytes: Size of each.
        first_byte_seconds: Of each answer.
        stream_rate: Bytes per second of each answer; 0 for no limit.
        storage_rate: Bytes per second of all nodes.
        node_rates: Bytes per second of each node's link; one number stands for all nodes.
        late: Every so many answers one begins so much later.
    """

    name: str
    num_nodes: int = 1
    num_ranks: int = 1
    num_apart: int = 1
    concurrency: int = 4
    num_slots: int = 64
    block_bytes: int = MIB
    first_byte_seconds: float = 0.05
    stream_rate: float = 0.0
    storage_rate: float | None = None
    node_rates: tuple[int, ...] = ()
    late: tuple[int, float] | None = None

    @property
    def faults(self) -> list[Fault]:
        """What requests meet, in turn."""
        usual = Fault(delay_seconds=self.first_byte_seconds, bytes_per_second=self.stream_rate)
        if self.late is None:
            return [usual] * NUM_PLANNED
        every, more_seconds = self.late
        one = [usual] * (every - 1) + [replace(usual, delay_seconds=self.first_byte_seconds + more_seconds)]
        return one * (NUM_PLANNED // every)

    def node_rate(self, node: int) -> int | None:
        """Bytes per second of this node's link; None for no limit."""
        return self.node_rates[min(node, len(self.node_rates) - 1)] if self.node_rates else None

    def request(self, uri: str, *, node: int = 0, endpoint_url: str | None = None) -> LoadRequest:
        """The load of a rank of this node, from an endpoint or from the one that the environment names."""
        said: dict[str, Any] = {
            "block_bytes": self.block_bytes,
            "concurrency": self.concurrency,
            "memory_limit": self.num_slots * self.block_bytes,
            "max_bandwidth": self.node_rate(node),
            "hedge_percent": 0.0,
            "s3_endpoint_url": endpoint_url,
        }
        settings = Settings.resolve(**{name: value for name, value in said.items() if value is not None})
        slices = RuleSlices(mesh=Mesh(tp=self.num_ranks), rules=ShardRules({"*": Split(1)}))
        return LoadRequest(uri=uri, mesh=Mesh(tp=self.num_ranks), slices=slices, settings=settings, device="cpu")


SMALL = (
    Small(name="first byte of 200 ms, 2 ranks", num_ranks=2, first_byte_seconds=0.2),
    Small(name="5 MB/s for each stream, 2 ranks", num_ranks=2, stream_rate=5e6),
    Small(
        name="memory for 4 blocks, 8 requests, 2 ranks",
        num_ranks=2,
        concurrency=8,
        num_slots=4,
        block_bytes=MIB // 4,
        first_byte_seconds=0.15,
    ),
    Small(name="a link of 25 MB/s, 2 ranks", num_ranks=2, node_rates=(25_000_000,)),
    Small(name="2 nodes share a storage of 30 MB/s", num_nodes=2, storage_rate=30e6),
    Small(
        name="3 nodes with links of 25 MB/s, 8 MB/s for each stream, a storage of 50 MB/s",
        num_nodes=3,
        stream_rate=8e6,
        storage_rate=50e6,
        node_rates=(25_000_000,),
    ),
    Small(name="every rank reads everything: 2 ranks, 30 MB/s", num_apart=2, storage_rate=30e6),
    Small(name="the node reads once: 2 ranks, 30 MB/s", num_ranks=2, storage_rate=30e6),
    Small(
        name="3 nodes, one with a link of 10 MB/s, others 30 MB/s",
        num_nodes=3,
        node_rates=(30_000_000, 30_000_000, 10_000_000),
    ),
    Small(name="every 8th answer is a second late", first_byte_seconds=0.1, late=(8, 1.0)),
)
