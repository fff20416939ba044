"""How do the ranks of one node find each other? Abstract Unix sockets named after a session that only they know.

An abstract socket has no file, so nothing is left behind when a process is killed. Every rank listens, connects to the ranks
before it and accepts the ranks after it; both ends exchange HELLO and the descriptors of their arenas. The kernel vouches for
the peer's user; another user's process is turned away.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.errors import ClusterError, StartupTimeoutError
from ray_streamer.exchange.messages import MAX_MESSAGE_BYTES, Hello, Kind, decode_hello, encode_hello

if TYPE_CHECKING:
    from ray_streamer.stream.stop import StopSignal

POLL_SECONDS = 0.02
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
        """Closes the connection and unmaps the neighbour's arena."""
        self.socket.close()
        with contextlib.suppress(BufferError):
            self.memory.release()
            if self._mapping is not None:
                self._mapping.close()


def meet_neighbours(
    session: str, hello: Hello, arena_fd: int, *, num_local_ranks: int, timeout_seconds: float, stop: StopSignal
) -> list[Link]:
    """Connects to every other rank of the node.

    Args:
        session: A secret shared by the ranks of this load and nobody else.
        hello: What this rank says of itself.
        arena_fd: Descriptor of its arena, or -1.
        num_local_ranks: Ranks of the node, this one included.
        timeout_seconds: How long the slowest neighbour may take to arrive.
        stop: Ends the waiting when the load is aborted.

    Raises:
        StartupTimeoutError: Some neighbours did not arrive; names them.
        ClusterError: A neighbour holds another plan.
    """
    me = hello.local_rank
    deadline = time.monotonic() + timeout_seconds
    links: dict[int, Link] = {}
    with contextlib.ExitStack() as undo, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        undo.callback(lambda: [link.close() for link in links.values()])
        listener.bind(_address(session, me))
        listener.listen(num_local_ranks)
        listener.settimeout(POLL_SECONDS)
        while len(links) < num_local_ranks - 1:
            _check_time(stop, deadline, set(range(num_local_ranks)) - {me} - links.keys(), timeout_seconds)
            unmet = next((rank for rank in range(me) if rank not in links), None)
            connection = _connect(session, unmet) if unmet is not None else _accept(listener)
            if connection is not None:
                link = _greet(connection, hello, arena_fd, deadline)
                links[link.local_rank] = link
        undo.pop_all()
    for link in links.values():
        link.socket.setblocking(False)
    return [links[rank] for rank in sorted(links)]


def _address(session: str, local_rank: int) -> bytes:
    return f"\0ray_streamer/{session}/{local_rank}".encode()


def _check_time(stop: StopSignal, deadline: float, silent: set[int], timeout_seconds: float) -> None:
    stop.check()
    if time.monotonic() > deadline:
        raise StartupTimeoutError(
            f"local ranks {sorted(silent)} did not connect within startup_timeout_seconds={timeout_seconds}; "
            "look for their errors, or raise the setting"
        )


def _connect(session: str, local_rank: int) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(_address(session, local_rank))
    except OSError:
        # Not listening yet; a rank that never will is the deadline's matter.
        connection.close()
        time.sleep(POLL_SECONDS)
        return None
    return connection


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return None
    return connection


def _greet(connection: socket.socket, hello: Hello, arena_fd: int, deadline: float) -> Link:
    try:
        _check_user(connection)
        connection.settimeout(max(deadline - time.monotonic(), POLL_SECONDS))
        socket.send_fds(connection, [encode_hello(hello)], [arena_fd] if arena_fd >= 0 else [])
        message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
        if not message or message[0] != Kind.HELLO:
            raise ClusterError("a neighbour closed the connection before it said who it is")
        theirs = decode_hello(message[1:])
        if theirs.plan_hash != hello.plan_hash:
            raise ClusterError(
                f"local rank {theirs.local_rank} holds plan {theirs.plan_hash}, local rank {hello.local_rank} holds "
                f"{hello.plan_hash}: give every rank the same uri, rules and limits"
            )
        return _link(connection, theirs, fds)
    except BaseException:
        connection.close()
        raise


def _link(connection: socket.socket, theirs: Hello, fds: list[int]) -> Link:
    if not theirs.num_slots:
        return Link(theirs.local_rank, connection, theirs.slot_bytes, memoryview(b""))
    mapping = mmap.mmap(fds[0], theirs.num_slots * theirs.slot_bytes, prot=mmap.PROT_READ)
    os.close(fds[0])
    return Link(theirs.local_rank, connection, theirs.slot_bytes, memoryview(mapping), mapping)


def _check_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.getuid():
        raise ClusterError(f"a process of user {user} connected to a load of user {os.getuid()}")
