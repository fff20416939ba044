"""How long does a load take by its model? A simulation of discrete events: readers, slots, the storage, copiers, on one node or several.

    reader   takes the next block up ── slot ── first byte ── bytes come ── own copy ── next block
    copier   an offered block, else one of a mapped file ── copy ── next
    receiver a block that another node has read and sends ── bytes come ── own copy ── next

How fast bytes come is asked of `flows`: streams share the storage and the node's link. A slot is free again when its reader and every
other rank has copied its part, and every other node has it. The rules are those of `rank/load.py`: readers take blocks in order, offered
blocks come before mapped ones, and before its tensors are there a rank reads into free slots only.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from ray_streamer.report.verdict.excerpts import first_half, has_even_excerpt, whole_seconds
from ray_streamer.report.verdict.flows import Flows
from ray_streamer.report.verdict.lanes import capacities_of, lanes_of, peer_lane, storage_lane
from ray_streamer.report.verdict.model import ClusterModel, NodeGroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.report.verdict.model import CopyModel, FanOut, NodeModel, RankModel, Read


def replay_seconds(model: NodeModel) -> float:
    """Seconds from the first moment of the model until its last byte is in a tensor.

    >>> from ray_streamer.report.verdict.model import CopyModel, NodeModel, RankModel, Read
    >>> own = CopyModel(0, 0.0)
    >>> reads = tuple(Read(0, at, at + 100, 0, True, 0.0, 1.0, 100.0, own) for at in range(0, 600, 100))
    >>> rank = RankModel(rank=0, begin_seconds=0.0, ready_seconds=0.0, num_readers=2, num_slots=2, num_copiers=1, reads=reads)
    >>> replay_seconds(NodeModel(ranks=(rank,), stream_rate=100.0, node_rate=math.inf, block_bytes=100))
    6.0
    """
    return replay_cluster(ClusterModel(groups=(NodeGroup(model),)))[0]


def replay_cluster(cluster: ClusterModel) -> tuple[float, ...]:
    """The same for each group of nodes that load at the same time, and share a storage."""
    seconds = _Replay(cluster).run()
    halves = _Replay(first_half(cluster)).run() if has_even_excerpt(cluster) else seconds
    return tuple(whole_seconds(group.node, *both) for group, *both in zip(cluster.groups, seconds, halves, strict=True))


class _Node:
    """One node for all of its group."""

    def __init__(self, place: int, group: NodeGroup, num_receivers: int) -> None:
        self.place = place
        self.num_nodes = group.num_nodes
        self.ranks = [_Rank(rank, self, num_receivers) for rank in group.node.ranks]
        self.last_seconds = 0.0


class _Rank:
    """One rank while it loads."""

    def __init__(self, model: RankModel, node: _Node, num_receivers: int) -> None:
        self.model = model
        self.node = node
        self.next_read = 0
        self.next_mapped = 0
        self.has_begun = False
        self.is_ready = False
        self.idle_readers = model.num_readers
        self.idle_copiers = model.num_copiers
        self.idle_receivers = num_receivers
        self.free_slots = model.num_slots
        self.waiting: deque[_Block] = deque()
        self.early: deque[_Block] = deque()
        self.offered: deque[tuple[CopyModel, _Block]] = deque()
        self.coming: dict[int, deque[_Block]] = {}
        self.num_taken: Counter[int] = Counter()

    def next_coming(self) -> _Block | None:
        """A block of the sender that least was taken from: first of the next node, so that not all take from one at a time."""
        senders = [place for place, blocks in self.coming.items() if blocks]
        if not senders:
            return None
        own = self.node.place
        sender = min(senders, key=lambda place: (self.num_taken[place], place <= own, place))
        self.num_taken[sender] += 1
        return self.coming[sender].popleft()


class _Block:
    """A block under way to a node, and how many ranks and nodes still have to take from it.

    Attributes:
        origin: The block on the node that sends it; None for one from storage.
    """

    __slots__ = ("num_holders", "origin", "rank", "read")

    def __init__(self, read: Read, rank: _Rank, origin: _Block | None = None) -> None:
        self.read, self.rank, self.origin = read, rank, origin
        self.num_holders = 1 + len(read.copies)


class _Replay:
    def __init__(self, cluster: ClusterModel) -> None:
        self._fan_out = cluster.fan_out
        num_receivers = cluster.fan_out.num_receivers if cluster.fan_out else 0
        self._nodes = [_Node(place, group, num_receivers) for place, group in enumerate(cluster.groups)]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._flows: Flows[_Block] = Flows(lanes_of(cluster), capacities_of(cluster))
        self._num_events = 0
        self._now = 0.0

    def run(self) -> tuple[float, ...]:
        for rank in (rank for node in self._nodes for rank in node.ranks):
            self._at(rank.model.begin_seconds, self._begin, rank)
            self._at(rank.model.ready_seconds, self._become_ready, rank)
        while self._events or self._flows.ends_at < math.inf:
            if not self._events or self._flows.ends_at <= self._events[0][0]:
                self._now = self._flows.ends_at
                self._received(self._flows.end())
            else:
                self._now, _, happen, about = heapq.heappop(self._events)
                happen(*about)
        return tuple(node.last_seconds for node in self._nodes)

    def _at(self, seconds: float, happen: Callable[..., None], *about: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (max(seconds, self._now), self._num_events, happen, about))

    def _begin(self, rank: _Rank) -> None:
        rank.has_begun = True
        self._employ_readers(rank)

    def _become_ready(self, rank: _Rank) -> None:
        rank.is_ready = rank.has_begun = True
        self._employ_readers(rank)
        self._employ_copiers(rank)
        self._employ_receivers(rank)

    def _employ_readers(self, rank: _Rank) -> None:
        reads = rank.model.reads
        while rank.idle_readers and rank.has_begun:
            if rank.is_ready and rank.early:
                rank.idle_readers -= 1
                self._copy_own(rank.early.popleft())
            elif rank.next_read < len(reads) and (
                rank.is_ready or (rank.free_slots and reads[rank.next_read].is_staged)
            ):
                rank.idle_readers -= 1
                block = _Block(reads[rank.next_read], rank)
                rank.next_read += 1
                self._at(self._now + block.read.prepare_seconds, self._want_slot, block)
            else:
                return

    def _want_slot(self, block: _Block) -> None:
        if block.read.is_staged and not block.rank.free_slots:
            block.rank.waiting.append(block)
        else:
            self._ask(block)

    def _ask(self, block: _Block) -> None:
        if block.read.is_staged:
            block.rank.free_slots -= 1
        self._at(self._now + block.read.first_byte_seconds, self._receive, block)

    def _receive(self, block: _Block) -> None:
        place = block.rank.node.place
        if block.origin is None:
            lane = storage_lane(place)
        else:
            lane = peer_lane(block.origin.rank.node.place, place, len(self._nodes))
        self._flows.begin(lane, block.read.work_bytes, block, now=self._now)

    def _received(self, block: _Block) -> None:
        if block.origin is not None:
            self._let_go(block.origin)
        elif self._fan_out is not None:
            self._send(block, self._fan_out)
        for copy in block.read.copies:
            self._at(self._now + copy.delay_seconds, self._offer, copy, block)
        if block.rank.is_ready:
            self._copy_own(block)
        else:
            block.rank.early.append(block)
            block.rank.idle_readers += 1
            self._employ_readers(block.rank)

    def _send(self, block: _Block, fan_out: FanOut) -> None:
        """To all other nodes what this one has read; to each of its group what the others of the group have read by now."""
        sender = block.rank.node
        for node in self._nodes:
            num_senders = sender.num_nodes - (node is sender)
            rank = node.ranks[block.read.rank]
            block.num_holders += num_senders
            for _ in range(num_senders):
                self._at(self._now + fan_out.delay_seconds, self._come, _Block(block.read, rank, block))

    def _come(self, block: _Block) -> None:
        assert block.origin is not None
        block.rank.coming.setdefault(block.origin.rank.node.place, deque()).append(block)
        self._employ_receivers(block.rank)

    def _employ_receivers(self, rank: _Rank) -> None:
        while rank.idle_receivers and rank.is_ready and (block := rank.next_coming()):
            rank.idle_receivers -= 1
            self._receive(block)

    def _copy_own(self, block: _Block) -> None:
        self._at(self._now + block.read.own.seconds, self._copied_own, block)

    def _copied_own(self, block: _Block) -> None:
        block.rank.node.last_seconds = self._now
        if block.origin is None:
            block.rank.idle_readers += 1
        self._let_go(block)
        self._employ_readers(block.rank)

    def _offer(self, copy: CopyModel, block: _Block) -> None:
        rank = block.rank.node.ranks[copy.rank]
        rank.offered.append((copy, block))
        self._employ_copiers(rank)

    def _employ_copiers(self, rank: _Rank) -> None:
        mapped = rank.model.mapped
        while rank.idle_copiers and rank.is_ready:
            if rank.offered:
                copy, block = rank.offered.popleft()
            elif rank.next_mapped < len(mapped):
                copy, block = mapped[rank.next_mapped], None
                rank.next_mapped += 1
            else:
                return
            rank.idle_copiers -= 1
            self._at(self._now + copy.seconds, self._copied, rank, copy, block)

    def _copied(self, rank: _Rank, copy: CopyModel, block: _Block | None) -> None:
        rank.node.last_seconds = self._now
        rank.idle_copiers += 1
        self._employ_copiers(rank)
        if block is not None:
            self._at(self._now + copy.delay_seconds, self._let_go, block)

    def _let_go(self, block: _Block) -> None:
        block.num_holders -= 1
        rank = block.rank
        if block.num_holders:
            return
        if block.origin is not None:
            rank.idle_receivers += 1
            self._employ_receivers(rank)
            return
        if not block.read.is_staged:
            return
        rank.free_slots += 1
        if rank.waiting:
            self._ask(rank.waiting.popleft())
        elif not rank.is_ready:
            self._employ_readers(rank)
