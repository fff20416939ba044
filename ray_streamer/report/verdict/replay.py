"""How long does a load take by its model? A simulation of discrete events: readers, slots, the storage, copiers.

    reader   takes the next block up ── slot ── first byte ── bytes come ── own copy ── next block
    copier   an offered block, else one of a mapped file ── copy ── next

All streams of the node share what the storage gives: each gets the rate of one stream, or an equal part of the node's rate if
that is less. So all that are receiving get the same, and what one of them has received is a difference of one clock of bytes
(`_served`) that runs for all of them. A slot is free again when its reader and every other rank has copied its part. The rules
are those of `rank/load.py`: readers take blocks in order, offered blocks come before mapped ones, and before its tensors are there
a rank reads into free slots only.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.report.verdict.model import Copy, NodeModel, RankModel, Read


def replay_seconds(model: NodeModel) -> float:
    """Seconds from the first moment of the model until its last byte is in a tensor.

    >>> from ray_streamer.report.verdict.model import Copy, NodeModel, RankModel, Read
    >>> own = Copy(0, 0.0)
    >>> reads = tuple(Read(0, at, at + 100, 0, True, 0.0, 1.0, 100.0, own) for at in range(0, 600, 100))
    >>> rank = RankModel(rank=0, begin_seconds=0.0, ready_seconds=0.0, num_readers=2, num_slots=2, num_copiers=1, reads=reads)
    >>> replay_seconds(NodeModel(ranks=(rank,), stream_rate=100.0, node_rate=math.inf, block_bytes=100))
    6.0
    """
    seconds = _Replay(model).run()
    # What is replayed of a long load stands for the rest of it; what came before its first tensor does not.
    before = min(seconds, min((rank.ready_seconds for rank in model.ranks), default=0.0))
    return before + model.thinning * (seconds - before)


class _Rank:
    """One rank while it loads."""

    def __init__(self, model: RankModel) -> None:
        self.model = model
        self.next_read = 0
        self.next_mapped = 0
        self.has_begun = False
        self.is_ready = False
        self.idle_readers = model.num_readers
        self.idle_copiers = model.num_copiers
        self.free_slots = model.num_slots
        self.waiting: deque[_Block] = deque()
        self.early: deque[_Block] = deque()
        self.offered: deque[tuple[Copy, _Block]] = deque()


class _Block:
    """A read under way, and how many ranks still have to copy from it."""

    __slots__ = ("num_holders", "rank", "read")

    def __init__(self, read: Read, rank: _Rank) -> None:
        self.read, self.rank = read, rank
        self.num_holders = 1 + len(read.copies)


class _Replay:
    def __init__(self, model: NodeModel) -> None:
        self._model = model
        self._ranks = [_Rank(rank) for rank in model.ranks]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._receiving: list[tuple[float, int, _Block]] = []
        self._num_events = 0
        self._now = 0.0
        self._served = 0.0
        self._last = 0.0

    def run(self) -> float:
        for rank in self._ranks:
            self._at(rank.model.begin_seconds, self._begin, rank)
            self._at(rank.model.ready_seconds, self._become_ready, rank)
        while self._events or self._receiving:
            arrival = self._next_arrival()
            if self._receiving and (not self._events or arrival <= self._events[0][0]):
                self._pass_time(arrival)
                self._served, _, block = heapq.heappop(self._receiving)
                self._received(block)
            else:
                self._pass_time(self._events[0][0])
                _, _, happen, about = heapq.heappop(self._events)
                happen(*about)
        return self._last

    def _at(self, seconds: float, happen: Callable[..., None], *about: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (max(seconds, self._now), self._num_events, happen, about))

    def _rate(self) -> float:
        """Bytes per second that each stream gets now."""
        return min(self._model.stream_rate, self._model.node_rate / max(1, len(self._receiving)))

    def _next_arrival(self) -> float:
        if not self._receiving:
            return math.inf
        return self._now + max(0.0, self._receiving[0][0] - self._served) / self._rate()

    def _pass_time(self, now: float) -> None:
        if now > self._now:
            if self._receiving:
                self._served += (now - self._now) * self._rate()
            self._now = now

    def _begin(self, rank: _Rank) -> None:
        rank.has_begun = True
        self._employ_readers(rank)

    def _become_ready(self, rank: _Rank) -> None:
        rank.is_ready = rank.has_begun = True
        self._employ_readers(rank)
        self._employ_copiers(rank)

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
        self._num_events += 1
        heapq.heappush(self._receiving, (self._served + block.read.work_bytes, self._num_events, block))

    def _received(self, block: _Block) -> None:
        for copy in block.read.copies:
            self._at(self._now + copy.delay_seconds, self._offer, copy, block)
        if block.rank.is_ready:
            self._copy_own(block)
        else:
            block.rank.early.append(block)
            block.rank.idle_readers += 1
            self._employ_readers(block.rank)

    def _copy_own(self, block: _Block) -> None:
        self._at(self._now + block.read.own.seconds, self._copied_own, block)

    def _copied_own(self, block: _Block) -> None:
        self._last = self._now
        block.rank.idle_readers += 1
        self._let_go(block)
        self._employ_readers(block.rank)

    def _offer(self, copy: Copy, block: _Block) -> None:
        rank = self._ranks[copy.rank]
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

    def _copied(self, rank: _Rank, copy: Copy, block: _Block | None) -> None:
        self._last = self._now
        rank.idle_copiers += 1
        self._employ_copiers(rank)
        if block is not None:
            self._at(self._now + copy.delay_seconds, self._let_go, block)

    def _let_go(self, block: _Block) -> None:
        block.num_holders -= 1
        if block.num_holders or not block.read.is_staged:
            return
        rank = block.rank
        rank.free_slots += 1
        if rank.waiting:
            self._ask(rank.waiting.popleft())
        elif not rank.is_ready:
            self._employ_readers(rank)
