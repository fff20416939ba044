"""What do the ranks of a node do together? They meet, before anything is planned, and agree; then they load, as often as they like.

    with NodeSession.meet(place) as session:
        said = session.gather(b"what this rank wants")        # one value per rank, the same on every rank
        plan = session.share(make)                            # the first rank's, made once
        arenas = session.lend(b"how it is cut", fd, size)     # every rank's memory, mapped
        fd = session.share_memory(make)                       # the first rank's memory, for all to write to
        session.begin_load(listener)                          # then `announce`, `release`
        session.finish_load()

Every rank calls the same verbs in the same order. Values are bytes and stay bytes; whoever gets them parses them. Large ones lie
in memory that all ranks map. Every wait ends when a rank fails, dies or hangs, with its name, within the session's timeouts; then
the session is over, and ranks that try again meet again. An error that leaves the block, or `fail`, is told to the others.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, NamedTuple, Self

from ray_streamer.errors import StartupTimeoutError
from ray_streamer.exchange.hub import Hub
from ray_streamer.exchange.liveness import Activity
from ray_streamer.exchange.mailbox import Mailbox, Received
from ray_streamer.exchange.memory import map_value, write_sealed
from ray_streamer.exchange.messages import HANDED_OVER, MAX_INLINE_BYTES, MessageKind, ValueHead, encode_value
from ray_streamer.process_limits import limits_explained
from ray_streamer.staging.stop import StopSignal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from ray_streamer.exchange.hub import LoadListener
    from ray_streamer.exchange.place import Place

logger = logging.getLogger(__name__)

# As for actors of Ray that are slow to start.
_SLOW_MEETING_SECONDS = 20.0


class LentMemory(NamedTuple):
    """Memory of one rank, mapped here, and what that rank says about it.

    Attributes:
        about: The rank's words.
        memory: Read-only, mapped until it is dropped; empty for this rank itself and for ranks that lend nothing.
    """

    about: memoryview
    memory: memoryview


class NodeSession:
    """The ranks of one node; closed by its owner. Made by `meet`; or by itself, and then `wait_met` comes before every verb.

    A thread looks for the other ranks from the first moment on, so that whoever makes the session may do something else before
    it waits for them; an error that ends it meanwhile is told to all that come within a few seconds.

    Args:
        place: Which rank this is.

    Raises:
        ClusterError: The session is in use by another process.

    Attributes:
        place: Which rank this is, and who the others are.
        activity: Where this rank's threads say what they do.
        stop: Set once the session is over because of an error, this rank's or another's.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.activity = Activity()
        self.stop = StopSignal()
        self._step = 0
        self._mailbox = Mailbox(place, self.activity, self.stop)
        self._hub: Hub | None = None
        if len(place.ranks) > 1:
            with limits_explained("connect the ranks of this node"):
                self._hub = Hub(place, self._mailbox, activity=self.activity, stop=self.stop)

    @classmethod
    def meet(cls, place: Place) -> NodeSession:
        """Connects to every other rank of the node.

        Raises:
            StartupTimeoutError: Some ranks did not come; names them, and what was assumed about them.
            RankFailedError: A rank that came failed, died or hung before the others were there.
            ClusterError: The session is in use by another process.
        """
        session = cls(place)
        try:
            session.wait_met()
        except BaseException as error:
            session.fail(error)
            session.close()
            raise
        return session

    def wait_met(self) -> None:
        """Waits until every other rank of the node is there.

        Raises:
            StartupTimeoutError: Some ranks did not come; names them, and what was assumed about them.
            RankFailedError: A rank that came failed, died or hung before the others were there.
        """
        if self._hub is None:
            self.stop.check()
            return
        self.activity.phase = "meeting the other ranks"
        place = self.place
        seconds = place.timeouts.startup_seconds
        absent = self._mailbox.wait_met(min(seconds, _SLOW_MEETING_SECONDS))
        if absent and seconds > _SLOW_MEETING_SECONDS:
            self._tell_of_absent(absent)
            absent = self._mailbox.wait_met(seconds - _SLOW_MEETING_SECONDS)
        if absent:
            names = self._names_of(absent)
            notes = self._hub.meeting.notes
            told = f"; turned away: {'; '.join(notes)}" if notes else ""
            assumed = f"; {place.assumption}" if place.assumption else ""
            raise StartupTimeoutError(
                f"ranks {names} of node {place.node} did not connect to rank {place.rank} within "
                f"startup_timeout_seconds={place.timeouts.startup_seconds}; look for their errors, or raise the setting"
                f"{told}{assumed}",
                names,
            )

    def _tell_of_absent(self, absent: set[int]) -> None:
        """A rank that ended before it met another leaves nothing behind that could name it; this is all that can be said."""
        logger.warning(
            "rank %d has waited %g s for ranks %s of node %s, and gives up after startup_timeout_seconds=%g. See whether they "
            "still run: a rank that ended before it met another cannot tell",
            self.place.rank,
            _SLOW_MEETING_SECONDS,
            self._names_of(absent),
            self.place.node,
            self.place.timeouts.startup_seconds,
        )

    def _names_of(self, local_ranks: set[int]) -> list[int]:
        return [self.place.ranks[local_rank] for local_rank in sorted(local_ranks)]

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the node, which makes what is shared."""
        return self.place.local_rank == 0

    def gather(self, value: bytes) -> tuple[memoryview, ...]:
        """Gives `value` to all ranks; every rank's value, in local order.

        Raises:
            RankFailedError: Another rank failed before it gave its value.
            BudgetError: The system refuses the memory that a large value needs.
        """
        return tuple(received.value for received in self._exchange(value))

    def share(self, make: Callable[[], bytes]) -> memoryview:
        """What `make` returned on the first rank, where alone it is called; the same memory on all ranks.

        Raises:
            BaseException: On the first rank, what `make` raised; the session is over then.
            RankFailedError: On the others: names the first rank, its `cause` is that error.
        """
        return self._given_by_first(lambda step: self._give(step, make())).value

    def share_memory(self, make: Callable[[], int]) -> int:
        """Memory that all ranks read and write: a descriptor, the caller's to close on every rank.

        Args:
            make: Returns a memory file; called on the first rank alone.

        Raises:
            BaseException: On the first rank, what `make` raised; the session is over then.
            RankFailedError: On the others: names the first rank, its `cause` is that error.
        """

        def give(step: int) -> Received:
            fd = make()
            return self._give(step, b"", fd, HANDED_OVER)._replace(fd=fd)

        return self._given_by_first(give).fd

    def lend(self, about: bytes, fd: int, num_bytes: int) -> tuple[LentMemory, ...]:
        """Lends memory to all ranks and maps theirs; every rank's, in local order.

        Args:
            about: Up to 2048 bytes of words about the memory.
            fd: Descriptor of the memory; stays the caller's.
            num_bytes: Length of the memory; 0 when none is lent.

        Raises:
            RankFailedError: Another rank failed before it lent its memory.
            ClusterError: Memory did not arrive.
        """
        assert len(about) <= MAX_INLINE_BYTES
        received = self._exchange(about, fd if num_bytes else -1, num_bytes)
        return tuple(LentMemory(each.value, each.memory) for each in received)

    def begin_load(self, listener: LoadListener) -> None:
        """Ranks may announce blocks from now on; call it before the step that tells the others that this rank is ready."""
        self._mailbox.begin_load()
        if self._hub is not None:
            self._hub.listener = listener

    def announce(self, block: int, slot: int, consumers: Iterable[int]) -> None:
        """Offers a block in a slot of this rank's arena to `consumers`, which each release it once."""
        if self._hub is not None:
            self._hub.send_numbers(consumers, MessageKind.ANNOUNCE, (block, slot))

    def release(self, owner: int, slot: int) -> None:
        """Lets go of a slot that local rank `owner` offered."""
        assert self._hub is not None
        self._hub.send_numbers((owner,), MessageKind.RELEASE, (slot,))

    def finish_load(self) -> None:
        """Waits until every rank has all its bytes.

        Raises:
            BaseException: The error that ended the load instead.
        """
        if self._hub is not None:
            self._hub.send(self._mailbox.peers, bytes([MessageKind.DONE]))
            self._mailbox.wait_finished()
            self._hub.listener = None
        self.stop.check()

    def expect(self, local_ranks: set[int]) -> None:
        """This rank waits for something that these do beside the session; one that dies or hangs meanwhile ends the session.

        They take the place of those that were said before; none = the waiting is over.
        """
        self._mailbox.expect(local_ranks)

    def fail(self, error: BaseException) -> None:
        """Ends the session for all ranks; the others raise `RankFailedError` with this rank's name and the error."""
        self.stop.set(error)

    def close(self) -> None:
        """Leaves the session, as agreed or after the others were told why; ends its thread. May be called again."""
        hub, self._hub = self._hub, None
        if hub is not None:
            if not self.stop.is_set:
                hub.send(self._mailbox.peers, bytes([MessageKind.BYE]))
            hub.close()
        self._mailbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def _next_step(self) -> int:
        self._step += 1
        return self._step

    def _given_by_first(self, give: Callable[[int], Received]) -> Received:
        """The first rank's part of the next step, which it gives by `give`; an error of that ends the session."""
        self.stop.check()
        step = self._next_step()
        if not self.is_first:
            return self._mailbox.take([0], step)[0]
        try:
            return give(step)
        except BaseException as error:
            self.fail(error)
            raise

    def _exchange(self, value: bytes, fd: int = -1, memory_bytes: int = 0) -> list[Received]:
        self.stop.check()
        step = self._next_step()
        own = self._give(step, value, fd, memory_bytes)
        received = self._mailbox.take(self._mailbox.peers, step) | {self.place.local_rank: own}
        return [received[local_rank] for local_rank in range(len(self.place.ranks))]

    def _give(self, step: int, value: bytes, fd: int = -1, memory_bytes: int = 0) -> Received:
        """Sends this rank's part of a step to all others; the part as the others see it."""
        nothing = memoryview(b"")
        if self._hub is None:
            return Received(memoryview(value).toreadonly(), nothing)
        if len(value) <= MAX_INLINE_BYTES:
            message = encode_value(ValueHead(step, len(value), memory_bytes), value)
            self._hub.send(self._mailbox.peers, message, fd)
            return Received(memoryview(value).toreadonly(), nothing)
        value_fd = write_sealed(value)
        try:
            self._hub.send(self._mailbox.peers, encode_value(ValueHead(step, len(value), 0), b""), value_fd)
            return Received(map_value(value_fd, len(value)), nothing)
        finally:
            os.close(value_fd)
