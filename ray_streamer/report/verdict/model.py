"""What of a load is replayed? The reads and copies of each node's ranks, each with how long it takes, and not with when it happened.

A verdict replays one node (`NodeModel`). A simulation replays several that share a storage (`ClusterModel`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from ray_streamer.settings import Settings


class RequestedSettings(NamedTuple):
    """The settings that shape a load, as the user gave them.

    Attributes:
        block_bytes: Largest request.
        max_bandwidth: Bytes per second of a node; None for no bound.
    """

    block_bytes: int
    max_bandwidth: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those of all settings, without what is secret."""
        return cls(settings.block_bytes, settings.max_bandwidth)


class CopyModel(NamedTuple):
    """One rank's copy out of a block or a mapped file.

    Attributes:
        rank: Position of the copying rank in the model.
        seconds: The copy.
        touch_seconds: Of these, the first touch of fresh memory.
        delay_seconds: From another rank's offer until it is known here, and as long for the way back.
    """

    rank: int
    seconds: float
    touch_seconds: float = 0.0
    delay_seconds: float = 0.0

    def share(self, share: float) -> CopyModel:
        """The copy of this share of its bytes."""
        return self._replace(seconds=self.seconds * share, touch_seconds=self.touch_seconds * share)


class Read(NamedTuple):
    """One block on its way from storage.

    Attributes:
        file: Of the block.
        start: First byte in the file.
        stop: One past the last.
        rank: Position of the reading rank in the model.
        is_staged: Whether it needs a slot.
        prepare_seconds: From the moment a reader thread takes the block up until it wants a slot, or asks the storage.
        first_byte_seconds: From the request to the first byte.
        work_bytes: What the storage serves for it, as bytes of a stream of usual speed; more than its size when it came slowly.
        own: From its last byte until the reader's own part is in its tensors. Of a block that is not staged, the first touch
            of fresh memory is part of `prepare_seconds` instead.
        copies: Of other ranks.
        lost_seconds: Of `first_byte_seconds`, attempts that failed and waits before the next one.
        lost_bytes: Of `work_bytes`, those that a stream would have brought while a broken body was asked for again.
    """

    file: int
    start: int
    stop: int
    rank: int
    is_staged: bool
    prepare_seconds: float
    first_byte_seconds: float
    work_bytes: float
    own: CopyModel
    copies: tuple[CopyModel, ...] = ()
    lost_seconds: float = 0.0
    lost_bytes: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Read:
        """These bytes of it as a read of their own: they cost their share, and the whole wait for a first byte."""
        share = (stop - start) / self.num_bytes
        return self._replace(
            start=start,
            stop=stop,
            prepare_seconds=self.prepare_seconds * share,
            work_bytes=self.work_bytes * share,
            lost_bytes=self.lost_bytes * share,
            own=self.own.share(share),
            copies=tuple(copy.share(share) for copy in self.copies),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankModel:
    """One rank.

    Attributes:
        rank: Global rank.
        begin_seconds: When it may read, from the first moment of the node's load.
        ready_seconds: When its tensors are there; until then it reads into free slots only, and copies nothing.
        num_readers: Reads in flight.
        num_slots: Slots of its arena.
        num_copiers: Threads for what it does not read itself.
        reads: In the order in which they are taken up.
        mapped: Copies out of mapped files.
    """

    rank: int
    begin_seconds: float
    ready_seconds: float
    num_readers: int
    num_slots: int
    num_copiers: int
    reads: tuple[Read, ...]
    mapped: tuple[CopyModel, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeModel:
    """The ranks of a node, and what the storage gave them.

    Attributes:
        ranks: Of the node.
        stream_rate: Bytes per second of one stream alone; infinite when the node's rate is all that was seen.
        node_rate: Bytes per second of all streams together; infinite when nothing was seen of it.
        block_bytes: Size of a slot.
        thinning: How many blocks each block of the model stands for.
        is_even: Whether the load goes on as it does in the second half of the model, as where it follows from a plan.
    """

    ranks: tuple[RankModel, ...]
    stream_rate: float
    node_rate: float
    block_bytes: int
    thinning: float = 1
    is_even: bool = False


class NodeGroup(NamedTuple):
    """Nodes that have the same to do at the same rates. They do the same at the same moments, so one stands for all of them.

    Attributes:
        node: Each of them. Where nodes pass on what they read, its reads are its own part of the checkpoint.
        num_nodes: How many there are.
    """

    node: NodeModel
    num_nodes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FanOut:
    """Every node reads a part of the checkpoint, and sends each block that it has read to every other node.

    A block that comes so goes to the rank of the same position as the one that read it, and is copied by the same ranks.

    Attributes:
        stream_rate: Bytes per second of one block between two nodes.
        delay_seconds: From the moment a block is there until it comes to another node.
        num_receivers: Blocks that come to one rank at a time; each has staging memory of its own, so nodes never wait for each other in a
            circle.
        link_rate: Bytes per second into a node, and as many out of it; None = they share the node's rate with what comes from storage,
            and go out at that rate.
    """

    stream_rate: float
    delay_seconds: float
    num_receivers: int
    link_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterModel:
    """Nodes that load at the same time.

    Attributes:
        groups: All nodes.
        storage_rate: Bytes per second that the storage serves to all of them.
        fan_out: How nodes pass on what they read; None where each reads all that it needs.
    """

    groups: tuple[NodeGroup, ...]
    storage_rate: float = math.inf
    fan_out: FanOut | None = None
