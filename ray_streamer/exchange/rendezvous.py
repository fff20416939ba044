"""How do the ranks of one node find each other? Abstract Unix sockets named after a session that only they know.

An abstract socket has no file, so nothing is left behind when a process is killed. Every rank listens, connects to the ranks
before it and accepts the ranks after it, in whatever order they come; both ends exchange HELLO and the descriptors of their
arenas. The kernel vouches for the peer's user. Whoever is of another user, or does not say HELLO, is turned away and the
meeting goes on: names of abstract sockets can be read by every process of the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import selectors
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from ray_streamer.errors import ClusterError, StartupTimeoutError
from ray_streamer.exchange.messages import MAX_MESSAGE_BYTES, Hello, Kind, decode_hello, encode_hello

if TYPE_CHECKING:
    from ray_streamer.stream.stop import StopSignal

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.005
_MAX_SESSION_BYTES = 64
_CREDENTIALS = struct.Struct("3i")


@dataclass(slots=True, eq=False)
class Link:
    """An open connection to one neighbour.

    Attributes:
        local_rank: The neighbour's.
        socket: Non-blocking once the rendezvous is over.
        slot_bytes: Size of the neighbour's slots.
        memory: The neighbour's arena, mapped here; empty when it has none.
    """

    local_rank: int
    socket: socket.socket
    slot_bytes: int
    memory: memoryview = field(repr=False)
    _mapping: mmap.mmap | None = field(repr=False, default=None)

    def close(self) -> None:
        """Closes the connection and unmaps the neighbour's arena; a view still in use keeps it mapped until it is dropped."""
        self.socket.close()
        memory, mapping = self.memory, self._mapping
        self.memory, self._mapping = memoryview(b""), None
        with contextlib.suppress(BufferError):
            memory.release()
            if mapping is not None:
                mapping.close()


def meet_neighbours(
    session: str,
    hello: Hello,
    arena_fd: int,
    *,
    ranks: tuple[int, ...],
    node: str,
    timeout_seconds: float,
    stop: StopSignal,
) -> list[Link]:
    """Connects to every other rank of the node.

    Args:
        session: A secret shared by the ranks of this load and nobody else.
        hello: What this rank says of itself.
        arena_fd: Descriptor of its arena, or -1.
        ranks: Global ranks of the node in local order, this one included.
        node: Name of the node, for errors.
        timeout_seconds: How long the slowest neighbour may take to arrive.
        stop: Ends the waiting when the load is aborted.

    Raises:
        StartupTimeoutError: Some neighbours did not arrive; names them.
        ClusterError: A neighbour holds another plan, or the session is in use already.
    """
    deadline = time.monotonic() + timeout_seconds
    with _Meeting(session, hello, arena_fd, num_local_ranks=len(ranks)) as meeting:
        while meeting.missing:
            stop.check()
            if time.monotonic() > deadline:
                raise StartupTimeoutError(
                    f"ranks {[ranks[local_rank] for local_rank in sorted(meeting.missing)]} of node {node} did not connect to "
                    f"rank {ranks[hello.local_rank]} within startup_timeout_seconds={timeout_seconds}; look for their "
                    "errors, or raise the setting"
                )
            meeting.dial()
            meeting.answer(POLL_SECONDS)
        return [meeting.links[local_rank] for local_rank in sorted(meeting.links)]


class _Meeting:
    """Who has been met, and who has only connected; every socket that is not a link is closed at the end.

    Attributes:
        missing: Local ranks that are not met yet.
        links: Connections to those that are, by local rank.
    """

    def __init__(self, session: str, hello: Hello, arena_fd: int, *, num_local_ranks: int) -> None:
        self._session, self._hello, self._arena_fd = session, hello, arena_fd
        self.missing = set(range(num_local_ranks)) - {hello.local_rank}
        self.links: dict[int, Link] = {}
        self._dialled: dict[int, socket.socket] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._undo as undo:
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            _listen(self._listener, self._session, self._hello.local_rank, backlog=len(self.missing))
            self._selector.register(self._listener, selectors.EVENT_READ)
            undo.push(self._close_connections)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._undo.__exit__(*failure)

    def _close_connections(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.close()
        if error is not None:
            for link in self.links.values():
                link.close()

    def dial(self) -> None:
        """Connects to the ranks before this one that are listening and were not called yet."""
        for local_rank in [rank for rank in self.missing if rank < self._hello.local_rank]:
            if local_rank not in self._dialled:
                connection = _connect(self._session, local_rank)
                if connection is not None and self._introduce(connection):
                    self._dialled[local_rank] = connection

    def answer(self, timeout_seconds: float) -> None:
        """Takes what comes in: connections, and what their other ends say."""
        for key, _ in self._selector.select(timeout_seconds):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._introduce(self._listener.accept()[0])
            else:
                self._recognise(key.data)

    def _introduce(self, connection: socket.socket) -> bool:
        """Says HELLO to a process of the same user; whether it was let in."""
        connection.setblocking(False)
        fds = [self._arena_fd] if self._arena_fd >= 0 else []
        try:
            if _user_of(connection) != os.getuid():
                raise ConnectionRefusedError("a process of another user")
            socket.send_fds(connection, [encode_hello(self._hello)], fds)
        except ConnectionError as error:
            logger.warning("turned a connection to session %s away: %s", self._session, error)
            connection.close()
            return False
        self._selector.register(connection, selectors.EVENT_READ, connection)
        return True

    def _recognise(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._dialled = {rank: dialled for rank, dialled in self._dialled.items() if dialled is not connection}
        link = None
        try:
            link = _greeted_link(connection, self._hello, self.missing)
        finally:
            if link is None:
                connection.close()
        if link is not None:
            self.links[link.local_rank] = link
            self.missing.remove(link.local_rank)


def _address(session: str, local_rank: int) -> bytes:
    # A socket's name has room for 107 bytes; a session is as long as whoever named it liked.
    if len(session.encode()) > _MAX_SESSION_BYTES:
        session = hashlib.sha256(session.encode()).hexdigest()
    return f"\0ray_streamer/{session}/{local_rank}".encode()


def _listen(listener: socket.socket, session: str, local_rank: int, *, backlog: int) -> None:
    listener.setblocking(False)
    try:
        listener.bind(_address(session, local_rank))
    except OSError as error:
        raise ClusterError(
            f"local rank {local_rank} of session {session} is loading here already ({error.strerror}): give every load a "
            "session of its own"
        ) from error
    listener.listen(backlog)


def _connect(session: str, local_rank: int) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(_address(session, local_rank))
    except OSError:
        # Not listening yet; a rank that never will is the deadline's matter.
        connection.close()
        return None
    return connection


def _greeted_link(connection: socket.socket, hello: Hello, missing: set[int]) -> Link | None:
    """The link to whoever said HELLO on `connection`; None when the other end is no neighbour that is missed.

    Raises:
        ClusterError: It is a neighbour that holds another plan.
    """
    try:
        message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        message, fds = b"", []
    try:
        if not message or message[0] != Kind.HELLO:
            logger.warning("turned a process away that connected and said %r", message[:20])
            return None
        theirs = decode_hello(message[1:])
        if theirs.plan_hash != hello.plan_hash:
            raise ClusterError(
                f"local rank {theirs.local_rank} holds plan {theirs.plan_hash}, local rank {hello.local_rank} holds "
                f"{hello.plan_hash}: give every rank the same uri, rules and limits"
            )
        return _link(connection, theirs, fds) if theirs.local_rank in missing else None
    finally:
        for fd in fds:
            os.close(fd)


def _link(connection: socket.socket, theirs: Hello, fds: list[int]) -> Link:
    if not theirs.num_slots:
        return Link(theirs.local_rank, connection, theirs.slot_bytes, memoryview(b""))
    if not fds:
        raise ClusterError(
            f"the arena of local rank {theirs.local_rank} did not arrive: raise the limit of open files (ulimit -n)"
        )
    mapping = mmap.mmap(fds[0], theirs.num_slots * theirs.slot_bytes, prot=mmap.PROT_READ)
    return Link(theirs.local_rank, connection, theirs.slot_bytes, memoryview(mapping), mapping)


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1]
