"""What has come from the other ranks, and what is still awaited of them? Filled by the hub's thread, emptied by the waiting ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.errors import ClusterError, RankFailedError
from ray_streamer.exchange.memory import map_memory, map_value
from ray_streamer.exchange.messages import HANDED_OVER, decode_value
from ray_streamer.process_limits import limits_explained

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray_streamer.exchange.liveness import Activity
    from ray_streamer.exchange.place import Place
    from ray_streamer.staging.stop import StopSignal


class Received(NamedTuple):
    """What one rank gave to one step.

    Attributes:
        value: Read-only, mapped as long as it is used.
        memory: That it lends; likewise.
        fd: Of memory that all ranks write to, the consumer's to close; -1 when there is none.
    """

    value: memoryview
    memory: memoryview
    fd: int = -1


def receive_value(payload: bytes, fds: list[int], *, rank: int) -> tuple[int, Received]:
    """Step and content of a VALUE message of `rank`; the descriptors stay the caller's.

    Raises:
        ClusterError: Memory that the message speaks of did not arrive.
    """
    head, inline = decode_value(payload)
    is_beside = head.value_bytes > len(inline)
    if (head.memory_bytes or is_beside) and not fds:
        raise ClusterError(f"memory of rank {rank} did not arrive: raise the limit of open files (ulimit -n)")
    value = map_value(fds[0], head.value_bytes) if is_beside else memoryview(inline)
    if head.memory_bytes == HANDED_OVER:
        with limits_explained("share memory with the other ranks"):
            return head.step, Received(value, memoryview(b""), os.dup(fds[0]))
    memory = memoryview(map_memory(fds[0], head.memory_bytes)) if head.memory_bytes else memoryview(b"")
    return head.step, Received(value, memory)


class Mailbox:
    """Values by rank and step; who is met, done and gone.

    Args:
        place: Who the ranks are.
        activity: Told when a thread does nothing but wait.
        stop: Ends every waiting.
    """

    def __init__(self, place: Place, activity: Activity, stop: StopSignal) -> None:
        self._place, self._activity, self._stop = place, activity, stop
        self.peers = frozenset(range(len(place.ranks))) - {place.local_rank}
        self._changed = stop.condition()
        self._received: dict[tuple[int, int], Received] = {}
        self._met: set[int] = set()
        self._is_meeting = True
        self._awaited: set[int] = set()
        self._awaited_beside: set[int] = set()
        self._step = -1
        self._unfinished: set[int] = set()
        self._gone: dict[int, str] = {}

    @property
    def expected(self) -> set[int]:
        """Ranks of which something is awaited now."""
        with self._changed:
            return (self._met if self._is_meeting else self._awaited) | self._unfinished | self._awaited_beside

    def meet(self, peer: int) -> None:
        """A rank is connected."""
        with self._changed:
            self._met.add(peer)
            self._changed.notify_all()

    def part(self, peer: int) -> None:
        """A rank that was connected is not any more, and may come again."""
        with self._changed:
            self._met.discard(peer)

    def wait_met(self, seconds: float) -> set[int]:
        """Waits until all ranks are connected, or so many seconds have passed; those that are not."""
        with self._activity.waiting(), self._changed:
            self._changed.wait_for(lambda: self._met == self.peers or self._stop.is_set, seconds)
            self._stop.check()
            self._is_meeting = self._met != self.peers
            return set(self.peers - self._met)

    def put(self, peer: int, step: int, received: Received) -> None:
        """A rank gave its part of a step."""
        with self._changed:
            self._received[peer, step] = received
            if step == self._step:
                self._awaited.discard(peer)
                self._changed.notify_all()

    def take(self, peers: Iterable[int], step: int) -> dict[int, Received]:
        """What each of `peers` gave to a step; waits for it.

        Raises:
            BaseException: What ended the session instead.
        """
        wanted = set(peers)
        with self._activity.waiting(), self._changed:
            self._step = step
            self._awaited = {peer for peer in wanted if (peer, step) not in self._received}
            while self._awaited:
                self._stop.check()
                self._refuse_gone(self._awaited)
                self._changed.wait()
            return {peer: self._received.pop((peer, step)) for peer in wanted}

    def expect(self, local_ranks: set[int]) -> None:
        """Something that does not come here is awaited of these ranks, in place of those that were said before."""
        with self._changed:
            self._awaited_beside = local_ranks & self.peers

    def begin_load(self) -> None:
        """From now on, whoever goes before it is done has failed the load."""
        with self._changed:
            self._unfinished = set(self.peers)
            self._refuse_gone(self._unfinished)

    def finish(self, peer: int) -> None:
        """A rank has all its bytes."""
        with self._changed:
            self._unfinished.discard(peer)
            self._changed.notify_all()

    def wait_finished(self) -> None:
        """Waits until every rank has all its bytes.

        Raises:
            BaseException: What ended the session instead.
        """
        with self._activity.waiting(), self._changed:
            while self._unfinished:
                self._stop.check()
                self._changed.wait()

    def is_gone(self, peer: int) -> bool:
        """Whether the rank's connection is over."""
        return peer in self._gone

    def lose(self, peer: int, reason: str, *, has_left: bool = False) -> None:
        """A rank is gone: a failure when something is awaited of it, now or as soon as something is.

        Args:
            peer: Local rank.
            reason: What is known.
            has_left: Whether it said so; it may have said all it had to before the others have even met.
        """
        with self._changed:
            if peer in self._gone:
                return
            self._gone[peer] = reason
            is_expected = peer in (self._awaited | self._unfinished if has_left else self.expected)
            self._changed.notify_all()
        if is_expected:
            self.fail(peer, reason)

    def fail(self, peer: int, reason: str) -> None:
        """Ends the session with the failure of a rank."""
        self._stop.set(RankFailedError(self._place.ranks[peer], self._place.node, reason))

    def fail_all(self) -> None:
        """Ends a session in which every rank waits for the others."""
        bound = self._place.timeouts.progress_seconds
        self._stop.set(
            ClusterError(
                f"ranks {list(self._place.ranks)} of node {self._place.node} waited for each other for "
                f"progress_timeout_seconds={bound:g}; let every rank make the same loads in the same order"
            )
        )

    def close(self) -> None:
        """Drops what nobody took."""
        for received in self._received.values():
            if received.fd >= 0:
                os.close(received.fd)
        self._received.clear()

    def _refuse_gone(self, needed: Iterable[int]) -> None:
        for peer in needed:
            if peer in self._gone:
                self.fail(peer, self._gone[peer])
                # The first failure counts: the rank may be gone because of another one.
                self._stop.check()
