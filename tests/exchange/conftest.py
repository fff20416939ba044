"""Links between two ends of this process, and ranks that meet as threads."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from ray_streamer.exchange.messages import Hello
from ray_streamer.exchange.rendezvous import Link, meet_neighbours
from ray_streamer.stream.stop import StopSignal

if TYPE_CHECKING:
    from collections.abc import Callable

JOIN_SECONDS = 30.0


class Meeting:
    """One rank that meets its neighbours in a thread of its own."""

    def __init__(self, session: str, local_rank: int, num_ranks: int, **given) -> None:
        self.stop = StopSignal()
        self.links: list[Link] = []
        self.error: BaseException | None = None
        hello = Hello(
            local_rank=local_rank,
            plan_hash=given.pop("plan_hash", "plan"),
            num_slots=given.pop("num_slots", 0),
            slot_bytes=4096,
        )
        arguments = {"ranks": tuple(range(10, 10 + num_ranks)), "node": "n", "timeout_seconds": 20.0} | given
        fd = arguments.pop("arena_fd", -1)

        def meet() -> None:
            try:
                self.links = meet_neighbours(session, hello, fd, stop=self.stop, **arguments)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=meet, daemon=True)
        self._thread.start()

    def join(self) -> list[Link]:
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "a rank waits for ever"
        return self.links


@pytest.fixture
def meet() -> Callable[..., Meeting]:
    return Meeting


@pytest.fixture
def linked() -> Callable[..., tuple[Link, Link]]:
    """Both ends of a connection between local ranks `left` and `right`; `send_bytes` shrinks the sockets' buffers."""

    def connect(left: int = 0, right: int = 1, *, send_bytes: int = 0) -> tuple[Link, Link]:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in ends:
            end.setblocking(False)
            if send_bytes:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        return Link(right, ends[0], 4096, memoryview(b"")), Link(left, ends[1], 4096, memoryview(b""))

    return connect
