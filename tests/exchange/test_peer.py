"""Last words come before the end, also where the kernel says the end first."""

from __future__ import annotations

import contextlib
import socket

import pytest

from ray_streamer.exchange.peer import receive_message


def test_what_was_said_before_the_closing_is_read_before_it() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here:
        here.setblocking(False)
        with pytest.raises(BlockingIOError):
            receive_message(here, 16)
        there.send(b"last words")
        there.close()
        assert receive_message(here, 16) == (b"last words", [])
        assert receive_message(here, 16) == (b"", [])


def test_last_words_are_read_although_the_other_end_has_left_something_unread() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here:
        here.setblocking(False)
        here.send(b"never read")
        there.send(b"last words")
        there.close()
        received: list[bytes] = []
        while not received or received[-1]:
            with contextlib.suppress(ConnectionError):
                received.append(receive_message(here, 16)[0])
        assert received == [b"last words", b""]


class _EarlyEnd(socket.socket):
    """Says the end before what was queued, as the kernel does once in some thousand closings."""

    has_said_it = False

    def recvmsg(self, *args: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        if not self.has_said_it:
            self.has_said_it = True
            return b"", [], 0, None
        return super().recvmsg(*args)


def test_an_end_that_the_kernel_says_too_early_is_not_believed() -> None:
    plain, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _EarlyEnd(fileno=plain.detach()) as here:
        here.setblocking(False)
        there.send(b"last words")
        there.close()
        assert receive_message(here, 16) == (b"last words", [])
        assert receive_message(here, 16) == (b"", [])
