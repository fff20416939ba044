"""How do the ranks of one node find each other? Abstract Unix sockets named after a session that only they know.

An abstract socket has no file, so nothing is left behind when a process is killed. Every rank listens, dials the ranks before
it, says HELLO and is answered with HELLO by the ranks after it, in whatever order they come. The kernel vouches for the other
end's user. Names of abstract sockets can be read, and taken, by every process of the machine. So:

- whoever is of another user, or says no HELLO that fits, is turned away, and the meeting goes on;
- a rank whose name another user has taken listens under a longer name, which nobody can guess and its neighbours look up.

A `Meeting` never waits: the session's thread calls it whenever something may have happened.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ray_streamer.errors import ClusterError
from ray_streamer.exchange.liveness import Watch
from ray_streamer.exchange.messages import MAX_MESSAGE_BYTES, Hello, decode_hello, encode_hello
from ray_streamer.exchange.names import connect, listen, longer_names, socket_name_of
from ray_streamer.exchange.peer import PeerProcess, is_same_user, receive_message
from ray_streamer.units import counted

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from ray_streamer.exchange.liveness import Timeouts

logger = logging.getLogger(__name__)

_MAX_NOTES = 5
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.002, 0.05
_LOOK_UP_SECONDS = 0.25


@dataclass(slots=True, eq=False)
class Link:
    """An open connection to one neighbour.

    Attributes:
        local_rank: The neighbour's.
        socket: Non-blocking.
        watch: What is known of the neighbour's life.
    """

    local_rank: int
    socket: socket.socket
    watch: Watch

    def close(self) -> None:
        """Closes the connection."""
        self.socket.close()
        self.watch.process.close()


@dataclass(slots=True, eq=False)
class _Call:
    """A connection that this rank opened and that was not answered yet."""

    local_rank: int
    address: bytes
    link: Link = field(repr=False)


class Meeting:
    """One rank's search for the others of its node.

    Args:
        name: Of the session; known to its ranks.
        hello: What this rank says of itself.
        selector: Told of every socket; calls its `data` when there is something to do.
        on_link: Called with every link that is made; owns it from then on.

    Attributes:
        missing: Local ranks that are not met yet.
        notes: Who was turned away, for the error of a meeting that fails.

    Raises:
        ClusterError: The session is in use.
    """

    def __init__(
        self,
        name: str,
        hello: Hello,
        *,
        selector: selectors.BaseSelector,
        timeouts: Timeouts,
        on_link: Callable[[Link], None],
    ) -> None:
        self._name, self._hello, self._selector = name, hello, selector
        self._timeouts, self._on_link = timeouts, on_link
        self.missing = set(range(hello.num_local_ranks)) - {hello.local_rank}
        self.notes: list[str] = []
        self.poll_seconds = _FIRST_POLL_SECONDS
        self._looked_up = float("-inf")
        self._calls: dict[bytes, _Call] = {}
        self._strangers: set[socket.socket] = set()
        self._listener = listen(socket_name_of(name, hello.local_rank))
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Listens no more, and lets go of everybody that is not a link."""
        for connection in [self._listener, *self._strangers, *(call.link.socket for call in self._calls.values())]:
            self._forget(connection)
            connection.close()
        for call in self._calls.values():
            call.link.close()
        self._calls.clear()
        self._strangers.clear()

    def close_in_child(self) -> None:
        """Closes what a fork copied, and leaves the selector alone, which the parent uses."""
        for connection in [self._listener, *self._strangers, *(call.link.socket for call in self._calls.values())]:
            connection.close()

    def dial(self) -> None:
        """Calls the missing ranks before this one that were not called yet."""
        is_looked_up = time.monotonic() - self._looked_up >= _LOOK_UP_SECONDS
        for local_rank in [rank for rank in self.missing if rank < self._hello.local_rank]:
            address = socket_name_of(self._name, local_rank)
            longer = longer_names(address) if is_looked_up else ()
            for candidate in (address, *longer):
                if candidate not in self._calls:
                    self._call(local_rank, candidate)
        if is_looked_up:
            self._looked_up = time.monotonic()
        self.poll_seconds = min(2 * self.poll_seconds, _LAST_POLL_SECONDS)

    def tick(self, seconds: float) -> Iterator[tuple[int, str]]:
        """`seconds` more of waiting: the ranks that listen but hang, each with what is known of it."""
        for call in self._calls.values():
            reason = call.link.watch.tick(seconds)
            if reason is not None and not call.link.watch.process.has_ended():
                yield call.local_rank, reason

    def _call(self, local_rank: int, address: bytes) -> None:
        connection = connect(address)
        if connection is None:
            return
        if not is_same_user(connection):
            self._turn_away(connection, f"a process of another user has taken the name of local rank {local_rank}")
            return
        try:
            connection.send(encode_hello(self._hello))
        except OSError:
            # It is gone already, or turns everybody away.
            connection.close()
            return
        call = _Call(local_rank, address, self._link(local_rank, connection))
        self._calls[address] = call
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear_answer, call))

    def _link(self, local_rank: int, connection: socket.socket) -> Link:
        return Link(local_rank, connection, Watch(PeerProcess.of(connection), self._timeouts))

    def _hear_answer(self, call: _Call) -> None:
        """What a rank that was called says first."""
        del self._calls[call.address]
        self._forget(call.link.socket)
        hello = self._read_hello(call.link.socket)
        if hello is None or hello.local_rank != call.local_rank or call.local_rank not in self.missing:
            # Closed without a word: it ended, or was waiting in a meeting that is over. It may come again.
            call.link.close()
            return
        self._admit(call.link)

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()[0]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ClusterError("no descriptor is left for the ranks of this node: raise ulimit -n") from error
            return
        connection.setblocking(False)
        if not is_same_user(connection):
            self._turn_away(connection, "a process of another user")
            return
        self._strangers.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear_call, connection))

    def _hear_call(self, connection: socket.socket) -> None:
        """What somebody who called says first."""
        self._strangers.discard(connection)
        self._forget(connection)
        hello = self._read_hello(connection)
        if hello is None:
            connection.close()
        elif not self._hello.local_rank < hello.local_rank or hello.local_rank not in self.missing:
            self._turn_away(connection, f"a second process that says it is local rank {hello.local_rank}")
        else:
            try:
                connection.send(encode_hello(self._hello))
            except OSError:
                connection.close()
                return
            self._admit(self._link(hello.local_rank, connection))

    def _read_hello(self, connection: socket.socket) -> Hello | None:
        """The greeting that waits in `connection`; None, and a note, when it is none that fits."""
        try:
            message, fds = receive_message(connection, MAX_MESSAGE_BYTES)
        except OSError:
            return None
        for fd in fds:
            os.close(fd)
        if not message:
            return None
        try:
            hello = decode_hello(message)
        except ValueError as error:
            self._note(f"a process that {error}")
            return None
        if hello.num_local_ranks != self._hello.num_local_ranks:
            self._note(
                f"local rank {hello.local_rank}, which expects {counted(hello.num_local_ranks, 'rank')} on this node where this rank "
                f"expects {self._hello.num_local_ranks}"
            )
            return None
        return hello

    def _admit(self, link: Link) -> None:
        self.missing.discard(link.local_rank)
        self._on_link(link)

    def _turn_away(self, connection: socket.socket, who: str) -> None:
        connection.close()
        self._note(who)

    def _note(self, who: str) -> None:
        if who not in self.notes and len(self.notes) < _MAX_NOTES:
            self.notes.append(who)
            logger.warning("turned away from session %s: %s", self._name, who)

    def _forget(self, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)
